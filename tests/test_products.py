"""Training multiplies codes where it pays, and gets what multiplying fake-quantized floats gets."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd.graph import saved_tensors_hooks

import qat
from qat import kernels
from qat.errors import UserError
from qat.insert import named_quantizers
from qat.kernels import dispatch, onednn
from qat.kernels.recipes import Recipe
from qat.layers import products_evaluation, products_training
from qat.quantizers.lsq import LSQ

pytestmark = pytest.mark.skipif(not onednn.exact(), reason="needs a processor with VNNI and torch with oneDNN")


@pytest.fixture(autouse=True)
def codes_always_pay(monkeypatch):
    before = dict(dispatch._settings)
    monkeypatch.setattr(dispatch, "SMALL", 0)
    monkeypatch.setattr("qat.kernels.gradient.SAVED", 0)
    monkeypatch.setattr("qat.layers.base.MIN_ELEMENTS", 0)
    monkeypatch.setattr(products_training, "MIN_POSITIONS", 0)
    monkeypatch.setattr(products_training, "MIN_TERMS", 0)
    monkeypatch.setattr(products_evaluation, "MIN_PRODUCTS", {"linear": 0, "conv2d": 0})
    yield
    dispatch._settings.update(before)


@pytest.fixture
def used(monkeypatch) -> list[str]:
    """The products that ran on codes."""
    found, multiply = [], onednn.multiply

    def noted(geometry, *args):
        found.append("conv2d" if geometry else "linear")
        return multiply(geometry, *args)

    monkeypatch.setattr(onednn, "multiply", noted)
    return found


def quantized(model: nn.Module, x: torch.Tensor, weight: dict | None = None, act: dict | None = None) -> nn.Module:
    torch.manual_seed(1)
    policy = {"weight": {"bits": 8, "granularity": "channel", **(weight or {})}, "act": {"bits": 8, **(act or {})}}
    qat.quantize(model, policy, x)
    return model.train()


def step(model: nn.Module, x: torch.Tensor, mode: kernels.Mode = "auto") -> list[torch.Tensor]:
    """The output, and the gradients of the input and of every parameter."""
    kernels.configure(mode)
    model.zero_grad()
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = model(leaf)
    (y * torch.linspace(-1, 2, y.numel()).view(y.shape)).sum().backward()
    assert leaf.grad is not None
    return [y.detach(), leaf.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """Equal but for the rounding errors of sums in float32."""
    for a, b in zip(found, expected, strict=True):
        assert a.stride() == b.stride()
        torch.testing.assert_close(a, b, rtol=1e-5, atol=5e-6 * b.abs().max().item())


LAYERS = {
    "linear": (lambda: nn.Linear(24, 10), (6, 24)),
    "linear without bias": (lambda: nn.Linear(24, 10, bias=False), (6, 24)),
    "linear of sequences": (lambda: nn.Linear(24, 10), (3, 5, 24)),
    "conv": (lambda: nn.Conv2d(6, 8, 3, padding=1), (2, 6, 7, 9)),
    "conv without bias": (lambda: nn.Conv2d(3, 8, 1, bias=False), (2, 3, 5, 5)),
    "conv, strided and dilated": (lambda: nn.Conv2d(6, 8, 3, 2, 4, 2), (2, 6, 11, 12)),
    "conv, uneven": (lambda: nn.Conv2d(4, 8, (1, 3), (2, 1), (0, 2)), (2, 4, 8, 7)),
    "conv in groups": (lambda: nn.Conv2d(8, 8, 3, padding=1, groups=4), (2, 8, 6, 6)),
    "depthwise conv": (lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8), (2, 8, 6, 6)),
}
each_layer = pytest.mark.parametrize(("make", "shape"), [pytest.param(*v, id=k) for k, v in LAYERS.items()])
GRIDS = {
    "8 bits": ({}, {}),
    "affine input": ({}, {"symmetric": False}),
    "one scale": ({"granularity": "tensor"}, {}),
    "4 bits": ({"bits": 4}, {"bits": 4}),
    "2 bits, unsigned": ({"bits": 2}, {"bits": 2, "signed": False}),
    "ternary": ({"format": "ternary", "bits": None}, {"bits": 3}),
    "binary": ({"format": "binary", "bits": None}, {"bits": 3}),
    "powers of two": ({"scale": "pow2"}, {"scale": "pow2"}),
    "moving ranges": ({"quantizer": "minmax"}, {"quantizer": "minmax"}),
    "pact and dorefa": ({"quantizer": "dorefa", "format": "midrise", "bits": 3}, {"quantizer": "pact", "bits": 4}),
    "learned offset": ({}, {"quantizer": "lsq_plus", "symmetric": False}),
    "stretched elastic": ({"quantizer": "seq", "format": "midrise", "bits": 2}, {}),
}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels last"])
def test_backward_makes_the_input_of_its_codes(grid, layout, monkeypatch):
    made = []

    def again(self: Recipe) -> torch.Tensor:
        if self.decoded is not None:
            made.append((self.decoded(), self.gradient.forward.large(self.tensors)))
        return original(self)

    original = Recipe.again
    monkeypatch.setattr(Recipe, "again", again)
    x = (torch.randn(2, 6, 7, 9) * 3).to(memory_format=layout)
    step(quantized(nn.Conv2d(6, 8, 3), x, *GRIDS[grid]), x)
    [(found, expected)] = made
    assert torch.equal(found, expected) and found.stride() == expected.stride()


@each_layer
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels last"])
def test_a_step_on_codes_is_the_float_one(make, shape, layout, used):
    x = torch.randn(shape)
    if len(shape) == 4:
        x = x.contiguous(memory_format=layout)
    model = quantized(nn.Sequential(make()), x)
    expected = step(model, x, "never")
    assert not used
    assert_same(step(model, x), expected)
    assert used


@pytest.mark.parametrize(("weight", "act"), [pytest.param(*v, id=k) for k, v in GRIDS.items()])
@pytest.mark.parametrize("layer", ["linear of sequences", "conv"])
def test_every_grid_of_at_most_256_codes_has_a_product(layer, weight, act, used):
    make, shape = LAYERS[layer]
    x = torch.randn(shape)
    model = quantized(nn.Sequential(make()), x, weight, act)
    twin = copy.deepcopy(model)
    expected = step(model, x, "never")
    assert_same(step(twin, x), expected)
    assert used


@pytest.mark.parametrize("mode", ["auto", "always"])
def test_sums_of_codes_are_exact(mode):
    x = torch.randn(64, 512)
    model = quantized(nn.Sequential(nn.Linear(512, 16)), x)
    kernels.configure(mode)
    layer = model[0]
    grid, weights = layer.input_quantizer, layer.weight_quantizer
    levels = grid.levels(x).double() @ weights.levels(layer.weight).double().T
    exact = levels * grid.scale.double() * weights.scale.double() + layer.bias.double()
    ulp = torch.finfo(torch.float32).eps
    assert ((model(x) - exact).abs() <= 2 * ulp * exact.abs().clamp_min(levels.abs().max() * ulp)).all()


NO_CODES = {
    "dynamic": ({}, {"quantizer": "dynamic", "granularity": "token"}),
    "learned thresholds": ({}, {"quantizer": "n2uq", "bits": 4}),
    "groups": ({"granularity": "group", "group_size": 8}, {}),
    "16 bits": ({}, {"bits": 16}),
    "affine weight": ({"symmetric": False}, {}),
    "fp8": ({"format": "e4m3", "bits": None}, {}),
    "weights alone": ({}, "off"),
}


@pytest.mark.parametrize(("weight", "act"), [pytest.param(*v, id=k) for k, v in NO_CODES.items()])
def test_other_grids_multiply_floats(weight, act, used):
    x = torch.randn(4, 24)
    policy = {
        "weight": {"bits": 8, "granularity": "channel", **weight},
        "act": act if act == "off" else {"bits": 8, **act},
    }
    model = nn.Sequential(nn.Linear(24, 10))
    qat.quantize(model, policy, x)
    model.train()(x).sum().backward()
    assert not used


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(("terms", "codes"), [(66_311, True), (66_313, False)])
def test_codes_are_multiplied_only_where_int32_holds_every_sum(terms, codes, training, used):
    layer, x = nn.Linear(terms, 2, bias=False), torch.ones(2, terms)
    nn.init.ones_(layer.weight)
    model = quantized(nn.Sequential(layer), x, act={"signed": False, "range": "minmax"}).train(training)
    with torch.set_grad_enabled(training):
        y = model(x)
    torch.testing.assert_close(y, torch.full((2, 2), float(terms)), rtol=1e-2, atol=0)
    assert bool(used) == codes


class Standardized(nn.Conv2d):
    """A convolution that changes its weight in a method of torch's."""

    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight - weight.mean(), bias)


@pytest.mark.parametrize(
    "layer",
    [
        pytest.param(Standardized(4, 6, 3), id="a subclass with an arithmetic of its own"),
        pytest.param(nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), id="padded with values"),
        pytest.param(nn.Conv2d(4, 6, 3, padding="same"), id="padding=same"),
        pytest.param(nn.ConvTranspose2d(4, 6, 3), id="transposed"),
    ],
)
def test_other_arithmetic_stays_as_it_is(layer, used):
    x = torch.randn(2, 4, 6, 6)
    quantized(nn.Sequential(layer), x)(x).sum().backward()
    assert not used


def test_autocast_foreign_hooks_and_gradients_in_evaluation_multiply_floats(used):
    x = torch.randn(4, 24)
    model = quantized(nn.Sequential(nn.Linear(24, 10)), x)
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
    with saved_tensors_hooks(lambda t: t, lambda t: t):
        model(x)
    model.eval()(x)
    assert not used


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_who_looks_at_a_quantizer_sees_values(training):
    x = torch.randn(4, 24)
    model = quantized(nn.Sequential(nn.Linear(24, 10)), x).train(training)
    seen = {}
    for name, quantizer in named_quantizers(model):
        quantizer.register_forward_hook(lambda m, args, y, name=name: seen.update({name: (m, args[0], y)}))
    with torch.set_grad_enabled(training):
        model(x)
    assert len(seen) == 2
    for quantizer, value, y in seen.values():
        scale = quantizer.step()
        assert torch.equal(y, quantizer.levels(value) * (scale[:, None] if quantizer.is_weight else scale))


@pytest.mark.parametrize("of", ["its class", "its own"])
def test_a_quantizer_with_another_forward_is_not_second_guessed(of, used):
    class Between(LSQ):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x + super().forward(x)) / 2

    x = torch.randn(4, 24)
    model = quantized(nn.Sequential(nn.Linear(24, 10)), x)
    grid = model[0].input_quantizer
    if of == "its class":
        grid.__class__ = Between
    else:
        plain = grid.forward
        grid.__dict__["forward"] = lambda x: (x + plain(x)) / 2
    expected = step(model, x, "never")
    assert_same(step(model, x), expected)
    with torch.no_grad():
        model.eval()(x)
    assert not used


def test_a_quantizer_that_goes_on_computing_is_made_again(used, monkeypatch):
    x = torch.randn(4, 24)
    model = quantized(nn.Sequential(nn.Linear(24, 10)), x)
    grid = model[0].input_quantizer
    inner = type(grid).fake_quantize
    monkeypatch.setattr(grid, "fake_quantize", lambda *args: inner(grid, *args) * 1.0)
    expected = step(model, x, "never")
    assert_same(step(model, x), expected)
    assert used


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("of", ["input", "weight"])
@pytest.mark.parametrize("hook", [lambda m, args, y: 2 * y, lambda m, args, y: y.mul_(2)], ids=["new", "in place"])
def test_what_hooks_make_of_a_quantized_tensor_is_multiplied(hook, of, training):
    x = torch.randn(4, 24)
    model = quantized(nn.Sequential(nn.Linear(24, 10)), x)
    plain = [*step(model, x, "never")[:1], model[0].bias.detach()]
    getattr(model[0], f"{of}_quantizer").register_forward_hook(hook)
    kernels.configure()
    with torch.set_grad_enabled(training):
        y = model.train(training)(x)
    bias = model[0].bias.detach()
    torch.testing.assert_close(y.detach() - bias, 2 * (plain[0] - bias), atol=0.01, rtol=0.01)


def test_another_thread_gets_values(monkeypatch):
    x = torch.randn(4, 24)
    model = quantized(nn.Sequential(nn.Linear(24, 10)), x)
    grid, seen = model[0].input_quantizer, []
    expected = grid(x).detach()
    inner = type(grid).fake_quantize

    def meanwhile(*args: torch.Tensor) -> torch.Tensor:
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=lambda: seen.append(grid(x).detach()))
            thread.start()
            thread.join()
        return inner(grid, *args)

    monkeypatch.setattr(grid, "fake_quantize", meanwhile)
    monkeypatch.setattr(torch, "empty_like", lambda x: torch.full_like(x, float("nan")))  # unwritten, for all to see
    model(x)
    assert torch.equal(seen[0], expected)


@pytest.mark.parametrize("mode", ["auto", "always"])  # "auto": plain torch, for as few elements
@pytest.mark.parametrize("where", ["input", "weight"])
def test_nan_stays_nan(where, mode):
    kernels.configure(mode)
    x = torch.randn(2, 6, 5, 5)
    model = quantized(nn.Sequential(nn.Conv2d(6, 8, 3)), x)
    with torch.no_grad():
        (x if where == "input" else model[0].weight).view(-1)[0] = float("nan")
    assert model(x).isnan().all()
    with torch.no_grad():
        assert model.eval()(x).isnan().all()
    if mode == "always":
        found = torch.compile(model.train(), fullgraph=True)(x)
        assert found.isnan().any()  # all of it, where it runs on codes


def test_transforms_of_functions_are_refused_in_words():
    x = torch.randn(3, 4, 24)
    model = quantized(nn.Sequential(nn.Linear(24, 10)), x).eval()
    with torch.no_grad(), pytest.raises(UserError, match=r"torch\.func"):
        torch.func.vmap(model)(x)


def test_infinity_is_clipped_as_ever():
    x = torch.randn(4, 24)
    model = quantized(nn.Sequential(nn.Linear(24, 10)), x)
    x[0, 0], x[1, 1] = float("inf"), -float("inf")
    kernels.configure("never")
    expected = model(x)
    kernels.configure("auto")
    torch.testing.assert_close(model(x), expected)


def test_shared_inputs_are_written_once_and_read_as_codes(used):
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(6, 6, 3, padding=1)

        def forward(self, x):
            x = torch.relu(x)
            return x + self.conv(x)

    x = torch.randn(2, 6, 5, 5)
    model = quantized(Residual(), x)
    expected = step(model, x, "never")
    assert_same(step(model, x), expected)
    assert used == ["conv2d"]


def test_second_derivatives_go_through(used):
    x = torch.randn(4, 6, 5, 5)
    model = quantized(nn.Sequential(nn.Conv2d(6, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(72, 3)), x)

    def penalty(mode: kernels.Mode) -> list[torch.Tensor]:
        kernels.configure(mode)
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(model(leaf).square().sum(), leaf, create_graph=True)
        return list(torch.autograd.grad(grad.square().sum(), [model[0].weight, model[3].weight]))

    expected = penalty("never")
    assert_same(penalty("auto"), expected)
    assert used


@each_layer
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels last"])
def test_evaluation_on_codes_is_the_float_one_and_packs_once(make, shape, layout, used, monkeypatch):
    x = torch.randn(shape)
    if len(shape) == 4:
        x = x.contiguous(memory_format=layout)
    model = quantized(nn.Sequential(make()), x, {}, {"symmetric": False}).eval()
    packed, pack = [], onednn.pack
    monkeypatch.setattr(onednn, "pack", lambda *args: (packed.append(1), pack(*args))[1])
    for _ in range(2):
        for change in ("nothing", "weight", "grid", "zero point"):
            with torch.no_grad():
                if change == "weight":
                    model[0].weight.mul_(0.9)
                elif change == "grid":
                    model[0].input_quantizer.scale.mul_(1.1)
                elif change == "zero point":
                    model[0].input_quantizer.zero_point.add_(1)
                kernels.configure("never")
                expected = model(x)
                assert not used
                kernels.configure("auto")
                for _ in range(3):
                    found = model(x)
            assert found.stride() == expected.stride() and len(used) == 3
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=5e-6 * expected.abs().max().item())
            used.clear()
    assert len(packed) == 7  # the second time, nothing is the only thing that changes nothing


@pytest.mark.parametrize("first", [(8, 16, 12, 12), (1, 16, 5, 7)], ids=["large", "small"])
def test_a_weight_packed_for_one_shape_serves_all(first, used):
    model = quantized(nn.Sequential(nn.Conv2d(16, 32, 3, padding=1)), torch.randn(first)).eval()
    for shape in (first, (1, 16, 1, 1), (3, 16, 17, 9), (16, 16, 8, 8)):
        x = torch.randn(shape)
        with torch.no_grad():
            kernels.configure("never")
            expected = model(x)
            kernels.configure("auto")
            torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=5e-6 * expected.abs().max().item())
    assert len(used) == 4


def test_evaluation_passes_several_grids_and_keeps_nan(used):
    x = torch.randn(4, 24)
    model = quantized(nn.Sequential(nn.Linear(24, 10)), x, {"bits": 4}, {"bits": 4}).eval()
    finer = copy.deepcopy(model[0].input_quantizer)
    finer.change_bits(8)
    model[0].input_quantizer = nn.Sequential(finer, model[0].input_quantizer)
    with torch.inference_mode():
        found = model(x)
        kernels.configure("never")
        torch.testing.assert_close(found, model(x))
        assert used
        kernels.configure("auto")
        x[0, 0] = float("nan")
        assert model(x).isnan().all()


@pytest.mark.slow
def test_compiled_steps_are_the_same_and_compile_once():
    x = torch.randn(4, 6, 8, 8)
    model = quantized(nn.Sequential(nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)), x)
    expected = step(model, x, "never")
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    kernels.configure("auto")
    graphs = []
    for _ in range(3):
        assert_same(step(compiled, x), expected)
        graphs.append(counter.frame_count)
    assert graphs == [1, 1, 1]
    ops = [str(node.target) for graph in counter.graphs for node in graph.graph.nodes]
    assert any("autograd_function_apply" in op for op in ops)


def test_compiled_steps_round_once():
    """Compilers drop what is computed twice, but not codes that are computed from rounded values again."""
    x = torch.randn(4, 24)
    model = quantized(nn.Sequential(nn.Linear(24, 10)), x, act={"bits": 4})
    finer = copy.deepcopy(model[0].input_quantizer)
    finer.change_bits(8)
    several = copy.deepcopy(model)
    several[0].input_quantizer = nn.Sequential(finer, several[0].input_quantizer)
    assert _roundings(model, x) == [2, 2]
    assert _roundings(several, x) == [3, 3]


def _roundings(model: nn.Module, x: torch.Tensor) -> list[int]:
    """How often a compiled step rounds, forward and backward."""
    counts = []

    def count(graph: torch.fx.GraphModule, example_inputs: list[torch.Tensor]) -> Callable[..., Any]:
        counts.append(sum(node.target is torch.ops.aten.round.default for node in graph.graph.nodes))
        return make_boxed_func(graph)

    backend = aot_autograd(fw_compiler=count, partition_fn=min_cut_rematerialization_partition)
    kernels.configure("auto")
    torch.compile(model, fullgraph=True, backend=backend)(x.requires_grad_()).sum().backward()
    return counts
