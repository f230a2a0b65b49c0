"""Interleaved timing: every candidate runs in turn, so that a machine that slows down slows all of them, and ratios
keep their meaning.
"""

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Timing:
    """Medians over the rounds of one candidate.

    Attributes:
        cpu: Seconds of processor time (all threads of the process).
        wall: Seconds on the clock.
        ratio: Median over the rounds of its processor time over the baseline's in the same round.
    """

    cpu: float
    wall: float
    ratio: float


def interleave(
    candidates: Mapping[str, Callable[[], object]], baseline: str, seconds: float = 3.0, warmup: int = 3
) -> dict[str, Timing]:
    """Runs every candidate in turn for about `seconds` each (at least 5 rounds), the garbage collector off.

    Args:
        candidates: What to time, by name.
        baseline: Name of the candidate that the others are compared with.
        seconds: Processor time for the slowest candidate.
        warmup: Rounds that don't count.
    """
    slowest = 0.0
    for function in candidates.values():
        for _ in range(warmup):
            start = time.process_time()
            function()
        slowest = max(slowest, time.process_time() - start)
    rounds = int(min(max(seconds / max(slowest, 1e-6), 5), 2000))
    cpu, wall = ({name: np.zeros(rounds) for name in candidates} for _ in range(2))
    gc.disable()
    try:
        for i in range(rounds):
            for name, function in candidates.items():
                start, clock = time.process_time(), time.perf_counter()
                function()
                cpu[name][i], wall[name][i] = time.process_time() - start, time.perf_counter() - clock
    finally:
        gc.enable()
    return {
        name: Timing(
            float(np.median(cpu[name])), float(np.median(wall[name])), float(np.median(cpu[name] / cpu[baseline]))
        )
        for name in candidates
    }


def bytes_saved_for_backward(forward: Callable[[], torch.Tensor], *, inputs: tuple[torch.Tensor, ...]) -> int:
    """Bytes that autograd keeps for the backward pass beyond `inputs` themselves."""
    own = {t.untyped_storage().data_ptr() for t in inputs}
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        forward()
    return sum(kept.values())
