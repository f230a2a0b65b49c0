"""One point of a sweep: what its command line says, and running it to its end, whatever was done of it before.

A point has a folder to itself and a lock in it. Whoever holds the lock looks first what is there: a finished run is
not run again, a half-finished one goes on from its checkpoint (`ckpt=last`). So it does no harm to start a point twice,
as when a SLURM job outlives the sweep that submitted it.
"""

import math
import os
import re
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock

from qat.errors import UserError
from qat.files import read_object, write_object
from qat.run_files import PROGRESS, REPORT
from qat.stages import final_metric

State = Literal["done", "failed", "pruned"]
RECORD, LOCK, STOP, OUTPUT = "point.json", ".lock", "stop", "output.log"
POLL_SECONDS = 0.5
LAST_WORD = re.compile(r"(?m)^(?:qat: error: |Traceback \(most recent call last\):\n(?: .*\n|\n)*)(\S.*)")
"""What a process says of its end: a mistake of the user, or the line below a traceback."""


@dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Attributes:
        number: Place of the point in the sweep.
        params: Overrides that distinguish it: key -> what is written behind `=`.
        command: The rest of its command line.
        folder: The folder that it runs in.
    """

    number: int
    params: dict[str, str]
    command: tuple[str, ...]
    folder: Path

    @property
    def label(self) -> str:
        return " ".join(f"{key}={value}" for key, value in self.params.items())


@dataclass(frozen=True)
class Outcome:
    """How a point ended, and the last word of a failed one."""

    state: State
    error: str | None = None


PRUNED = Outcome("pruned")


def past(folder: Path) -> Outcome | None:
    """How an earlier attempt at a point ended; `None` if there was none or it was cut off."""
    path = folder / RECORD
    if not path.is_file():
        return None
    record = read_object(path, "state", "error")
    return Outcome(record["state"], record["error"]) if record["state"] else None


def finished(folder: Path) -> bool:
    """Whether there is nothing left to do; failed points are tried again."""
    outcome = past(folder)
    return outcome is not None and outcome.state != "failed"


def run_point(point: Point, watch: Callable[[Path], None] | None = None, threads: int | None = None) -> Outcome:
    """Runs a point in a process of its own.

    Args:
        point: The point.
        watch: Called with the folder about twice a second; what it raises ends the run.
        threads: Cores for it, where several points share a machine.
    """
    point.folder.mkdir(parents=True, exist_ok=True)
    with FileLock(point.folder / LOCK):
        if finished(point.folder):
            outcome = past(point.folder)
            assert outcome is not None
            return outcome
        write_record(point, None)
        (point.folder / REPORT).unlink(missing_ok=True)  # of an attempt that failed
        said = (point.folder / OUTPUT).stat().st_size if (point.folder / OUTPUT).is_file() else 0
        code = _run(point, watch, threads)
        outcome = _outcome(point, code, said)
        write_record(point, outcome)
        return outcome


def _run(point: Point, watch: Callable[[Path], None] | None, threads: int | None) -> int:
    """The exit status of the process, or of ending it because of a file named `stop`."""
    with open(point.folder / OUTPUT, "ab") as output:
        process = subprocess.Popen(
            _command(point), stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, env=_environment(threads)
        )
        try:
            while True:
                try:
                    return process.wait(POLL_SECONDS)
                except subprocess.TimeoutExpired:
                    if watch is not None:
                        watch(point.folder)
                    if (point.folder / STOP).exists():
                        process.kill()
        except BaseException:
            process.kill()
            raise


def _command(point: Point) -> list[str]:
    from qat.config.overrides import quoted  # imports Hydra

    overrides = [*point.command, *(f"{key}={value}" for key, value in point.params.items())]
    if (point.folder / PROGRESS).is_file():
        overrides = [*(text for text in overrides if not text.startswith("ckpt=")), "ckpt=last"]
    return [sys.executable, "-m", "qat.cli.point", *overrides, f"run_dir={quoted(str(point.folder))}"]


def _environment(threads: int | None) -> dict[str, str]:
    environment = dict(os.environ)
    root = Path(__file__).resolve().parents[2]
    if str(root) != sysconfig.get_path("purelib"):  # a checkout that is not installed
        environment["PYTHONPATH"] = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    if threads is not None:
        environment.setdefault("OMP_NUM_THREADS", str(threads))
    return environment


def _outcome(point: Point, code: int, said: int) -> Outcome:
    """How a process ended that began behind the first `said` bytes of output."""
    if (point.folder / REPORT).is_file():
        return _reported(point.folder / REPORT)  # status 1 then means that the exported file falls short, as it says
    if (point.folder / STOP).exists():
        return PRUNED
    if code < 0:  # its last line is of anything but this
        killed = signal.Signals(-code)
        return Outcome("failed", f"killed by {killed.name}{' (out of memory?)' if killed == signal.SIGKILL else ''}")
    output = (point.folder / OUTPUT).read_bytes()[said:].decode(errors="replace").strip()
    if words := LAST_WORD.findall(output):
        return Outcome("failed", words[-1])
    return Outcome("failed", f"ended with status {code}{output and f': {output.splitlines()[-1]}'}")


def _reported(path: Path) -> Outcome:
    """How a run ended that left a report: one without a number to compare it by failed."""
    try:
        report = read_object(path)
    except UserError as damaged:
        return Outcome("failed", str(damaged))
    value = final_metric(report)
    if value is None or math.isfinite(value):
        return Outcome("done")
    return Outcome("failed", f"{report.get('metric', 'metric')} is {value}")


def write_record(point: Point, outcome: Outcome | None) -> None:
    """Writes down what the point is and how it ended, `None` while it runs."""
    content: dict[str, Any] = {"number": point.number, "params": point.params, "command": point.command}
    content |= asdict(outcome) if outcome else {"state": None, "error": None}
    write_object(point.folder / RECORD, content)
