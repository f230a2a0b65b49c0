"""A ReLU between two layers of a sequence rounds in the same pass, computes what the ReLU and the quantizer compute in
turn, and nobody sees the difference.
"""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import qat
from qat import kernels
from qat.calibrate import calibrate
from qat.convert import convert
from qat.errors import UserError
from qat.insert import apply_plan, remove
from qat.kernels import dispatch
from qat.kernels.rectified import RECTIFIERS
from qat.layers import QuantSequential, original_class, sequence
from qat.models import MobileNetV2
from qat.planning.plan import Plan
from qat.planning.planner import make_plan
from qat.policies.policy import QuantPolicy


@pytest.fixture(autouse=True)
def always(monkeypatch, kernel_settings):
    """They round whether kernels are compiled or not."""
    monkeypatch.setattr(sequence, "compiled", lambda x: True)
    kernels.configure("never")


@pytest.fixture
def rounding(monkeypatch):
    """How many ReLUs rounded in a forward pass."""

    def counted(model: nn.Module, *args: Any) -> int:
        calls = []
        rounded = sequence._rounded
        with monkeypatch.context() as patch:
            patch.setattr(sequence, "_rounded", lambda *args: calls.append(args) or rounded(*args))
            copy.deepcopy(model)(*args)
        return len(calls)

    return counted


def policy(**settings) -> dict[str, Any]:
    return {"weight": {"bits": 4, "granularity": "channel"}, "act": {"bits": 4}, **settings}


def inserted(model: nn.Module, x: torch.Tensor, **settings) -> tuple[nn.Module, Plan]:
    plan, _ = make_plan(model, QuantPolicy.from_dict(policy(**settings)), lambda: model(x))
    apply_plan(model, plan)
    return model, plan


def quantized(model: nn.Module, x: torch.Tensor, **settings) -> Any:
    qat.quantize(model, policy(**settings), x)
    return model.train()


def apart(model: nn.Module) -> nn.Module:
    """The same model, whose sequences call their modules in turn."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, QuantSequential):
            module.__class__ = original_class(module)
    return model


def step(model: nn.Module, x: torch.Tensor, autocast: bool = False) -> list[torch.Tensor]:
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    with torch.autocast("cpu", enabled=autocast):
        y = model(leaf)
    (y.float() * torch.linspace(-1, 2, y.numel()).view(y.shape)).sum().backward()
    grads = [p.grad for p in (leaf, *model.parameters())]
    model.zero_grad()
    return [y.detach(), *(g for g in grads if g is not None), *(b.clone() for b in model.buffers())]


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def assert_same_step(model: nn.Module, x: torch.Tensor, autocast: bool = False) -> None:
    other = apart(model)
    assert_equal(step(model, x, autocast), step(other, x, autocast))


def cnn(relu: nn.Module) -> nn.Module:
    first = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), relu
    return nn.Sequential(*first, nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 5))


def linears() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))


IMAGES = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(3)) * 4
ROWS = torch.randn(4, 6, generator=torch.Generator().manual_seed(4))
SETTINGS = {
    "lsq": {},
    "ewgs": {"act": {"bits": 4, "quantizer": "ewgs"}},
    "fixed": {"act": {"bits": 4, "quantizer": "fixed"}},
    "affine": {"act": {"bits": 4, "symmetric": False}},
    "signed": {"act": {"bits": 4, "signed": True}},
    "power of two": {"act": {"bits": 4, "scale": "pow2"}},
}


RELUS = [nn.ReLU, nn.ReLU6, lambda: nn.ReLU6(inplace=True)]


@pytest.mark.parametrize("relu", RELUS, ids=["relu", "relu6", "in place"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_step_is_the_same_bit_for_bit(settings, relu, rounding):
    model = quantized(cnn(relu()), IMAGES, **settings)
    assert rounding(model, IMAGES) == 1  # behind the other is a Flatten
    assert_same_step(model, IMAGES)


@pytest.mark.parametrize("relu", RELUS, ids=["relu", "relu6", "in place"])
def test_compiled_kernels_compute_the_same(relu, monkeypatch):
    monkeypatch.setattr(dispatch, "SMALL", 0)
    monkeypatch.setattr("qat.kernels.gradient.SAVED", 0)
    kernels.configure("always")
    assert_same_step(quantized(cnn(relu()), IMAGES), IMAGES)


@pytest.mark.parametrize(
    "settings", [{"quantizer": "minmax"}, {"quantizer": "dsq"}, {"rounding_mode": "stochastic"}], ids=str
)
def test_grids_that_do_more_than_round_are_called(settings, rounding):
    model = quantized(cnn(nn.ReLU()), IMAGES, act={"bits": 4, **settings})
    assert rounding(model, IMAGES) == 0


class Corners(nn.Linear):
    """Returns what it is given."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input.clone()


@pytest.mark.parametrize("relu", RECTIFIERS)
def test_values_at_the_corners_and_without_a_number(relu, monkeypatch, rounding):
    monkeypatch.setattr(sequence, "PRODUCERS", {Corners})
    x = torch.tensor([[-1.0, -0.0, 0.0, 1e-30, 2.9, 3.0, 6.0, 7.0, float("inf"), -float("inf")]])
    model = quantized(nn.Sequential(Corners(1, 1), relu(), nn.Linear(10, 3)), x[:, :8].repeat(1, 2)[:, :10].clone())
    model[0].requires_grad_(False)
    assert rounding(model, x.clone().requires_grad_()) == 1
    assert_same_step(model, x)
    x[0, 4] = float("nan")
    assert_same_step(model, x)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_whole_network_of_inverted_residuals(autocast, monkeypatch, rounding):
    monkeypatch.setattr(dispatch, "SMALL", 0)
    kernels.configure("always")
    x = torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last)
    model = quantized(MobileNetV2(width=0.25).to(memory_format=torch.channels_last), x)
    assert rounding(model, x) == 33  # of 35: one is in front of a block, and one of the pooling
    assert_same_step(model, x, autocast)


class ConvNormActivation(nn.Sequential):
    """As the well-known models have it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(nn.Conv2d(inputs, outputs, 3), nn.BatchNorm2d(outputs), nn.ReLU6(inplace=True))


def test_sequences_in_sequences_are_one(rounding):
    model = quantized(nn.Sequential(ConvNormActivation(3, 8), ConvNormActivation(8, 8), nn.Conv2d(8, 4, 3)), IMAGES)
    assert rounding(model, IMAGES) == 2
    assert [isinstance(m, QuantSequential) for m in (model, model[0])] == [True, False]
    assert_same_step(model, IMAGES)
    seen = []
    model[1].register_forward_hook(lambda m, args, y: seen.append(args[0].clone()))
    assert rounding(model, IMAGES) == 0
    torch.testing.assert_close(seen[0], model[0](IMAGES), rtol=0, atol=0)


class Halved(nn.Sequential):
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return super().__call__(x) * 0.5


class Thirds(nn.Sequential):
    def _call_impl(self, x: torch.Tensor) -> torch.Tensor:
        return super()._call_impl(x) / 3


@pytest.mark.parametrize("kind", [Halved, Thirds])
def test_a_sequence_that_is_called_in_a_way_of_its_own_is_called(kind, rounding):
    model = quantized(nn.Sequential(*linears(), kind(nn.Linear(3, 3)), nn.ReLU(), nn.Linear(3, 2)), ROWS)
    assert rounding(model, ROWS) == 1
    assert_same_step(model, ROWS)


def test_a_relu6_with_limits_of_its_own_is_called(rounding):
    model = quantized(cnn(nn.ReLU6()), IMAGES)
    assert rounding(model, IMAGES) == 1
    model[2].max_val = 1.0
    assert rounding(model, IMAGES) == 0
    assert_same_step(model, IMAGES)


class Watching(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_a_mode_that_sees_functions_sees_the_relu(rounding):
    model = quantized(linears(), ROWS)
    with Watching() as mode:
        assert rounding(model, ROWS) == 0
    assert F.relu in mode.seen
    with torch.device("cpu"):  # a mode, too
        assert rounding(model, ROWS) == 1


def test_parts_called_alone_are_what_they_are():
    model = quantized(linears(), ROWS)
    x = model[0](ROWS)
    torch.testing.assert_close(model[1](x), F.relu(x), rtol=0, atol=0)
    assert type(model[1]) is nn.ReLU
    assert_equal([model[:2](ROWS)], [F.relu(x)])
    assert_equal([model[2](model[1](x))], [model(ROWS)])


def test_a_layer_put_in_another_place_is_read_as_it_is(rounding):
    model = quantized(linears(), ROWS)
    model[2] = nn.Linear(6, 3)
    assert rounding(model, ROWS) == 0


@pytest.mark.parametrize(
    "first", [nn.Identity(), nn.Flatten(), nn.Dropout(0.0)], ids=["identity", "flatten", "dropout"]
)
def test_what_somebody_else_may_hold_is_not_kept(first, rounding):
    """The caller's tensor, or a view of it, may be written to after a ReLU, which keeps what it returns."""
    model = quantized(nn.Sequential(first, nn.ReLU(), nn.Linear(6, 3)), ROWS)
    assert rounding(model, ROWS.clone().requires_grad_()) == 0


@pytest.mark.parametrize("place", [0, 1, 2, "quantizer", "backward", "global", "forward", "saved"])
def test_who_looks_sees_what_it_saw(place, rounding):
    model = quantized(linears(), ROWS)
    assert rounding(model, ROWS) == 1
    seen: list[torch.Tensor] = []

    def look(module: nn.Module, args: Any, y: Any = None) -> None:
        seen.append(args[0].detach().clone())

    if place == "global":
        handle = nn.modules.module.register_module_forward_hook(look)
    elif place == "backward":
        handle = model[1].register_full_backward_hook(lambda m, inputs, outputs: seen.append(outputs[0]))
    elif place == "saved":
        handle = torch.autograd.graph.saved_tensors_hooks(lambda x: seen.append(x) or x, lambda x: x)
        handle.__enter__()
    elif place == "forward":
        plain = model[2].forward
        model[2].forward = lambda x: seen.append(x.detach().clone()) or plain(x)
    else:
        watched = model[2].input_quantizer if place == "quantizer" else model[place]
        handle = watched.register_forward_pre_hook(look)
    model(ROWS).sum().backward()
    if place == "saved":
        handle.__exit__()
    elif place != "forward":
        handle.remove()
    assert seen
    if place in (2, "quantizer", "forward"):
        torch.testing.assert_close(seen[0], F.relu(model[0](ROWS)), rtol=0, atol=0)
    if place == "saved":
        assert any(torch.equal(x, F.relu(model[0](ROWS))) for x in seen)


def test_they_round_where_kernels_are_compiled(monkeypatch, rounding):
    monkeypatch.setattr(sequence, "compiled", kernels.compiled)
    x = torch.randn(64, 64)
    model = quantized(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)), x)
    assert rounding(model, x) == 0
    kernels.configure(patience=3 * x.numel())
    for _ in range(3):
        model(x)
    assert rounding(model, x) == 1
    assert rounding(model, x[:8]) == 0


def test_off_grids_frozen_layers_and_evaluation_call_the_relu(rounding):
    model = quantized(linears(), ROWS)
    grid = model[2].input_quantizer
    grid.enable(False)
    assert rounding(model, ROWS) == 0
    assert_same_step(model, ROWS)
    grid.enable()
    with torch.no_grad():
        assert rounding(model, ROWS) == 0
    for quantity in (*model[0].parameters(), grid.scale):
        quantity.requires_grad_(False)
    assert rounding(model, ROWS) == 0
    assert rounding(model.eval(), ROWS) == 0


def test_what_was_written_to_is_rounded_again():
    model = quantized(linears(), ROWS)
    grid = model[2].input_quantizer
    y = sequence._rounded(model[1], grid, model[0](ROWS))
    rounded = y.detach().clone()
    assert grid(y) is y
    with torch.no_grad():
        y.add_(0.3 * grid.step())
        assert not torch.equal(y, rounded)
        torch.testing.assert_close(grid(y), rounded)


def test_it_is_copied_pickled_removed_and_converted():
    model, plan = inserted(linears(), ROWS)
    calibrate(model, lambda: model(ROWS))
    model.train()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(twin, QuantSequential)
        assert_equal(step(twin, ROWS), step(model, ROWS))
    converted = convert(model, plan)
    torch.testing.assert_close(converted(ROWS), model.eval()(ROWS))
    torch.testing.assert_close(converted.train()(ROWS), model(ROWS))
    remove(model)
    assert type(model) is nn.Sequential


def test_checkpointed_activations():
    model = quantized(nn.Sequential(*linears(), nn.ReLU(), nn.Linear(3, 2)), ROWS)
    expected = step(apart(model), ROWS)
    runs = {
        "reentrant": lambda x: checkpoint(model, x, use_reentrant=True),
        "not": lambda x: checkpoint(model, x, use_reentrant=False),
        "segments": lambda x: checkpoint_sequential(model, 3, x, use_reentrant=True),
    }
    for run in runs.values():
        x = ROWS.clone().requires_grad_()
        y = run(x)
        (y * torch.linspace(-1, 2, y.numel()).view(y.shape)).sum().backward()
        found = [y.detach(), x.grad, *(p.grad for p in model.parameters()), *model.buffers()]
        assert_equal([t.clone() for t in found if t is not None], expected)
        model.zero_grad()


def test_a_checkpoint_may_meet_compiled_kernels_when_it_recomputes(monkeypatch):
    monkeypatch.setattr(sequence, "compiled", kernels.compiled)
    x = torch.randn(64, 64, requires_grad=True)
    model = quantized(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)), x)
    kernels.configure(patience=64 * 64 * 7)
    checkpoint(model, x, use_reentrant=False).sum().backward()


def test_gradients_at_the_corners():
    x = torch.tensor([[-1.0, 0.0, 1.0, 6.0, 7.0, 3.3]])
    for kind, (rectify, stops) in RECTIFIERS.items():
        module = kind()
        assert_equal([rectify(x)], [module(x)])
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(module(leaf).sum(), leaf)
        assert torch.equal(grad == 0, stops(x))
        (mine,) = torch.autograd.grad(rectify(leaf).sum(), leaf)
        assert_equal([mine], [grad])


def test_whole_models_compile_without_a_break():
    model = quantized(linears(), ROWS)
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(ROWS), model(ROWS))


def test_a_transform_that_knows_no_quantizers_says_so():
    model = quantized(linears(), ROWS)
    with pytest.raises(UserError, match=r"torch\.func"):
        torch.func.grad(lambda x: model(x).sum())(ROWS)
