"""Every combination of choices: `qat train -m quant.weight.bits=2,3,4,8 seed=0,1`."""

from typing import Any

from qat.sweep.base import Sweep
from qat.sweep.launchers import Launcher, Local
from qat.sweep.point import Point, finished
from qat.sweep.space import grid
from qat.sweep.task import Task


class GridSweep(Sweep):
    """Runs every combination once.

    Args:
        launcher: Launcher that runs the points.
        dir, params, objectives: As of every `Sweep`.
    """

    kind = "grid"

    def __init__(
        self,
        objectives: dict[str, Any],
        dir: str | None = None,
        params: dict[str, Any] | None = None,
        launcher: Launcher | None = None,
    ) -> None:
        super().__init__(objectives, dir, params)
        self.launcher = launcher or Local()

    def check(self, task: Task) -> None:
        next(grid(task.space))

    def run(self, task: Task) -> None:
        points = grid_points(task)
        todo = [point for point in points if not finished(point.folder)]
        task.announce(len(points), f", {len(points) - len(todo)} of them finished")
        for left, (point, outcome) in zip(
            range(len(todo) - 1, -1, -1), self.launcher.run(todo, task.folder), strict=True
        ):
            task.tell(point, outcome, left)


def grid_points(task: Task) -> list[Point]:
    """The points of a grid, numbered."""
    return [task.point(number, params) for number, params in enumerate(grid(task.space))]
