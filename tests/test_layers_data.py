"""The step of a convolution's input that is data: the same gradient, without the data's."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from qat.calibrate import calibrate
from qat.insert import apply_plan, make_plan
from qat.layers import modules
from qat.policy import QuantPolicy

CONVOLUTIONS = {
    "strided": (lambda: nn.Conv2d(3, 8, 7, 2, 3), (4, 3, 20, 20)),
    "no bias": (lambda: nn.Conv2d(3, 8, 3, bias=False), (4, 3, 8, 8)),
    "groups": (lambda: nn.Conv2d(4, 8, 3, groups=2), (4, 4, 8, 8)),
    "circular": (lambda: nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular"), (4, 3, 8, 8)),
    "patches": (lambda: nn.Conv2d(3, 64, 16, 16), (2, 3, 64, 64)),
    "1d": (lambda: nn.Conv1d(3, 8, 5), (4, 3, 20)),
    "3d": (lambda: nn.Conv3d(1, 4, 3), (2, 1, 6, 6, 6)),
}


def quantized(layer: nn.Module, x: torch.Tensor, **settings: object) -> nn.Sequential:
    model = nn.Sequential(layer)
    policy = {"weight": {"bits": 8, "granularity": "channel"}, "act": {"bits": 4}, "rules": {}, **settings}
    plan, _ = make_plan(model, QuantPolicy.from_dict(policy), lambda: model(x))
    apply_plan(model, plan)
    calibrate(model, lambda: model(x))
    return model.train()


def gradients(model: nn.Module, x: torch.Tensor, forward=None) -> dict[str, torch.Tensor]:
    """Of all parameters, for a loss that weighs outputs differently."""
    model.zero_grad()
    y = (forward or model)(x)
    torch.manual_seed(1)
    (y * torch.randn_like(y)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def used(monkeypatch) -> list[str]:
    """Convolutions that took the shorter way."""
    found, convolved = [], modules.convolved
    monkeypatch.setattr(modules, "convolved", lambda layer, *args: found.append(layer) or convolved(layer, *args))
    return found


def by_way_of_the_data(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    return gradients(model, x.clone().requires_grad_())


@pytest.mark.parametrize(("make", "shape"), [pytest.param(*v, id=k) for k, v in CONVOLUTIONS.items()])
@pytest.mark.parametrize("weight", [{"bits": 8, "granularity": "channel"}, "off"], ids=["w8", "weight in float"])
def test_gradients_are_those_by_way_of_the_data(make, shape, weight, used):
    torch.manual_seed(0)
    x = torch.randn(shape) * 2  # some of it is clipped
    model = quantized(make(), x, weight=weight)
    expected = by_way_of_the_data(model, x)
    assert not used
    found = gradients(model, x)
    assert used
    assert model[0].input_quantizer.scale.requires_grad
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


def test_the_data_gets_no_gradient_that_nobody_wants(used):
    x = torch.randn(4, 3, 8, 8)
    model = quantized(nn.Conv2d(3, 8, 3), x)
    with torch.profiler.profile(record_shapes=True) as profile:
        gradients(model, x)
    backward = [e for e in profile.events() if e.name == "aten::convolution_backward"]
    assert used
    assert [e.concrete_inputs[-1] for e in backward] == [[False, True, True]]


@pytest.mark.parametrize("reason", ["stochastic", "fixed", "hooked", "off", "evaluation", "no gradients"])
def test_others_go_the_long_way(reason, used):
    x = torch.randn(4, 3, 8, 8)
    act = {
        "stochastic": {"bits": 4, "rounding_mode": "stochastic"},
        "fixed": {"bits": 4, "quantizer": "fixed"},
    }.get(reason, {"bits": 4})
    model = quantized(nn.Conv2d(3, 8, 3), x, act=act)
    if reason == "hooked":
        model[0].input_quantizer.register_forward_hook(lambda module, args, y: 2 * y)
    if reason == "off":
        model[0].input_quantizer.enable(False)
    with torch.set_grad_enabled(reason != "no gradients"):
        model.train(reason != "evaluation")(x)
    assert not used


def test_a_frozen_step_stays_frozen(used):
    x = torch.randn(4, 3, 8, 8)
    model = quantized(nn.Conv2d(3, 8, 3), x)
    model[0].input_quantizer.scale.requires_grad_(False)
    assert "0.input_quantizer.scale" not in gradients(model, x)
    assert not used


def test_checkpointed_convolutions_agree_with_themselves():
    x = torch.randn(4, 3, 8, 8)
    model = quantized(nn.Conv2d(3, 8, 3), x)
    expected = gradients(model, x)
    found = gradients(model, x, lambda x: checkpoint(model, x, use_reentrant=False))
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


def test_under_autocast_gradients_agree_as_far_as_bfloat16_goes(used):
    x = torch.randn(4, 3, 16, 16)
    model = quantized(nn.Conv2d(3, 8, 3), x)

    def forward(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    found = gradients(model, x, forward)
    assert used
    expected = gradients(model, x.clone().requires_grad_(), forward)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=0.05, atol=0.02 * expected[name].abs().max().item())


def test_a_failing_layer_leaves_its_step_learning():
    x = torch.randn(4, 3, 8, 8)
    model = quantized(nn.Conv2d(3, 8, 3), x)
    with pytest.raises(RuntimeError):
        model(torch.randn(4, 5, 8, 8))
    assert model[0].input_quantizer.scale.requires_grad
