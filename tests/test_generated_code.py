"""What compilers make of a training step: the gradient of each view once, and no mask in memory."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.utils import fresh_cache

import qat
from qat import kernels
from qat.grid.spec import QuantSpec
from qat.kernels import dispatch
from qat.kernels.dispatch import Kernel
from qat.quantizers.fixed import forward

WIDTH = 64


class Attention(nn.Module):
    """Queries, keys and values are views of one tensor [2, 32, 3 * WIDTH]."""

    def __init__(self, split: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.split = split

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x * 2)
        return F.scaled_dot_product_attention(q, k, v)


def _heads(x: Tensor) -> Tensor:
    return x.view(*x.shape[:-1], -1, 32).transpose(-3, -2)


def _thirds(x: Tensor) -> Tensor:
    return x.view(*x.shape[:-1], 3, WIDTH)


SPLITS: dict[str, Callable[[Tensor], Any]] = {
    "a permuted view": lambda x: x.view(*x.shape[:2], 3, -1, 32).permute(2, 0, 3, 1, 4),
    "unbind": lambda x: map(_heads, _thirds(x).unbind(-2)),
    "split": lambda x: map(_heads, x.split(WIDTH, -1)),
    "slices": lambda x: [_heads(x[..., i * WIDTH : (i + 1) * WIDTH]) for i in range(3)],
    "rows of a copy": lambda x: map(_heads, _thirds(x).movedim(-2, 0).contiguous()),
}
MASKED: dict[str, dict[str, Any]] = {
    "lsq": {},
    "lsq_plus": {"act": {"bits": 8, "quantizer": "lsq_plus", "signed": True, "symmetric": False}},
    "pact": {"act": {"bits": 8, "quantizer": "pact"}},
    "seq": {"weight": {"bits": None, "format": "ternary", "quantizer": "seq", "granularity": "channel"}},
}
DYNAMIC = ("batch", "length")
each_split = pytest.mark.parametrize("split", [pytest.param(v, id=k) for k, v in SPLITS.items()])


@pytest.fixture(autouse=True)
def products_of_floats():
    before = dict(dispatch._settings)
    kernels.configure("never")
    yield
    dispatch._settings.update(before)


def quantized(model: nn.Module, x: Tensor, settings: dict[str, Any] | None = None) -> nn.Module:
    torch.manual_seed(1)
    default = {"weight": {"bits": 8}, "act": {"bits": 8}, "kinds": ["attention"]}
    qat.quantize(model, default | (settings or {}), x)
    return model.train()


def step(model: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """The output and the gradient of the input."""
    leaf = x.clone().requires_grad_()
    y = model(leaf)
    (y * torch.linspace(-1, 2, y.numel()).view(y.shape)).sum().backward()
    assert leaf.grad is not None
    return [y.detach(), leaf.grad]


@pytest.fixture
def generated(monkeypatch) -> Callable[[nn.Module, Tensor], str]:
    """The loops of a training step of a model, in C++ that nobody compiles."""
    sources: list[str] = []

    def noted(self: AsyncCompile, argtypes: list[str], source: str) -> Callable[..., None]:
        sources.append(source)
        return lambda *args: None

    def trained(model: nn.Module, x: Tensor) -> str:
        torch._dynamo.reset()
        with fresh_cache():  # nobody else is to find what does nothing
            torch.compile(model, fullgraph=True)(x.clone().requires_grad_()).sum().backward()
        torch._dynamo.reset()
        return "".join(sources)

    monkeypatch.setattr(AsyncCompile, "cpp_pybinding", noted)
    return trained


@each_split
def test_gradients_of_views_are_computed_once_each(split, generated):
    x = torch.randn(2, 32, 3 * WIDTH)
    found = generated(quantized(Attention(split), x), x)
    assert len(re.findall(r"= at::vec::minimum\(|= min_propagate_nan\(", found)) == 6  # forward and backward, clipped


@pytest.mark.parametrize("name", MASKED)
def test_no_mask_is_read_twice(name):
    """Inductor writes to memory what two operations read, and masks byte by byte."""
    x = torch.randn(8, WIDTH)
    model = quantized(nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)), x, MASKED[name])
    masks = []

    def look(graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., Any]:
        values = [(node.meta.get("val"), len(node.users)) for node in graph.graph.nodes]
        masks.extend(n for value, n in values if isinstance(value, Tensor) and value.dtype is torch.bool)
        return make_boxed_func(graph)

    backend = aot_autograd(fw_compiler=look, partition_fn=min_cut_rematerialization_partition)
    torch._dynamo.reset()
    step(torch.compile(model, fullgraph=True, backend=backend), x)
    assert masks and set(masks) == {1}


@pytest.mark.parametrize(
    ("split", "dynamic"),
    [
        pytest.param(split, [i % 2], id=f"{name}, any {DYNAMIC[i % 2]}")
        for i, (name, split) in enumerate(SPLITS.items())
    ],
)
def test_gradients_of_views_are_those_of_eager_mode(split, dynamic):
    x = torch.randn(2, 32, 3 * WIDTH)
    model = quantized(Attention(split), x)
    expected = step(model, x)
    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=lambda graph, inputs: make_boxed_func(graph))
    compiled = torch.compile(model, fullgraph=True, backend=backend)

    def marked(x: Tensor) -> Tensor:
        torch._dynamo.mark_dynamic(x, dynamic)
        return compiled(x)

    found = step(marked, x)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])


def test_kernels_clip_in_one_instruction_and_nobody_else_does(monkeypatch):
    sources: list[str] = []
    compile = AsyncCompile.cpp_pybinding

    def noted(self: AsyncCompile, argtypes: list[str], source: str) -> Callable[..., None]:
        sources.append(source)
        return compile(self, argtypes, source)

    monkeypatch.setattr(AsyncCompile, "cpp_pybinding", noted)
    spec = QuantSpec(bits=8).resolved(nonnegative=False, weight=False)
    x = torch.linspace(-2, 2, dispatch.SMALL)
    args = x, torch.ones(1), torch.full((1,), -1.0), torch.full((1,), 1.0)
    with fresh_cache():
        kernels.configure("always")
        Kernel(partial(forward, spec.rounding), 1).large(args)
        ours = "".join(sources)
        sources.clear()
        torch.compile(lambda x, low: x.clamp_min(low))(x, args[2])
    torch._dynamo.reset()
    assert "at::vec::clamp_min(" in ours and "at::vec::clamp_max(" in ours
    assert "::maximum(" not in ours and "propagate_nan" not in ours
    assert "at::vec::maximum(" in "".join(sources)
