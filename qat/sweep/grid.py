"""Every combination of choices: `qat train -m quant.weight.bits=2,3,4,8 seed=0,1`."""

from typing import Any

from qat.sweep.launchers import Launcher, Local
from qat.sweep.point import Point, finished
from qat.sweep.space import grid
from qat.sweep.task import Task


class GridSweep:
    """Runs every combination once.

    Args:
        dir: Where; `None` for a folder of its own below logs/, the same one for the same command.
        params: Keys that vary, see `qat.sweep.space`.
        objectives: Name -> `max` or `min`, what the Pareto front is drawn over.
        launcher: Launcher that runs the points.
    """

    kind = "grid"

    def __init__(
        self,
        objectives: dict[str, Any],
        dir: str | None = None,
        params: dict[str, Any] | None = None,
        launcher: Launcher | None = None,
    ) -> None:
        self.dir, self.params, self.objectives = dir, params, objectives
        self.launcher = launcher or Local()

    def check(self, task: Task) -> None:
        """Finds mistakes that need the space, before anything is written."""
        next(grid(task.space))

    def run(self, task: Task) -> None:
        """Runs what is not finished yet."""
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
