"""LSQ+: the offset of an activation's grid is a parameter beside its step size, for activations that are not
one-sided, such as swish and GELU (Bhalgat et al., "LSQ+: Improving low-bit quantization through learnable offsets and
better initialization", CVPR Workshops 2020, arXiv 2004.09576).

With v = (x - offset) / scale and codes n .. p,

    value = clip(round(v), n, p) * scale + offset
    d value / d scale = n | round(v) - v | p       below, inside and above the range
    d value / d offset = 1 outside, 0 inside

Weights keep symmetric grids and start at scale = max(|mean - 3 sd|, |mean + 3 sd|) / 2^(b-1).

Differs from the paper in one way: zero_point = round(-offset / scale), clipped to n .. p, is rounded while training
already, so that every forward pass is what integers compute and zero is always a grid point; the gradients pass this
rounding straight through. Activations start where `spec.range` says (its `mse` is the paper's choice); gradients are
multiplied by LSQ's 1 / sqrt(N p).
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import UserError
from qat.grid import ranges
from qat.grid.formats import Rounding
from qat.grid.functional import SCALE_FLOOR, masks, ratio, sum_to, wide
from qat.grid.spec import QuantSpec
from qat.kernels.gradient import Grads, gradient
from qat.quantizers.fixed import forward
from qat.quantizers.lsq import LSQ


def backward(
    rounding: Rounding,
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    low: Tensor,
    high: Tensor,
    offset: Tensor,
    zero_point: Tensor,
) -> Grads:
    v = ratio(x, scale)
    grad, clipped = wide(grad), v.clamp_min(low).clamp_max_(high)
    inside = masks(v, clipped)
    partial = grad * (rounding(clipped) + torch.where(inside[0], -v, zero_point))  # outside: the code, n or p
    outside = grad.masked_fill(inside[1], 0)
    return (grad * inside[2]).to(x.dtype), sum_to(partial, scale), sum_to(outside, offset), None


class LSQPlus(LSQ):
    """Learned step size and, for activations, learned `offset`, `(1,)`, the value of the code 0; `zero_point` follows
    from both.

    Use it for affine activations at few bits, where one side is short (swish, GELU), on engines that take a zero point.
    """

    def __init__(self, spec: QuantSpec, shape: torch.Size | None = None, axis: int = 0) -> None:
        if shape is None and spec.symmetric:
            raise UserError(
                "quantizer=lsq_plus learns an activation's offset, which a symmetric grid lacks: set symmetric: false"
            )
        if shape is not None and not spec.symmetric:
            raise UserError("symmetric=false with quantizer=lsq_plus: its weights have no offset; set symmetric: true")
        super().__init__(spec, shape, axis)
        if not spec.symmetric:
            self.offset = nn.Parameter(torch.zeros_like(self.scale))
            self.extra = ("offset", "zero_point")
            self.gradient = gradient(forward, backward, spec.rounding)

    def _make_zero_point(self, zero_point: Tensor) -> None:
        """There is nothing to register: no optimizer step can leave a derived zero_point behind."""

    @property
    def zero_point(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        if self.spec.symmetric:
            return torch.zeros_like(self.scale, dtype=torch.int32)
        code = -(self.offset.detach() / self.step()).round()
        return code.clamp(self.quant_min, self.quant_max).to(torch.int32)

    @classmethod
    def heeds(cls, weight: bool) -> Collection[str]:
        return () if weight else super().heeds(weight)

    def _fit(self, rows: Tensor) -> None:
        if not self.spec.symmetric:
            return super()._fit(rows)
        mean, deviation = rows.mean(1), rows.std(1, correction=0)
        reach = torch.maximum((mean - 3 * deviation).abs(), (mean + 3 * deviation).abs())
        if self.quant_min < 0:  # the scale that puts `reach` on the lowest code
            reach = reach * (self.quant_max / -self.quant_min)
        self._set_range(-reach, reach)

    @torch.no_grad()
    def _set_range(self, low: Tensor, high: Tensor) -> None:
        scale, zero_point = ranges.scale_and_zero_point(low, high, self.spec)
        self.scale.copy_(scale.clamp_min(SCALE_FLOOR).view(self.scale.shape))
        if not self.spec.symmetric:
            self.offset.copy_(-zero_point.view(self.scale.shape) * self.step())

    def versions(self) -> tuple[Any, ...]:
        return self.scale._version, self.on, self.scale.data_ptr()  # of a weight, which has no offset
