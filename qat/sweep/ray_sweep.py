"""A grid under Ray Tune, which ends points early by ASHA (Li et al., MLSys 2020): at each rung, only the best share of
the points goes on.

Ray finds the resources; each of its trials runs one point in a process of its own and reports its log, epoch by epoch.
The sweep's folder must be seen by all nodes.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from qat.errors import UserError
from qat.process import imported
from qat.sweep.base import Sweep
from qat.sweep.grid import grid_points
from qat.sweep.point import PRUNED, Outcome, Point, past, run_point, write_record
from qat.sweep.results import by_epoch
from qat.sweep.space import grid
from qat.sweep.task import Task


class RaySweep(Sweep):
    """Runs a grid on a Ray cluster.

    Args:
        monitor: The logged value that ASHA ranks by; its direction is the config's `mode`.
        grace_epochs: Epochs that every point gets.
        max_epochs: Epochs after which ASHA ends none; those of the training (`trainer.max_epochs`).
        keep: One in so many points goes on at each rung; `None` to end none.
        address: An existing cluster's (`auto`, `ray://host:10001`); `None` starts one on this machine.
        cpus, gpus: What each point gets.
        dir, params, objectives: As of every `Sweep`.
    """

    kind = "ray"

    def __init__(
        self,
        objectives: dict[str, Any],
        monitor: str = "val/acc",
        grace_epochs: int = 1,
        max_epochs: int = 30,
        keep: int | None = 3,
        address: str | None = None,
        cpus: float = 1,
        gpus: float = 0,
        dir: str | None = None,
        params: dict[str, Any] | None = None,
    ) -> None:
        if not 1 <= grace_epochs <= max_epochs:
            raise UserError(f"grace_epochs={grace_epochs}: must be from 1 to max_epochs={max_epochs}")
        if keep is not None and keep < 2:
            raise UserError(f"keep={keep}: one in 2 or more goes on, or null to end none")
        super().__init__(objectives, dir, params)
        self.monitor, self.grace, self.max_epochs = monitor, grace_epochs, max_epochs
        self.keep, self.address, self.resources = keep, address, {"cpu": cpus, "gpu": gpus}
        self.reads_logs = None if keep is None else "sweep.keep=null"

    def check(self, task: Task) -> None:
        next(grid(task.space))
        _ray()

    def run(self, task: Task) -> None:
        """Runs what is not finished yet; finished points take part in the ranking with their logs."""
        ray = _ray()
        points = grid_points(task)
        task.announce(len(points), " under Ray")
        own = {"include_dashboard": False} if self.address is None else {}  # settings that only a new cluster takes
        ray.init(address=self.address, log_to_driver=False, ignore_reinit_error=True, **own)
        try:
            broken = self._tune(ray, task, points)
        finally:
            ray.shutdown()
        for left, point in zip(range(len(points) - 1, -1, -1), points, strict=True):
            outcome = past(point.folder)
            if outcome is None:  # Ray ended the process that waited for it
                outcome = Outcome("failed", broken[point.number]) if point.number in broken else PRUNED
                write_record(point, outcome)
            task.tell(point, outcome, left)

    def _tune(self, ray: Any, task: Task, points: list[Point]) -> dict[int, str]:
        """Runs the points; returns what went wrong in Ray itself, by point."""
        tune = ray.tune
        scheduler = None if self.keep is None else tune.schedulers.ASHAScheduler(
            time_attr="epoch", metric=self.monitor, mode=task.mode, grace_period=self.grace,
            max_t=self.max_epochs + 1,  # at max_t ASHA ends even the best, before it is exported
            reduction_factor=self.keep,
        )  # fmt: skip
        tuner = tune.Tuner(
            tune.with_resources(_trainable(points, self.monitor), self.resources),
            param_space={"number": tune.grid_search([point.number for point in points])},
            tune_config=tune.TuneConfig(scheduler=scheduler),
            run_config=tune.RunConfig(storage_path=str(task.folder / "ray"), name="tune", verbose=0),
        )
        return {result.config["number"]: str(result.error) for result in tuner.fit() if result.error is not None}


def _trainable(points: list[Point], monitor: str) -> Callable[[dict[str, Any]], None]:
    """The function that Ray runs for each point: the point, its log reported as it grows."""

    def train(config: dict[str, Any]) -> None:
        from ray import tune  # pyright: ignore[reportMissingImports]

        reported: set[int] = set()

        def watch(folder: Path) -> None:
            for epoch, value in by_epoch(folder, monitor).items():
                if epoch not in reported:
                    reported.add(epoch)
                    tune.report({monitor: value, "epoch": epoch + 1})

        point = points[config["number"]]
        outcome: Outcome = run_point(point, watch)
        watch(point.folder)
        if not reported and outcome.state == "done":
            raise RuntimeError(f"point {point.number} logged no {monitor}")

    return train


def _ray() -> Any:
    otherwise = "sweep: this one runs under Ray: pip install 'qat[ray]'"
    imported("ray.tune", otherwise)
    return imported("ray", otherwise)
