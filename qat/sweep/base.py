"""What every sweep is to the command line."""

from typing import Any, ClassVar

from qat.sweep.task import Task


class Sweep:
    """Says which points there are, and runs them.

    Args:
        objectives: Name -> `max` or `min`, what the Pareto front is drawn over.
        dir: Where; `None` for a folder of its own below logs/, the same one for the same command.
        params: Keys that vary, see `qat.sweep.space`.

    Objectives and params reach `check` and `run` in the task, checked, and with what the command line says of them.

    Attributes:
        kind: Name of the kind of sweep, which is part of what a sweep is.
        reads_logs: The setting that lets every point end (`sweep.keep=null`), where points are ended early by what
            their csv logs say; else `None`.
    """

    kind: ClassVar[str]
    reads_logs: str | None = None

    def __init__(
        self, objectives: dict[str, Any], dir: str | None = None, params: dict[str, Any] | None = None
    ) -> None:
        self.dir = dir

    def check(self, task: Task) -> None:
        """Finds mistakes that need the space, before anything is written."""
        raise NotImplementedError

    def run(self, task: Task) -> None:
        """Runs what is not finished yet."""
        raise NotImplementedError
