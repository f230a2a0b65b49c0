"""The size of a real file, before anything is trained."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from qat.calibrate import calibrated
from qat.convert import convert
from qat.export.packed import WEIGHTS, save_packed
from qat.planning.plan import Plan


def converted(model: nn.Module, plan: Plan, run: Callable[[nn.Module], Any]) -> Any:
    """The integer form that calibration alone makes of a float model, which stays as it is.

    Args:
        model: The float model.
        plan: The plan of its grids.
        run: Lets calibration batches pass a model.
    """
    return convert(calibrated(model, plan, run), plan)


def packed_bytes(integers: nn.Module, plan: Plan) -> int:
    """Bytes of the packed file of a converted model."""
    with tempfile.TemporaryDirectory() as folder:
        save_packed(integers, plan, folder)
        return (Path(folder) / WEIGHTS).stat().st_size
