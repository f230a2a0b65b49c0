"""Range estimators: from the numbers seen to the interval the grid should cover. Pure functions, tensors to tensors.

Each takes rows `x [R, N]` (one row per scale, finite, N >= 1) and the spec of the grid, and returns `(low [R], high
[R])` with `low <= 0 <= high`, so that zero is always a grid point (padding and ReLU produce exact zeros).
`scale_and_zero_point` turns an interval into a grid. A new estimator is one more function of this signature, listed in
`ESTIMATORS` at the end.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from qat.grid.functional import SCALE_FLOOR, TINY, levels, over, ratio, values
from qat.grid.scales import binade, snap
from qat.grid.spec import QuantSpec

Range = tuple[Tensor, Tensor]

BINS = 2048
"""Number of bins in the histograms of `kl`."""
ROWS = 256
"""Number of histograms that `kl` looks at together, which bounds its memory."""


def minmax(x: Tensor, spec: QuantSpec) -> Range:
    """The smallest interval that holds everything: nothing is clipped."""
    return x.amin(1).clamp_max(0), x.amax(1).clamp_min(0)


def centred(x: Tensor, spec: QuantSpec) -> Range:
    """The interval of `minmax`; `scale_and_zero_point` makes of it the step that compressed-tensors gives a symmetric
    grid: the largest magnitude over half the number of steps, 127.5 for int8 with all of its codes.
    """
    return minmax(x, spec)


def even(x: Tensor, spec: QuantSpec) -> Range:
    """`minmax` for blocks that share a power of two, grown so that this is the next one where the largest magnitude
    would saturate: from 1.75 of its binade on (ROUND-EVEN of the Microscaling emulations in vLLM, torchao and
    compressed-tensors; the specification rounds down). For other scales it is `minmax`.
    """
    low, high = minmax(x, spec)
    if spec.scale != "e8m0":
        return low, high
    largest = torch.maximum(-low, high)
    grown = (largest + binade(largest) / 4).clamp_max(torch.finfo(largest.dtype).max)
    return -grown, torch.where(largest > 0, grown, 0)


def percentile(x: Tensor, spec: QuantSpec, share: float = 0.9999) -> Range:
    """The interval that leaves out the outermost `1 - share` of the values, split over both ends."""
    kept = round((1 - share) / 2 * x.shape[1]) + 1  # the first one, counted from either end
    low = x.kthvalue(kept, dim=1).values
    high = (-x).kthvalue(kept, dim=1).values.neg()
    return low.clamp_max(0), high.clamp_min(0)


def lsq(x: Tensor, spec: QuantSpec) -> Range:
    """The start of LSQ: scale = 2 mean|x| / sqrt(quant_max) (Esser et al., ICLR 2020, section 2.1).

    The paper has no zero point. An affine grid starts centred on the mean, with mean|x - mean| and half of its codes in
    the formula, and reaches out to zero.
    """
    unit = x.abs().amax(1).clamp_min(TINY)  # sums of huge numbers overflow, sums of shares do not
    x, largest = x / unit[:, None], torch.finfo(x.dtype).max
    if spec.symmetric:
        scale = 2 * x.abs().mean(1) / max(spec.quant_max, 1) ** 0.5
        low, high = scale * min(spec.quant_min, 0), scale * spec.quant_max
    else:
        half, mean = (spec.quant_max - spec.quant_min) / 2, x.mean(1)
        reach = 2 * (x - mean[:, None]).abs().mean(1) * half**0.5
        low, high = (mean - reach).clamp_max(0), (mean + reach).clamp_min(0)
    return (low * unit).clamp_min(-largest), (high * unit).clamp_max(largest)


def mse(x: Tensor, spec: QuantSpec, candidates: int = 64) -> Range:
    """The interval with the least squared error, row by row, of those that shrink `minmax` by 1, 1 - 1/64, ..."""
    low, high = minmax(x, spec)
    best = torch.full_like(low, torch.inf)
    result = low, high
    # Squares of errors in this unit neither overflow nor vanish.
    unit = torch.maximum(-low, high).clamp_min(TINY)[:, None]
    for step in range(candidates, 0, -1):
        ends = low * (step / candidates), high * (step / candidates)
        scale, least, most = _grid(*ends, spec)
        error = values(levels(x, scale, least, most, spec.rounding), scale, x.dtype).sub_(x).div_(unit)
        error = error.square_().sum(1)
        better = error < best
        best = torch.where(better, error, best)
        result = torch.where(better, ends[0], result[0]), torch.where(better, ends[1], result[1])
    return result


def kl(x: Tensor, spec: QuantSpec, candidates: int = 128) -> Range:
    """The interval that loses the least information, row by row, of those that shrink `minmax` by 1, 1 - 1/128, ...

    The entropy calibration of TensorRT (Migacz, "8-bit Inference with TensorRT", GTC 2017): KL(P || Q) of the histogram
    P of the clipped values, outliers counted in its outermost bins, against what the grid leaves of it, Q: the mass of
    the bins that share a code, without the outliers, spread evenly over those of them that hold values. It wants
    thousands of values per row. Differs in two ways: any grid will do, as bins are grouped by the codes of their
    centres; and exact zeros, which every grid holds and ReLU makes by the thousands, are left out.
    """
    parts = [_kl(rows, spec, candidates) for rows in x.split(ROWS)]
    return torch.cat([low for low, _ in parts]), torch.cat([high for _, high in parts])


def _kl(x: Tensor, spec: QuantSpec, candidates: int) -> Range:
    low, high = minmax(x, spec)
    width = (high / BINS - low / BINS).clamp_min(TINY)[:, None]
    index = (x / width - low[:, None] / width).long().clamp_(0, BINS - 1)
    counts = x.new_zeros(len(x), BINS).scatter_add_(1, index, (x != 0).to(x.dtype))
    centres = low[:, None] + (torch.arange(BINS, dtype=x.dtype, device=x.device) + 0.5) * width
    best = torch.full_like(low, torch.inf)
    result = low, high
    for step in range(candidates, 0, -1):
        ends = low * (step / candidates), high * (step / candidates)
        divergence = _divergence(counts, centres, *_grid(*ends, spec), spec)
        better = divergence < best
        best = torch.where(better, divergence, best)
        result = torch.where(better, ends[0], result[0]), torch.where(better, ends[1], result[1])
    return result


def _divergence(counts: Tensor, centres: Tensor, scale: Tensor, low: Tensor, high: Tensor, spec: QuantSpec) -> Tensor:
    """KL(P || Q) `[R]` of histograms `counts [R, BINS]`, see `kl`."""
    v = ratio(centres, scale)
    below, above = v < low - 0.5, v > high + 0.5
    kept = counts * ~(below | above)
    level = spec.rounding(v.clamp(low, high))
    code = torch.nn.functional.pad((level[:, 1:] != level[:, :-1]).cumsum(1), (1, 0))  # levels ascend along a row
    mass, holders = torch.zeros_like(counts), torch.zeros_like(counts)
    mass.scatter_add_(1, code, kept)
    holders.scatter_add_(1, code, (kept > 0).to(kept.dtype))
    q = (mass / holders.clamp_min(1)).gather(1, code) * (kept > 0)
    first = below.sum(1, keepdim=True).clamp_max(BINS - 1)
    last = BINS - 1 - above.sum(1, keepdim=True).clamp_max(BINS - 1)
    p = kept.scatter_add(1, first, (counts * below).sum(1, keepdim=True))
    p = p.scatter_add(1, last, (counts * above).sum(1, keepdim=True))
    p, q = p / p.sum(1, keepdim=True).clamp_min(1), q / q.sum(1, keepdim=True).clamp_min(1)
    return torch.where(p > 0, p * (p / q.clamp_min(1e-9)).clamp_min(TINY).log(), 0).sum(1)


def _grid(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Scale as stored, and the limits in units of it, each `[R, 1]`."""
    scale, zero_point = scale_and_zero_point(low, high, spec)
    zero_point = zero_point[:, None]
    return snap(scale, spec)[:, None], spec.quant_min - zero_point, spec.quant_max - zero_point


def scale_and_zero_point(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """The grid that covers `low .. high` (each `[R]`).

    For `scale: e8m0` it is the scale that block formats are defined by: the largest magnitude divided by the power of
    two in `quant_max` (see `qat.grid.scales.microscaling`), so that the largest magnitude saturates by a little.

    Returns:
        scale `[R]` > 0 in float32 and zero_point `[R]` as int32 (zero if symmetric). A row of zeros takes the largest
        scale of the others, or 1: any scale represents it, and a tiny one would clip its first update.
    """
    low, high = low.float(), high.float()
    if spec.scale == "e8m0":
        scale = torch.maximum(-low, high) / 2.0**spec.max_exponent
    elif spec.symmetric and spec.quant_min < 0 and spec.range == "centred":
        scale = over(torch.maximum(-low, high), (spec.quant_max - spec.quant_min) / 2)
    elif spec.symmetric:
        scale = over(high, max(spec.quant_max, 1))
        if spec.quant_min < 0:
            scale = torch.maximum(scale, over(-low, -spec.quant_min))
    else:
        codes = spec.quant_max - spec.quant_min
        scale = over(high, codes) - over(low, codes)
    # A scale below the normal numbers cannot be divided by without overflow, so such a row counts as zeros; blocks that
    # share a power of two take the smallest one.
    scale = scale.clamp_max(torch.finfo(scale.dtype).max)  # with one code above zero, the sum may overflow
    usable = scale > (0 if spec.scale == "e8m0" else TINY)
    others = torch.where(usable, scale, 0).amax()
    scale = torch.where(usable, scale, torch.where(others > 0, others, 1))
    # What is stored exactly by its format needs no floor; other scales take part in integer arithmetic.
    scale = scale.clamp_min(TINY if spec.scale in ("e8m0", "e4m3") else SCALE_FLOOR)
    if spec.symmetric:
        return scale, torch.zeros_like(scale, dtype=torch.int32)
    zero_point = (spec.quant_min - (low / snap(scale, spec)).round()).clamp(spec.quant_min, spec.quant_max)
    return scale, zero_point.to(torch.int32)


ESTIMATORS: dict[str, Callable[[Tensor, QuantSpec], Range]] = {
    f.__name__: f for f in (mse, minmax, percentile, kl, lsq, centred, even)
}
"""Range estimators by the name that `range` gives them."""
