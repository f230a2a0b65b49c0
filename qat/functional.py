"""The one place where a tensor becomes codes, and the straight-through gradients of doing so.

Notation: `scale` is the step between neighbouring values and broadcasts against `x`; a *level* is a whole number of steps from
zero, `level = code - zero_point`, so a grid is the levels `low .. high` (`low = quant_min - zero_point`, and alike `high`).

    levels(x) = clip(round_half_even(x / scale), low, high)        value = level * scale

A division, and in float32: inference runtimes divide, and a product with the reciprocal, or bfloat16, gives other codes.
Every gradient is an `autograd.Function` that saves nothing but its input and recomputes the rest, because
`x + (q - x).detach()` leaves clipped values off the grid by a rounding error.
"""

from typing import Any

import torch
from torch import Tensor

SCALE_FLOOR = 1e-8
"""A learned scale acts as at least this, so that no optimizer step can make it zero or negative."""

Bound = int | Tensor


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def levels(x: Tensor, scale: Tensor, low: Bound, high: Bound) -> Tensor:
    """Rounds `x` to whole steps of `scale` and clips them: every code in this project comes from here.

    Returns:
        Integral values in float32 (float64 for float64 input), of the shape of `x`. NaN stays NaN.
    """
    return (_wide(x) / _wide(scale).clamp_min(SCALE_FLOOR)).round_().clamp_(low, high)  # pyright: ignore[reportArgumentType]


def values(level: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The real values of `level` steps of `scale`; the inverse of `levels` on the grid."""
    return (level * _wide(scale).clamp_min(SCALE_FLOOR)).to(dtype)


class RoundSTE(torch.autograd.Function):
    """Fake quantization with a fixed scale; the gradient passes inside the range and is zero where `x` was clipped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: Bound, high: Bound) -> Tensor:
        ctx.save_for_backward(x, scale, *(b for b in (low, high) if isinstance(b, Tensor)))
        ctx.bounds = None if isinstance(low, Tensor) else (low, high)
        return values(levels(x, scale, low, high), scale, x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, *rest = ctx.saved_tensors
        low, high = ctx.bounds or rest
        ratio = _wide(x) / _wide(scale).clamp_min(SCALE_FLOOR)
        return grads[0] * (ratio.ge(low) & ratio.le(high)), None, None, None


class RoundLSQ(torch.autograd.Function):
    """Fake quantization with a learned step size: LSQ (Esser et al., ICLR 2020), sections 2.1 and 2.2.

    With v = x / scale, equation 3 is d value / d scale = low | round(v) - v | high (below, inside, above the range); the sum
    over the elements that share a scale is multiplied by `grad_scale`, the paper's 1 / sqrt(N * quant_max).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: Bound, high: Bound, grad_scale: float) -> Tensor:
        ctx.save_for_backward(x, scale, *(b for b in (low, high) if isinstance(b, Tensor)))
        ctx.bounds = None if isinstance(low, Tensor) else (low, high)
        ctx.grad_scale = grad_scale
        return values(levels(x, scale, low, high), scale, x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, *rest = ctx.saved_tensors
        low, high = ctx.bounds or rest
        ratio = _wide(x) / _wide(scale).clamp_min(SCALE_FLOOR)
        clipped = ratio.clamp(low, high)
        grad = _wide(grads[0])
        grad_x = grad * (clipped == ratio)
        # d/ds = <grad, level> - <grad inside, v>: two products, no third mask.
        partial = grad * clipped.round() - grad_x * clipped
        grad_scale = partial.sum_to_size(scale.shape) * ctx.grad_scale
        return grad_x.to(x.dtype), grad_scale.to(scale.dtype), None, None, None
