"""Small models for the tests of conversion and export, and the way from a float model to its fake-quantized and
integer forms."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qat
from qat.convert import convert
from qat.export.onnx.runtime import saturates
from qat.planning.plan import Plan

exact_where_shared = pytest.mark.skipif(
    saturates(),
    reason="without VNNI, onnxruntime refuses to be exact where several layers read one int8 weight",
)
POLICY: dict[str, Any] = {"weight": {"bits": 4, "granularity": "channel"}, "act": {"bits": 8}}


def quantized(model: nn.Module, x: Tensor, policy: dict[str, Any] | None = None) -> Plan:
    """Inserts quantizers into `model` and calibrates them on `x`; the model is in evaluation mode afterwards."""
    return qat.quantize(model.eval(), POLICY if policy is None else policy, lambda: model(x))


def both(model: nn.Module, x: Tensor, policy: dict[str, Any] | None = None) -> tuple[nn.Module, nn.Module]:
    """The fake-quantized model and the converted one."""
    plan = quantized(model, x, policy)
    return model, convert(model, plan)


@torch.no_grad()
def lived(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives BatchNorms statistics and parameters that training could have left, negative gammas among them."""
    generator = torch.Generator().manual_seed(seed)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            shape = (norm.num_features,)
            norm.running_mean = torch.randn(shape, generator=generator) * 0.3
            norm.running_var = torch.rand(shape, generator=generator) + 0.3
            if norm.affine:
                norm.weight.copy_(torch.randn(shape, generator=generator))
                norm.bias.copy_(torch.randn(shape, generator=generator) * 0.3)
    return model.eval()


@dataclass(frozen=True)
class Shape:
    """One drawn architecture; every field is a free choice."""

    kind: str = "conv"  # conv, depthwise, strided, linear
    norm: bool = True
    activation: str = "relu"  # relu, relu6, none
    residual: bool = True
    max_pool: bool = False
    pool: str = "module"  # module, functional, mean
    bias: bool = False


class Drawn(nn.Module):
    """A stem, one block of the drawn kind, a pool and a head; `linear` is an MLP of the same form."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape, c, image = shape, 8, shape.kind != "linear"
        norm = (nn.BatchNorm2d if image else nn.BatchNorm1d) if shape.norm else (lambda _: nn.Identity())
        if image:
            groups, stride = (c if shape.kind == "depthwise" else 1), (2 if shape.kind == "strided" else 1)
            self.stem: nn.Module = nn.Conv2d(3, c, 3, padding=1, bias=shape.bias)
            self.body: nn.Module = nn.Conv2d(c, c, 3, stride, 1, groups=groups, bias=shape.bias)
            self.down: nn.Module = nn.Conv2d(c, c, 1, 2, bias=shape.bias) if stride == 2 else nn.Identity()
        else:
            self.stem, self.body = nn.Linear(12, c, bias=shape.bias), nn.Linear(c, c, bias=shape.bias)
            self.down = nn.Identity()
        self.norm1, self.norm2 = norm(c), norm(c)
        self.act = {"relu": nn.ReLU(), "relu6": nn.ReLU6(), "none": nn.Identity()}[shape.activation]
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(c, 5)

    def example(self, batch: int, seed: int = 0) -> Tensor:
        size = (batch, 12) if self.shape.kind == "linear" else (batch, 3, 8, 8)
        return torch.randn(size, generator=torch.Generator().manual_seed(seed))

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm1(self.stem(x)))
        if self.shape.max_pool and x.ndim == 4:
            x = F.max_pool2d(x, 2)
        y = self.norm2(self.body(x))
        x = self.act(y + self.down(x) if self.shape.residual else y)
        if x.ndim == 4:
            if self.shape.pool == "mean":
                x = x.mean((2, 3))
            else:
                x = self.pool(x) if self.shape.pool == "module" else F.adaptive_avg_pool2d(x, 1)
                x = x.flatten(1)
        return self.head(x)
