"""A tensor that passes two grids in a row: 8 bits for an addition, of these 4 for the convolution behind it.

By the time it meets the second grid it has few values: the codes of the first, times a scale. If one of them is a tie
of the second but for its last bits (85 * s = 9.5 * s'), every value with that code goes up or down together, by how an
engine computes: one divides, another multiplies by the reciprocal. Calibrated scales are fractions of one maximum, so
there such ties are exact, and common: several percent of all pairs. Scales that training moved rarely meet one.
"""

import itertools
from collections.abc import Iterator
from typing import TypeGuard

import torch
from torch import Tensor, nn

from qat.grid.formats import round_int
from qat.quantizers import Quantizer

MARGIN = 1e-4
"""How far from a tie a value should be, in codes: a product of two float32 and a zero point of 128 are off by up to
3e-5."""
UNTIED_BITS = 8
"""Most bits of a first grid whose ties are looked for. A finer one has so many codes that some are always near a tie,
and each of them is the code of few values."""
TRIES = 500


@torch.no_grad()
def untie(model: nn.Module, only: set[Quantizer]) -> None:
    """Moves the scales of second grids, by less than a thousandth, to where no value of the first is a tie.

    Args:
        model: Calibrated.
        only: The quantizers that may change.
    """
    for first, second in cascades(model):
        if second in only:
            levels = torch.arange(first.quant_min, first.quant_max + 1) - first.zero_point.cpu()
            values = levels.float() * first.step().cpu()
            low, high = (end - int(second.zero_point) for end in (second.quant_min, second.quant_max))
            second.scale.copy_(untied(second.step().cpu(), values, low, high))


def cascades(model: nn.Module) -> Iterator[tuple[Quantizer, Quantizer]]:
    """Pairs of grids in a row of which the second's scale depends on the first's."""
    for chain in [module for module in model.modules() if isinstance(module, nn.Sequential)]:
        for first, second in itertools.pairwise(chain):
            if _ties(first) and _ties(second) and first.spec.width <= UNTIED_BITS:
                yield first, second


def _ties(grid: nn.Module) -> TypeGuard[Quantizer]:
    """Whether something rounds to whole multiples of one scale that may have any value."""
    if not isinstance(grid, Quantizer) or not (grid.static and grid.uniform and grid.spec.rounding is round_int):
        return False
    return grid.spec.granularity == "tensor" and grid.spec.scale == "float32"


def untied(scale: Tensor, values: Tensor, low: int, high: int) -> Tensor:
    """The scale nearest to `scale`, in steps of 1e-5 of it, of which no value is nearly a tie.

    Args:
        scale: `(1,)`.
        values: The numbers that are put on the grid, `[N]`.
        low, high: The grid's levels; what lies beyond is clipped.
    """
    for step in sorted(range(-TRIES, TRIES + 1), key=abs):
        tried = (scale.double() * (1 + 1e-5 * step)).float() if step else scale
        ratio = values.double() / tried
        near = (ratio - ratio.floor() - 0.5).abs() <= MARGIN
        if not (near & (ratio <= high) & (ratio >= low)).any():
            return tried
    return scale
