"""Ending points early that can no longer matter.

Optuna's pruners compare one number, so with several objectives they do not apply: ranked by the metric alone, every
small model looks bad. `Dominated` asks what the front asks: at the same epoch, was a point that costs no more already
better? Costs are known before training (bits and MACs are), in `audit.json`.
"""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from threading import Event, Thread

from qat.errors import UserError
from qat.files import read_object
from qat.run_files import AUDIT
from qat.sweep.point import STOP, Point
from qat.sweep.results import by_epoch

Judge = Callable[[Point], bool]
"""Whether a running point should end."""


class Dominated:
    """Ends a point that another one beats by `margin` at the same epoch, with no more bit operations and weight bits.

    Args:
        margin: By how much the monitored value must be better.
        after_epochs: Epochs that every point gets.
    """

    def __init__(self, margin: float = 0.02, after_epochs: int = 1) -> None:
        if margin < 0 or after_epochs < 1:
            raise UserError(f"margin={margin}, after_epochs={after_epochs}: must be at least 0 and at least 1")
        self.margin, self.after_epochs = margin, after_epochs

    def judge(self, folder: Path, others: Iterable[Path], monitor: str, mode: str) -> bool:
        """Whether the run in `folder` should end, given the runs in `others`."""
        mine, cost = by_epoch(folder, monitor), _cost(folder)
        if not mine or cost is None or (epoch := max(mine)) + 1 < self.after_epochs:
            return False
        sign = 1 if mode == "max" else -1
        value = -sign * math.inf if math.isnan(mine[epoch]) else mine[epoch]
        for other in others:
            theirs, price = by_epoch(other, monitor), _cost(other)
            cheaper = price is not None and all(p <= c for p, c in zip(price, cost, strict=True))
            if cheaper and epoch in theirs and sign * (theirs[epoch] - value) > self.margin:
                return True
        return False


def _cost(folder: Path) -> tuple[float, float] | None:
    """Bit operations and bits of weights, known once the policy was applied; `None` if they cannot be read."""
    path = folder / AUDIT
    if not path.is_file():
        return None
    try:
        audit = read_object(path, "bops", "rows")
    except UserError:  # it would end the judging of all points
        return None
    return audit["bops"], sum(row["params"] * (row["weight_bits"] or 32) for row in audit["rows"])


class Watcher:
    """A thread that looks at running points every second, and writes a file named `stop` for those to end.

    The file is seen by whoever runs the point, on whatever node.
    """

    def __init__(self, judge: Judge, seconds: float = 1.0) -> None:
        self.running: dict[int, Point] = {}
        self._judge, self._seconds, self._over = judge, seconds, Event()
        self._thread = Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Watcher":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(self._seconds):
            for point in list(self.running.values()):
                if point.folder.is_dir() and self._judge(point):
                    (point.folder / STOP).touch()
