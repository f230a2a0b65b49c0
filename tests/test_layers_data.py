"""The step of a convolution's input that is data: the same gradient, without the data's."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import qat
from qat.errors import UserError
from qat.kernels import dispatch
from qat.layers import modules

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
    qat.quantize(model, {"weight": {"bits": 8, "granularity": "channel"}, "act": {"bits": 4}, **settings}, x)
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


class Affine(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input + 1, weight, bias).relu()


@pytest.mark.parametrize(
    "reason",
    ["stochastic", "fixed", "hooked", "gradients hooked", "off", "evaluation", "no gradients", "own convolution"],
)
def test_others_go_the_long_way(reason, used):
    x = torch.randn(4, 3, 8, 8)
    act = {
        "stochastic": {"bits": 4, "rounding_mode": "stochastic"},
        "fixed": {"bits": 4, "quantizer": "fixed"},
    }.get(reason, {"bits": 4})
    model = quantized((Affine if reason == "own convolution" else nn.Conv2d)(3, 8, 3), x, act=act)
    if reason == "gradients hooked":
        model[0].input_quantizer.register_full_backward_hook(lambda module, grads, outputs: None)
    if reason == "hooked":
        model[0].input_quantizer.register_forward_hook(lambda module, args, y: 2 * y)
    if reason == "off":
        model[0].input_quantizer.enable(False)
    with torch.set_grad_enabled(reason != "no gradients"):
        model.train(reason != "evaluation")(x)
    assert not used


def test_what_is_exported_has_one_graph(used):
    x = torch.randn(4, 3, 8, 8)
    model = quantized(nn.Conv2d(3, 8, 3), x)
    exported = torch.export.export(model, (x,)).module()
    assert not used
    exported(x).sum().backward()
    assert exported.get_parameter("0.input_quantizer.scale").grad is not None


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


def test_large_gradients_in_half_precision_do_not_overflow_in_their_sum(used):
    x = torch.randn(4, 3, 16, 16)
    model = quantized(nn.Conv2d(3, 8, 3), x, act={"bits": 8})

    def scaled(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.float16):
            return model(10 * x).float() * 4096

    found = gradients(model, x, scaled)["0.input_quantizer.scale"]
    assert used
    expected = by_way_of_the_data(model, 10 * x)["0.input_quantizer.scale"] * 4096
    torch.testing.assert_close(found, expected, rtol=0.01, atol=0)


def test_gradients_in_double_precision_are_as_precise(used):
    x = torch.randn(4, 3, 8, 8).double() * 2
    model = quantized(nn.Conv2d(3, 8, 3).double(), x).double()
    found = gradients(model, x)
    assert used
    for name, value in by_way_of_the_data(model, x).items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-13)


def test_the_output_may_be_written_to(used):
    x = torch.randn(4, 3, 8, 8) * 2
    model = quantized(nn.Conv2d(3, 8, 3), x)
    expected = gradients(model, x, lambda x: model(x).relu())
    for name, value in gradients(model, x, lambda x: model(x).relu_()).items():
        assert torch.equal(value, expected[name])
    assert used


@pytest.mark.parametrize("small", [True, False], ids=["small", "remembered as recipes"])
def test_a_step_that_is_changed_before_backward_is_an_error(small, used, monkeypatch):
    if not small:
        monkeypatch.setattr(dispatch, "SMALL", 0)
        monkeypatch.setattr("qat.kernels.gradient.SAVED", 0)
    x = torch.randn(4, 3, 8, 8)
    model = quantized(nn.Conv2d(3, 8, 3), x)
    y = model(x)
    assert used
    with torch.no_grad():
        model[0].input_quantizer.scale.mul_(2)
    with pytest.raises(RuntimeError, match="modified"):
        y.sum().backward()


def second_derivatives(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The product of the Hessian with a vector, of a loss that is not linear in the output."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    first = torch.autograd.grad(model(x).square().sum(), parameters, create_graph=True)
    product = sum((g * torch.linspace(-1, 1, g.numel()).view(g.shape)).sum() for g in first)
    return dict(zip(names, torch.autograd.grad(product, parameters), strict=True))


@pytest.mark.parametrize("small", [True, False], ids=["small", "remembered as recipes"])
def test_second_derivatives_are_those_by_way_of_the_data(small, used, monkeypatch):
    if not small:
        monkeypatch.setattr(dispatch, "SMALL", 0)
        monkeypatch.setattr("qat.kernels.gradient.SAVED", 0)
    x = torch.randn(4, 3, 8, 8) * 2
    model = quantized(nn.Conv2d(3, 8, 3), x)
    expected = second_derivatives(model, x.clone().requires_grad_())
    assert not used
    found = second_derivatives(model, x)
    assert used
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


def test_a_weight_that_changes_as_it_is_computed_is_computed_once(used):
    x = torch.randn(4, 3, 8, 8)
    model = quantized(nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 8, 3)), x)
    other = copy.deepcopy(model)
    found = gradients(model, x)
    assert used
    for name, value in by_way_of_the_data(other, x).items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
    for one, another in zip(model.buffers(), other.buffers(), strict=True):
        assert torch.equal(one, another)


def test_a_weight_on_the_same_learned_step_gets_its_gradient_too(used):
    x = torch.randn(4, 3, 8, 8)
    model = quantized(nn.Conv2d(3, 8, 3), x, weight={"bits": 4, "granularity": "tensor"})
    model[0].weight_quantizer.scale = model[0].input_quantizer.scale
    found = gradients(model, x)
    assert used
    for name, value in by_way_of_the_data(model, x).items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


def test_a_step_that_is_computed_from_something_else_passes_its_gradient_on(used):
    x = torch.randn(4, 3, 8, 8)
    model = quantized(nn.Conv2d(3, 8, 3), x)
    expected = gradients(model, x)["0.input_quantizer.scale"]
    factor = torch.ones(1, requires_grad=True)
    scale = model[0].input_quantizer.scale.detach()
    y = torch.func.functional_call(model, {"0.input_quantizer.scale": scale * factor}, (x,))
    torch.manual_seed(1)
    (y * torch.randn_like(y)).sum().backward()
    assert used
    torch.testing.assert_close(factor.grad, expected * scale)


def test_transforms_of_functions_are_refused_as_ever():
    x = torch.randn(4, 3, 8, 8)
    model = quantized(nn.Conv2d(3, 8, 3), x)
    with pytest.raises(UserError, match=r"torch\.func transforms"):
        torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).sum())(dict(model.named_parameters()))


def test_another_thread_does_not_find_the_step_frozen(used):
    x = torch.randn(4, 3, 8, 8)
    model = quantized(nn.Conv2d(3, 8, 3), x)
    learns: list[bool] = []
    quantizer = model[0].weight_quantizer

    def elsewhere(*_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=lambda: learns.append("0.input_quantizer.scale" in gradients(model, x)))
            thread.start()
            thread.join()

    quantizer.register_forward_hook(elsewhere)
    model(x)
    assert used
    assert learns == [True]


def test_a_failing_layer_leaves_its_step_learning():
    x = torch.randn(4, 3, 8, 8)
    model = quantized(nn.Conv2d(3, 8, 3), x)
    with pytest.raises(RuntimeError):
        model(torch.randn(4, 5, 8, 8))
    assert model[0].input_quantizer.scale.requires_grad
