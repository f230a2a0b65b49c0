"""How fast, how big and how hungry files are, measured so that they can be compared.

Latencies are interleaved: in every round each file runs once, so that a machine that slows down slows all of them. Peak
memory is that of a process of its own per file, above what it needed before it opened the file.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from qat.errors import UserError
from qat.export.target import Runner

FLOAT = "float"
"""What the float file is called."""
WARM_UP = 0.1
"""Share of the rounds that are run before any is counted."""


@dataclass(frozen=True)
class Timing:
    """Speed of one file at one batch size and number of threads.

    Attributes:
        p50, p99: Milliseconds per batch.
        throughput: Samples per second, at the median.
    """

    batch: int
    threads: int
    p50: float
    p99: float
    throughput: float


@dataclass
class Measured:
    """All of one file.

    Attributes:
        name: Path of the file as the user wrote it; `FLOAT` for the float file beside it.
        bytes: Size on disk with companions.
        peak_memory: Bytes above what the process had before it opened the file; `None` where it cannot be measured.
        timings: One per batch size and number of threads.
        float_nodes: Layers that the runtime computes in float; `None` where it cannot be seen.
    """

    name: str
    bytes: int
    peak_memory: int | None = None
    timings: list[Timing] = field(default_factory=list)
    float_nodes: list[str] | None = None


def interleaved(
    runners: Mapping[str, Runner], x: np.ndarray, rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, np.ndarray]:
    """Seconds of every call on `x`, by runner, all of them called in turn.

    Args:
        runners: The files.
        x: The batch.
        rounds: Calls of each that count; a few before them do not.
        clock: In seconds.
    """
    times: dict[str, list[float]] = {name: [] for name in runners}
    warm_up = int(rounds * WARM_UP)
    for step in range(warm_up + rounds):
        for name, runner in runners.items():
            start = clock()
            runner(x)
            if step >= warm_up:
                times[name].append(clock() - start)
    return {name: np.array(values) for name, values in times.items()}


def rounds_in(seconds: float, runners: Mapping[str, Runner], x: np.ndarray) -> int:
    """How many rounds of `interleaved` take that long, by the time of one; at least 20."""
    start = time.perf_counter()
    for runner in runners.values():
        runner(x)
    return max(20, int(seconds / max(time.perf_counter() - start, 1e-6)))


def latency_ms(runners: Mapping[str, Runner], sample: np.ndarray, rounds: int = 200) -> dict[str, float]:
    """Median milliseconds for one sample, by runner."""
    return {name: float(np.median(times)) * 1e3 for name, times in interleaved(runners, sample, rounds).items()}


def timing(times: np.ndarray, batch: int, threads: int) -> Timing:
    """Sums up seconds per call."""
    p50, p99 = np.percentile(times, [50, 99])
    return Timing(batch, threads, float(p50) * 1e3, float(p99) * 1e3, batch / float(p50))


def peak_memory(arguments: Sequence[str]) -> int | None:
    """Peak memory of opening a file and running it, in a process of its own.

    Args:
        arguments: Arguments of `qat.cli.bench_one`.

    Returns:
        Bytes; `None` where the system does not tell.

    Raises:
        UserError: if the process fails, with the last line that it said.
    """
    done = subprocess.run([sys.executable, "-m", "qat.cli.bench_one", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise UserError((done.stderr.strip().splitlines() or ["the measuring process died"])[-1])
    value = done.stdout.strip().splitlines()[-1]
    return None if value == "unknown" else int(value)


def high_water() -> int | None:
    """The largest resident size that this process ever had, in bytes; `None` where the system does not tell."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    line = next((text for text in status.read_text().splitlines() if text.startswith("VmHWM")), None)
    return None if line is None else int(line.split()[1]) * 1024


def float_of(measured: Sequence[Measured]) -> Measured | None:
    """The float file among them, which comes first; `None` if there is none to compare with."""
    return measured[0] if measured[0].name == FLOAT else None


def slower(measured: Measured, reference: Measured) -> list[tuple[Timing, float]]:
    """The timings at which a file is slower than the float one by more than the noise of a median (2%), and how many
    times."""
    base = {(t.batch, t.threads): t.p50 for t in reference.timings}
    factors = [(t, t.p50 / base[t.batch, t.threads]) for t in measured.timings]
    return [(t, factor) for t, factor in factors if factor > 1.02]
