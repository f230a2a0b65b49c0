"""Compiled kernels: compiled once, never instead of a right answer."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
from small_models import quantized
from torch import nn
from torch._dynamo.utils import counters
from torch._subclasses import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

from qat import kernels
from qat.grid.spec import QuantSpec
from qat.kernels import dispatch
from qat.kernels.gradient import gradient
from qat.quantizers import create

pytestmark = pytest.mark.usefixtures("kernel_settings")


def lsq(bits: int = 8, granularity: str = "tensor", shape: torch.Size | None = None):
    spec = QuantSpec(bits=bits, granularity=granularity, range="minmax")
    quantizer = create(spec.resolved(nonnegative=False, weight=shape is not None), shape)
    quantizer.calibrate(
        torch.linspace(-1, 1, 4096) if shape is None else torch.linspace(-1, 1, shape.numel()).view(shape)
    )
    return quantizer


def train_on(quantizer, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.linspace(-1.2, 1.2, torch.Size(shape).numel()).view(shape).requires_grad_()
    quantizer.scale.grad = None
    y = quantizer(x)
    y.square().sum().backward()
    return y.detach(), quantizer.scale.grad.clone()


def test_other_sizes_bits_flags_and_epochs_compile_nothing_new():
    kernels.configure("always")
    quantizer = lsq()
    for shape in ((32, 4096), (48, 4099)):
        train_on(quantizer, *shape)
    compiled = counters["stats"]["unique_graphs"]
    for batch in (7, 8, 64):
        train_on(quantizer, batch, 3, 64, 65)
    train_on(lsq(bits=4), 16, 5000)
    quantizer.enable(False)
    train_on(lsq(bits=2), 17, 5000)
    quantizer.enable()
    quantizer.train(False)
    train_on(quantizer, 19, 5000)
    assert counters["stats"]["unique_graphs"] == compiled


def test_channels_last_and_channels_give_the_same_as_plain_torch(monkeypatch):
    monkeypatch.setattr(dispatch, "SMALL", 0)
    weight = lsq(granularity="channel", shape=torch.Size((8, 4, 3, 3)))
    x = torch.randn(8, 4, 3, 3)
    results = {}
    for mode in ("never", "always"):
        kernels.configure(mode)
        for layout in (torch.contiguous_format, torch.channels_last):
            leaf = x.clone(memory_format=layout).requires_grad_()
            weight.scale.grad = None
            y = weight(leaf)
            y.square().sum().backward()
            assert y.stride() == leaf.stride()
            results[mode, layout] = y.detach(), leaf.grad, weight.scale.grad
    expected = results["never", torch.contiguous_format]
    for found in results.values():
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
        torch.testing.assert_close(found[2], expected[2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_program_made_for_equal_sizes_serves_unequal_ones(dtype, monkeypatch):
    monkeypatch.setattr(dispatch, "SMALL", 0)
    for rows, columns in ((8, 8), (8, 12), (12, 8), (8, 1), (2, 1000)):
        weight, x = lsq(granularity="channel", shape=torch.Size((rows, columns))), torch.randn(rows, columns)
        found = []
        for mode in ("always", "never"):
            kernels.configure(mode)
            leaf = x.to(dtype, copy=True).requires_grad_()
            weight.scale.grad = None
            weight(leaf).square().sum().backward()
            found.append((leaf.grad, weight.scale.grad))
        assert torch.equal(found[0][0], found[1][0])
        torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "axis", "group_size", "of_x"),
    [
        ((6, 16, 5, 3), 1, None, torch.contiguous_format),
        ((16, 12, 3, 5), 1, None, torch.channels_last),
        ((6, 12, 3, 5), 0, 4, torch.contiguous_format),
        ((24, 16), 1, None, torch.contiguous_format),
        ((24, 16), 1, 8, torch.contiguous_format),
    ],
    ids=str,
)
def test_scales_may_lie_across_memory(shape, axis, group_size, of_x, monkeypatch):
    monkeypatch.setattr(dispatch, "SMALL", 0)
    spec = QuantSpec(bits=4, granularity="group" if group_size else "channel", group_size=group_size, range="minmax")
    weight = create(spec.resolved(nonnegative=False, weight=True), torch.Size(shape), axis)
    x = torch.randn(shape).to(memory_format=of_x)
    weight.calibrate(x)
    for part in (weight.gradient.forward, weight.gradient.backward):
        monkeypatch.setattr(part, "_launches", {})
    found = {}
    for mode in ("never", "always"):
        kernels.configure(mode)
        leaf = x.clone().requires_grad_()
        weight.scale.grad = None
        y = weight(leaf)
        (y * torch.arange(x.numel()).view(shape).sin()).sum().backward()
        found[mode] = y.detach(), leaf.grad, weight.scale.grad
    assert all(weight.gradient.forward._launches.values()) and all(weight.gradient.backward._launches.values())
    assert torch.equal(found["always"][0], found["never"][0]) and torch.equal(found["always"][1], found["never"][1])
    torch.testing.assert_close(found["always"][2], found["never"][2], rtol=1e-5, atol=1e-5)


def test_modes_that_see_each_operation_see_those_of_a_quantizer():
    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    kernels.configure("always")
    quantizer, seen = lsq(), []
    expected = train_on(quantizer, 32, 4096)
    with Names():
        found = train_on(quantizer, 32, 4096)
    assert torch.equal(found[0], expected[0]) and seen.count("round_") == 2
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert quantizer(torch.randn(32, 4096)).shape == (32, 4096)


def test_a_second_derivative_goes_through_operations_that_torch_can_differentiate(monkeypatch):
    quantizer, x = lsq(), torch.linspace(-0.9, 0.9, 4096).requires_grad_()
    with monkeypatch.context() as patch:
        patch.setattr(quantizer.gradient.backward, "large", lambda *_: pytest.fail("that may be compiled"))
        (first,) = torch.autograd.grad(quantizer(x).square().sum(), x, create_graph=True)
    first.sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 2.0))  # the square's; a rounding's own is that of x itself


def test_without_a_compiler_it_warns_once_and_computes_the_same(monkeypatch):
    monkeypatch.setattr(dispatch, "SMALL", 0)
    kernels.configure("never")
    expected = train_on(lsq(), 32, 256)

    def no_compiler(*args, **kwargs):
        raise RuntimeError("no C++ compiler was found")

    monkeypatch.setattr(torch, "compile", no_compiler)
    gradient.cache_clear()  # kernels that are compiled already would not ask again
    kernels.configure("always")
    quantizer = lsq()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = [train_on(quantizer, 32, 256) for _ in range(2)]
    assert [str(w.message) for w in caught if "uncompiled" in str(w.message)] == [
        "quantizers run uncompiled, several times slower: torch.compile failed (no C++ compiler was found)"
    ]
    for y, grad in found:
        assert torch.equal(y, expected[0]) and torch.equal(grad, expected[1])


@pytest.mark.parametrize("stance", ["force_eager", "fail_on_recompile"])
def test_a_stance_toward_compiled_code_is_about_the_user_s(stance):
    gradient.cache_clear()
    kernels.configure("always")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="quantizers run uncompiled")
        with torch.compiler.set_stance(stance):
            train_on(lsq(), 32, 4096)
    assert len(gradient(*lsq().gradient.parts).forward._programs) == 1


def test_short_runs_never_compile(monkeypatch):
    monkeypatch.setattr(dispatch, "SMALL", 0)
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: pytest.fail("compiled before its patience ran out"))
    gradient.cache_clear()
    kernels.configure("auto", patience=10**9)
    train_on(lsq(), 32, 256)


def test_what_passes_on_another_device_is_no_reason_to_compile(monkeypatch):
    gradient.cache_clear()
    kernels.configure("auto", patience=10**6)
    grid = torch.ones(1), torch.tensor([-8.0]), torch.tensor([7.0])
    lsq().gradient(torch.empty(10**7, device="meta"), *(t.to("meta") for t in grid))
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: pytest.fail("compiled before its patience ran out"))
    lsq().gradient(torch.randn(32, 4096), *grid)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_a_shape_that_was_met_before_may_come_with_other_strides_and_types(granularity):
    shape = torch.Size((8, 16, 32, 8))
    quantizer, plain = (lsq(4, granularity, shape if granularity == "channel" else None) for _ in range(2))
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for of_x in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(shape).to(dtype=dtype, memory_format=of_x)
            grad = torch.randn(shape).to(dtype)
            for g in (grad, grad.to(memory_format=torch.channels_last), grad[:1, :1, :1, :1].expand(shape)):
                found = []
                for mode, q in (("always", quantizer), ("never", plain)):
                    kernels.configure(mode)
                    leaf = x.clone().requires_grad_()
                    q.scale.grad = None
                    y = q(leaf)
                    y.backward(g)
                    found.append((y.detach(), leaf.grad, q.scale.grad))
                assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
                assert found[0][0].stride() == x.stride()
                torch.testing.assert_close(found[0][2], found[1][2], rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("scale", ["strided", "expanded", "of another type"])
def test_parameters_may_lie_in_memory_as_they_like(scale):
    """Programs read parameters side by side, and only tensors that have memory of their own."""
    x = torch.randn(64, 512)
    quantizer = lsq(4, "channel", x.shape)
    grid = quantizer.grid(x)
    kernels.configure("always")
    quantizer.gradient(x, *grid)
    numbers = grid[0].detach()
    other = {
        "strided": torch.stack([numbers, numbers * 3], 1)[:, 0],
        "expanded": numbers[:1].expand(64, 1),
        "of another type": TwoTensor(numbers, numbers),
    }[scale]
    found = quantizer.gradient(x, other, *grid[1:])
    kernels.configure("never")
    expected = quantizer.gradient(x, other, *grid[1:])
    assert type(found) is type(expected)
    assert torch.equal(*(y.a if isinstance(y, TwoTensor) else y for y in (found, expected)))


def test_a_tensor_without_values_turns_nothing_off():
    kernels.configure("always")
    grid = (torch.ones(1, device="meta") for _ in range(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lsq().gradient(torch.empty(1 << 16, device="meta"), *grid)
    assert dispatch._settings["patience"] == 0


def test_a_negated_view_is_read_as_what_it_stands_for():
    kernels.configure("always")
    quantizer, x = lsq(4), torch.randn(1 << 16)
    expected = quantizer(-x)
    assert torch.equal(quantizer(torch._neg_view(x)), expected)


SECOND_PROCESS = """
import torch
from torch._dynamo.utils import counters
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from qat import kernels
from qat.quantizers import create
from qat.grid.spec import QuantSpec
kernels.configure("always")
quantizer = create(QuantSpec(bits=8, range="minmax").resolved(nonnegative=False, weight=False))
x = torch.linspace(-1, 1, 1 << 17, requires_grad=True)
quantizer.calibrate(x.detach())
quantizer(x).sum().backward()
print(counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"])
"""


def test_a_second_process_finds_the_kernels_compiled(tmp_path):
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    found = []
    for _ in range(2):
        run = subprocess.run([sys.executable, "-c", SECOND_PROCESS], capture_output=True, text=True, env=environment)
        assert run.returncode == 0, run.stderr
        found.append(run.stdout.split())
    assert found == [["0", "2"], ["2", "0"]]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)  # whose codes are multiplied

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(x)


@pytest.mark.parametrize("bits", [5, 6])  # kernels that no other test has made
def test_a_kernel_first_met_inside_a_layer_is_compiled_and_nobody_follows_it(bits):
    """Where torch functions are off, which compilers need, and a mode looks for sites."""
    model, x = Residual(), torch.linspace(-1, 1, 81_920).view(-1, 64)
    quantized(model, x, {"weight": {"bits": 4}, "act": {"bits": bits, "format": "int", "signed": True}})
    model.train()
    results = {}
    for mode in ("always", "never"):
        kernels.configure(mode)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            model.zero_grad()
            y = model(x)
            y.square().sum().backward()
        results[mode] = y.detach()
    torch.testing.assert_close(results["always"], results["never"], rtol=0, atol=1e-5)
