"""The sample that calibration keeps of a batch: some of its values, spread evenly over it, and its extremes."""

import math

import torch
from torch import Tensor

SAMPLES_PER_BATCH = 1 << 17
"""Calibration keeps at most this many values of a batch (and always its extremes)."""


def sample(x: Tensor) -> Tensor:
    """At most `SAMPLES_PER_BATCH` values of `x`, which is not empty, then its lowest and its highest: `[N]`."""
    flat = x.flatten()
    return torch.cat([spread_out(flat), flat.amin()[None], flat.amax()[None]])


def spread_out(flat: Tensor) -> Tensor:
    """Every k-th of many values, k their number divided by the golden ratio and by nothing that divides that number:
    wrapped around, they fall evenly on every row, channel and column, where a short stride meets a few of them.
    """
    count = flat.numel()
    if count <= SAMPLES_PER_BATCH:
        return flat
    step = round(count * 0.618)
    while math.gcd(step, count) > 1:
        step += 1
    return flat[torch.arange(SAMPLES_PER_BATCH, device=flat.device) * step % count]
