"""The one place where a tensor becomes codes.

Notation: `scale` is the unit of a grid and broadcasts against `x`; a *level* is a value in that unit, for integer grids
a whole number of steps from zero, `level = code - zero_point`, between `low = quant_min - zero_point` and `high` alike.

    levels(x) = round_half_even(clip(x / scale, low, high))        value = level * scale

A division, and in float32: inference runtimes divide, and a product with the reciprocal, or bfloat16, gives other
codes. They clip after rounding, which is the same for limits on the grid, and costs the gradient a second clip. Scales
come in float32 or wider and with at least one axis, so the ratio is as wide.
"""

import torch
from torch import Tensor

from qat.grid.formats import Rounding, round_int

SCALE_FLOOR = 1e-8
"""The smallest scale that calibration sets."""
TINY = 2.0**-126
"""The smallest normal float32. A learned scale acts as at least this, so that no optimizer step can make it zero or
negative: below it, division is neither exact nor the same everywhere."""


def wide(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 if it is."""
    return x if x.dtype == torch.float64 else x.float()


def positive(scale: Tensor) -> Tensor:
    """The scale that acts: at least `TINY`."""
    return scale.clamp_min(2.0**-126)  # written out: compiling for all shapes, torch takes a global float for an input


def ratio(x: Tensor, scale: Tensor) -> Tensor:
    """`x` in units of its scale, in a tensor of its own."""
    return x / positive(scale)


def over(x: Tensor, number: float) -> Tensor:
    """`x / number`, everywhere the same: for a number of Python's, GPUs multiply by its reciprocal."""
    return x / torch.full((), number, dtype=x.dtype, device=x.device)


def levels(x: Tensor, scale: Tensor, low: Tensor, high: Tensor, rounding: Rounding = round_int) -> Tensor:
    """Rounds `x` to the grid: every code in this project comes from here.

    Returns:
        Levels in float32 (float64 for float64 input), of the shape of `x`. NaN stays NaN.
    """
    # Not clamp(low, high), which torch runs several times slower on tensors than its two halves.
    return rounding((x / positive(scale)).clamp_min_(low).clamp_max_(high))


def fake_quantized(x: Tensor, scale: Tensor, low: float, high: float, rounding: Rounding) -> Tensor:
    """`values(levels(x))` for limits that are numbers, which torch clips to in one operation instead of two."""
    scale = positive(scale)
    return narrowed(rounding((x / scale).clamp_(low, high)).mul_(scale), x.dtype)


def narrowed(value: Tensor, dtype: torch.dtype) -> Tensor:
    """`value`, a tensor of nobody else's, in another type: what is on a grid stays finite where its outermost level is
    more than float16 can hold.
    """
    return (value.clamp_(-65504.0, 65504.0) if dtype is torch.float16 else value).to(dtype)


def values(level: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The real values of `level` units of `scale`; the inverse of `levels` on the grid."""
    return narrowed(level * positive(scale), dtype)


def dither(x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Moves values within the grid by up to half a step at random: rounding to nearest then rounds stochastically.

    On average `x` is then rounded to itself (Gupta et al., ICML 2015). Backward recomputes the same rounding
    from what is returned, which a rounding that draws its own numbers could not. What is clipped stays clipped, and
    nothing else becomes so: values move to just short of the limits, so that they are within them still when backward
    has divided by the scale again.

    Returns:
        In float32 (float64 for float64 input); its gradient with respect to `x` is 1.
    """
    x, scale = wide(x), scale.detach()
    v, short = ratio(x.detach(), scale), 1 - 2.0**-22
    moved = (v + torch.rand_like(v) - 0.5).clamp(low * short, high * short) * positive(scale)
    return torch.where((v >= low) & (v <= high), moved + (x - x.detach()), x)


def masks(v: Tensor, clipped: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where clipping left `v` as it is, once for each of up to three readers.

    A mask that two operations read is written to memory by compilers, which takes longer than all the rest (torch 2.13,
    CPU). Theirs are three expressions, so that none is.
    """
    inside = clipped == v
    if not torch.compiler.is_compiling():
        return inside, inside, inside
    return inside, v == clipped, ~(v != clipped)


def sum_to(x: Tensor, like: Tensor) -> Tensor:
    """Sums a gradient over the elements that share one entry of `like`, in `like`'s type."""
    return x.sum_to_size(like.shape).to(like.dtype)
