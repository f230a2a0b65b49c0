"""Range estimators: from the numbers seen to the interval the grid should cover. Pure functions, tensor to tensors.

Each takes rows `x [R, N]` (one row per scale, finite, N >= 1) and the integer limits of the grid, and returns `(low [R], high [R])` with
`low <= 0 <= high`, so that zero is always a grid point (padding and ReLU produce exact zeros).
`scale_and_zero_point` turns an interval into a grid. A new estimator is one more function of this signature.
"""

import torch
from torch import Tensor

from qat.functional import levels, values

Range = tuple[Tensor, Tensor]


def minmax(x: Tensor, quant_min: int, quant_max: int, symmetric: bool) -> Range:
    """The smallest interval that holds everything: nothing is clipped."""
    return x.amin(1).clamp_max(0), x.amax(1).clamp_min(0)


def percentile(x: Tensor, quant_min: int, quant_max: int, symmetric: bool, share: float = 0.9999) -> Range:
    """Leaves out the outermost `1 - share` of the values, split over both ends."""
    cut = max(1, round((1 - share) / 2 * x.shape[1]))
    low = x.kthvalue(cut, dim=1).values
    high = (-x).kthvalue(cut, dim=1).values.neg()
    return low.clamp_max(0), high.clamp_min(0)


def lsq(x: Tensor, quant_min: int, quant_max: int, symmetric: bool) -> Range:
    """The start of LSQ (Esser et al., section 2.1): scale = 2 mean|x| / sqrt(quant_max)."""
    scale = 2 * x.abs().mean(1) / max(quant_max, 1) ** 0.5
    return scale * min(quant_min, 0), scale * quant_max


def mse(x: Tensor, quant_min: int, quant_max: int, symmetric: bool, candidates: int = 64) -> Range:
    """Of the intervals that shrink `minmax` by 1, 1 - 1/64, ... the one with the least squared rounding and clipping error."""
    low, high = minmax(x, quant_min, quant_max, symmetric)
    best = torch.full_like(low, torch.inf)
    result = low, high
    for shrink in torch.linspace(1, 1 / candidates, candidates).tolist():
        scale, zero_point = scale_and_zero_point(low * shrink, high * shrink, quant_min, quant_max, symmetric)
        scale, zero_point = scale[:, None], zero_point[:, None]
        level = levels(x, scale, quant_min - zero_point, quant_max - zero_point)
        error = (values(level, scale, x.dtype) - x).square_().sum(1)
        better = error < best
        best = torch.where(better, error, best)
        result = (
            torch.where(better, low * shrink, result[0]),
            torch.where(better, high * shrink, result[1]),
        )
    return result


def scale_and_zero_point(
    low: Tensor, high: Tensor, quant_min: int, quant_max: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """The grid that covers `low .. high` (each `[R]`).

    Returns:
        scale `[R]` > 0 in float32 and zero_point `[R]` as int32 (zero if `symmetric`). A row of zeros takes the largest scale of the others,
        or 1: any scale represents it, and a tiny one would clip its first update.
    """
    if symmetric:
        scale = high.abs() / max(quant_max, 1)
        if quant_min < 0:
            scale = torch.maximum(scale, low.abs() / -quant_min)
    else:
        scale = (high - low) / (quant_max - quant_min)
    scale = scale.float()
    # A scale below the normal numbers cannot be divided by without overflow, so such a row counts as zeros.
    usable = scale > torch.finfo(torch.float32).tiny
    substitute = scale.amax() if usable.any() else torch.ones((), device=scale.device)
    scale = torch.where(usable, scale, substitute)
    if symmetric:
        return scale, torch.zeros_like(scale, dtype=torch.int32)
    return scale, (quant_min - (low / scale).round()).clamp(quant_min, quant_max).to(torch.int32)
