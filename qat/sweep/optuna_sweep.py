"""Search by Optuna: it proposes points from what it has seen, several objectives at a time.

Driven through ask and tell. The study is an SQLite file that only this process opens, so a kill loses nothing: trials
that were running are run on from where they stopped. Each proposal is made by a sampler seeded with the trial's
number, so a search that was killed proposes what it would have proposed.
"""

import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qat.errors import UserError
from qat.files import atomic
from qat.process import imported
from qat.sweep.base import Sweep
from qat.sweep.launchers import Launcher, Local
from qat.sweep.point import Outcome, Point
from qat.sweep.prune import Dominated, Watcher
from qat.sweep.results import by_epoch, read_point
from qat.sweep.space import Interval
from qat.sweep.task import Task

STUDY, STORE, NAME = "sweep", "study.db", "study.txt"
REPEATS = 50
"""Proposals of points that are there already, one after the other, that mean there are no others."""


class OptunaSweep(Sweep):
    """Proposes, runs, learns.

    Args:
        n_trials: Points in all, those of earlier runs of the same command included.
        monitor: The logged value that pruning looks at after each epoch; its direction is the config's `mode`.
        pruner: `Dominated`, or with one objective a pruner of Optuna's; `None` to let every point end.
        sampler: Makes Optuna's sampler from a seed (`_partial_: true`); `None` for TPE.
        storage: Optuna's storage URL, where each sweep has a study of its own, under the name in the `study.txt` of
            its folder; `None` for an SQLite file in that folder.
        launcher: Launcher that runs the points.
        dir, params, objectives: As of every `Sweep`.
    """

    kind = "optuna"

    def __init__(
        self,
        objectives: dict[str, Any],
        n_trials: int = 20,
        monitor: str = "val/acc",
        pruner: Any = None,
        sampler: Callable[..., Any] | None = None,
        storage: str | None = None,
        dir: str | None = None,
        params: dict[str, Any] | None = None,
        launcher: Launcher | None = None,
    ) -> None:
        if n_trials < 1:
            raise UserError(f"n_trials={n_trials}: must be at least 1")
        super().__init__(objectives, dir, params)
        self.n_trials, self.monitor, self.launcher = n_trials, monitor, launcher or Local()
        self.pruner, self.sampler, self.storage = pruner, sampler, storage
        self.reads_logs = None if pruner is None else "sweep.pruner=null"

    def check(self, task: Task) -> None:
        _optuna()
        if self.pruner is not None and not isinstance(self.pruner, Dominated) and len(task.objectives) > 1:
            raise UserError(
                f"sweep.pruner: {type(self.pruner).__name__} compares one objective, and there are "
                f"{len(task.objectives)}; use qat.sweep.Dominated"
            )

    def run(self, task: Task) -> None:
        """Completes the search up to `n_trials` points."""
        search = _Search(self, task)
        left = search.missing()
        task.announce(self.n_trials, f", {self.n_trials - left} of them finished")
        with Watcher(search.judge) as search.watcher:
            for point, outcome in self.launcher.run(search.ask(left), task.folder):
                search.tell(point, outcome)
                left -= 1
                task.tell(point, outcome, max(left, 0))


class _Search:
    """One run of a search: the study, and the trials under way."""

    def __init__(self, sweep: OptunaSweep, task: Task) -> None:
        optuna = _optuna()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.sweep, self.task, self.optuna = sweep, task, optuna
        directions = ["maximize" if d == "max" else "minimize" for d in task.objectives.values()]
        own = None if sweep.pruner is None or isinstance(sweep.pruner, Dominated) else sweep.pruner
        self.study = optuna.create_study(
            storage=sweep.storage or _own_storage(task.folder),
            study_name=_name(task.folder) if sweep.storage else STUDY, directions=directions,
            pruner=own or optuna.pruners.NopPruner(), load_if_exists=True,
        )  # fmt: skip
        self.watcher: Watcher

    def missing(self) -> int:
        """Points still to run, those that failed among them."""
        states = self.optuna.trial.TrialState
        ended = self.study.get_trials(deepcopy=False, states=(states.COMPLETE, states.PRUNED))
        return max(0, self.sweep.n_trials - sum("same_as" not in trial.user_attrs for trial in ended))

    def ask(self, count: int) -> Iterator[Point]:
        """Points to run: first those that a kill interrupted or that failed, then proposals of the sampler."""
        running = self.study.get_trials(deepcopy=False, states=(self.optuna.trial.TrialState.RUNNING,))
        for trial in running:
            if "params" not in trial.user_attrs:
                self.study.tell(trial.number, state=self.optuna.trial.TrialState.FAIL)
            elif count > 0:
                count -= 1
                yield self._start(trial.number, trial.user_attrs["params"])
        for _ in range(count):
            if (point := self._propose()) is None:
                self.task.console.print(f"no further points: {REPEATS} proposals in a row were there already")
                return
            yield point

    def _propose(self) -> Point | None:
        make = self.sweep.sampler or self.optuna.samplers.TPESampler
        for _ in range(REPEATS):
            trials = self.study.get_trials(deepcopy=False)
            self.study.sampler = make(seed=(self.task.seed * 1_000_003 + len(trials)) % 2**32)
            trial = self.study.ask()
            params = {key: self._suggest(trial, key, values) for key, values in self.task.space.items()}
            failed = self.optuna.trial.TrialState.FAIL
            same = [t for t in trials if t.user_attrs.get("params") == params and t.state != failed]
            if not same:
                trial.set_user_attr("params", params)
                return self._start(trial.number, params)
            trial.set_user_attr("same_as", same[0].number)
            finished = [t for t in same if t.values is not None]
            if finished:
                self.study.tell(trial.number, finished[0].values)
            else:
                self.study.tell(trial.number, state=failed)
        return None

    def _suggest(self, trial: Any, key: str, values: Any) -> str:
        if not isinstance(values, Interval):
            return trial.suggest_categorical(key, values)
        if isinstance(values.low, int) and isinstance(values.high, int):
            return str(trial.suggest_int(key, values.low, values.high, log=values.log))
        return repr(trial.suggest_float(key, values.low, values.high, log=values.log))

    def _start(self, number: int, params: dict[str, str]) -> Point:
        point = self.task.point(number, params)
        if self.sweep.pruner is not None:
            self.watcher.running[number] = point
        return point

    def tell(self, point: Point, outcome: Outcome) -> None:
        """Records what came of a point; one that failed stays under way, to be tried again under its number."""
        self.watcher.running.pop(point.number, None)
        if outcome.state == "done":
            values = read_point(point.folder).values
            if all(name in values for name in self.task.objectives):
                self.study.tell(point.number, [values[name] for name in self.task.objectives])
        elif outcome.state == "pruned":
            self.study.tell(point.number, state=self.optuna.trial.TrialState.PRUNED)

    def judge(self, point: Point) -> bool:
        """The verdict of the pruner on a running point."""
        pruner, task = self.sweep.pruner, self.task
        if isinstance(pruner, Dominated):
            others = [path for path in point.folder.parent.iterdir() if path != point.folder]
            return pruner.judge(point.folder, others, self.sweep.monitor, task.mode)
        [frozen] = [t for t in self.study.get_trials(deepcopy=False) if t.number == point.number]
        trial = self.optuna.trial.Trial(self.study, frozen._trial_id)
        for epoch, value in by_epoch(point.folder, self.sweep.monitor).items():
            if epoch not in frozen.intermediate_values:
                trial.report(value, epoch)
        return trial.should_prune()


def _own_storage(folder: Path) -> str:
    """The URL of an SQLite file in a folder, in whose name `?` and `%` are letters like others."""
    from sqlalchemy import URL  # of Optuna's own

    return URL.create("sqlite", database=str(folder / STORE)).render_as_string()


def _name(folder: Path) -> str:
    """Name of a folder's study where there are others: it belongs to the points in the folder, wherever that is seen
    from, and neither to the same command elsewhere nor to a folder that was deleted.
    """
    path = folder / NAME
    if not path.is_file():
        with atomic(path) as temporary:
            temporary.write_text(f"{folder.name}-{secrets.token_hex(4)}")
    return path.read_text()


def _optuna() -> Any:
    return imported("optuna", "sweep: a search needs Optuna: pip install 'qat[sweep]'")
