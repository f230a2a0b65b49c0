"""The size of a real file, before anything is trained."""

from collections.abc import Callable
from typing import Any

from torch import nn

from qat.calibrate import calibrated
from qat.convert import convert
from qat.export.packed import packed_bytes
from qat.search.costs import Files
from qat.search.space import Space


def packed_files(space: Space, run: Callable[[nn.Module], Any]) -> Files:
    """Weighs packed files of the narrowest and of the widest grids.

    Args:
        space: The layers and their choices.
        run: Lets calibration batches pass a model.
    """
    ends = {bits: space.plans[bits] for bits in (min(space.plans), max(space.plans))}
    return Files({b: packed_bytes(convert(calibrated(space.model, p, run), p), p) for b, p in ends.items()})
