"""Where points run. A launcher takes points one by one as places become free, and gives them back as they end."""

import os
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from joblib import Parallel, delayed

from qat.errors import UserError, last_line
from qat.process import imported
from qat.sweep.point import Outcome, Point, run_point

Ended = tuple[Point, Outcome]


class Launcher(Protocol):
    """Runs points, at most `n_jobs` of them at a time."""

    n_jobs: int

    def run(self, points: Iterable[Point], folder: Path) -> Iterator[Ended]:
        """Yields each point as it ends, in whatever order.

        Args:
            points: Drawn from only when a place is free, so that a search can learn from what has ended.
            folder: The sweep's, for the launcher's own files.
        """
        ...


class Local:
    """This machine, through joblib's threads: each waits for the process of one point.

    Args:
        n_jobs: Points at a time. Each gets an equal share of the cores, unless OMP_NUM_THREADS says otherwise.
    """

    def __init__(self, n_jobs: int = 1) -> None:
        self.n_jobs = _at_least_one(n_jobs)

    def run(self, points: Iterable[Point], folder: Path) -> Iterator[Ended]:
        threads = None if self.n_jobs == 1 else max(1, (os.cpu_count() or 1) // self.n_jobs)
        settings: Any = {"pre_dispatch": self.n_jobs, "batch_size": 1}  # joblib's annotations know only text
        parallel = Parallel(self.n_jobs, prefer="threads", return_as="generator_unordered", **settings)
        job = delayed(partial(_run, threads=threads))
        yield from parallel(job(point) for point in points)  # pyright: ignore[reportReturnType]


def _run(point: Point, threads: int | None = None) -> Ended:
    return point, run_point(point, threads=threads)


class Slurm:
    """A SLURM cluster, through submitit: one job for each point. The sweep's folder must be seen by all nodes.

    A job that SLURM preempts is requeued and goes on from its checkpoint. Jobs outlive the sweep if it is killed; run
    again, it waits for them.

    Args:
        n_jobs: Jobs in the queue at a time.
        cluster: `slurm`, or `local` for processes of this machine, to try things out.
        timeout_min, partition, gpus_per_node, cpus_per_task, mem_gb: What each job asks for.
        extra: Any other parameter of submitit's executor: `{slurm_account: mine, slurm_constraint: a100}`.
    """

    def __init__(
        self,
        n_jobs: int = 8,
        cluster: str = "slurm",
        timeout_min: int = 240,
        partition: str | None = None,
        gpus_per_node: int | None = None,
        cpus_per_task: int | None = None,
        mem_gb: float | None = None,
        extra: dict[str, Any] | None = None,
    ) -> None:
        self.n_jobs, self.cluster = _at_least_one(n_jobs), cluster
        asked = {"slurm_partition": partition, "cpus_per_task": cpus_per_task}
        asked |= {"gpus_per_node": gpus_per_node, "mem_gb": mem_gb}
        self.parameters = {key: value for key, value in asked.items() if value is not None}
        self.parameters |= {"timeout_min": timeout_min, **(extra or {})}

    def run(self, points: Iterable[Point], folder: Path) -> Iterator[Ended]:
        submitit = _submitit()
        executor = submitit.AutoExecutor(folder / "slurm", cluster=self.cluster)
        executor.update_parameters(name="qat", **self.parameters)
        waiting, jobs = iter(points), {}
        try:
            while True:
                while len(jobs) < self.n_jobs and (point := next(waiting, None)) is not None:
                    jobs[executor.submit(Requeued(), point)] = point
                if not jobs:
                    return
                job = next(iter(submitit.helpers.as_completed(list(jobs), poll_frequency=1)))
                point, error = jobs.pop(job), job.exception()
                yield point, job.result() if error is None else Outcome("failed", last_line(error))
        finally:
            for job in jobs:
                job.cancel()


class Requeued:
    """`run_point` as submitit wants it: when SLURM takes the node away, the same call is submitted again."""

    def __call__(self, point: Point) -> Outcome:
        return run_point(point)

    def checkpoint(self, point: Point) -> Any:
        return _submitit().helpers.DelayedSubmission(self, point)


def _submitit() -> Any:
    return imported("submitit", "sweep.launcher: SLURM jobs go through submitit: pip install 'qat[slurm]'")


def _at_least_one(n_jobs: int) -> int:
    if n_jobs < 1:
        raise UserError(f"n_jobs={n_jobs}: must be at least 1")
    return n_jobs
