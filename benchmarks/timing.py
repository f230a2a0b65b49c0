"""Interleaved timing: every candidate runs in turn, so that a machine that slows down slows all of them, and ratios
keep their meaning; in another order each round, since a candidate finds in the caches what the one before it left.
"""

import gc
import random
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
    """Runs every candidate once a round for about `seconds` each (at least 5 rounds), the garbage collector off.

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
    order, shuffle = list(candidates.items()), random.Random(0).shuffle
    gc.disable()
    try:
        for i in range(rounds):
            shuffle(order)
            for name, function in order:
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


def _allocations(function: Callable[[], object]) -> list[int]:
    """Bytes of each allocation (positive) and release of torch's own allocator while `function` runs, in order.

    Exact, the same in every run, and blind to what the process imported and to what malloc keeps back, which is what
    resident memory mostly shows. What other allocators do (the scratch space of oneDNN and MKL) is not seen.
    """
    gc.collect()  # what is released in here shall have been allocated in here
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = function()
    results = profile.profiler.kineto_results  # the public views attribute allocations to operations and lose order
    del kept
    return [size for _, size in sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")]


def bytes_saved_for_backward(forward: Callable[[], torch.Tensor]) -> int:
    """Bytes that only the graph of a forward pass keeps alive: what backward needs, beyond what was there before."""
    forward()
    return sum(_allocations(lambda: forward().grad_fn))


def peak_memory(step: Callable[[], object]) -> int:
    """The most bytes that one call of `step` holds at once beyond what was there before."""
    step()
    return int(np.cumsum(_allocations(step)).max(initial=0))
