"""Optimizer steps of scales: they keep their share of the learning rate, and move by their logarithm.

Under SGD, too, a change is applied to the logarithm of a scale, which is the same where it is small, and never exceeds
a fifth in one step. Scales of 8-bit weights are so small that a gradient a hundred times as large as usual, as a run
has now and then, would take one below zero, and a BatchNorm behind a channel without a grid turns what is left into
gradients that no later step survives.

Some schedulers give all groups one rate during training (the learning rate finder, stochastic weight averaging): a hook
before each step restores the ratio.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from qat.grid.functional import TINY

FACTOR = "scale_lr_factor"
"""Key under which a group of scales keeps its factor; checkpoints carry it."""
SPLIT = "scales_of_the_group_before"
"""Key under which a group of scales keeps whether it was split off the user's group in front of it."""
BEFORE = "_scales_before"
"""Attribute under which an optimizer keeps the scales during a step."""
LARGEST_SGD_CHANGE, LARGEST_CHANGE = 0.2, math.log(2)
"""Largest change of a scale's logarithm in one step, under SGD and under other optimizers."""


def keep_ratio(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Before a step: scales learn at their factor of the rate of the group they were split from, whoever has set all
    groups to one rate since.
    """
    beside: Any = None
    for group in optimizer.param_groups:
        if group.get(SPLIT):
            group["lr"] = beside * group[FACTOR]
        else:
            beside = group["lr"]


def _scales(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    return (scale for group in optimizer.param_groups if FACTOR in group for scale in group["params"])


def remember(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Before a step: keeps the scales for `in_proportion`."""
    vars(optimizer)[BEFORE] = [scale.detach().clone() for scale in _scales(optimizer)]


@torch.no_grad()
def in_proportion(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """After a step: makes each scale's change one of its logarithm, so that it stays positive, and limits it."""
    scales, before = list(_scales(optimizer)), vars(optimizer).pop(BEFORE)
    if not scales:  # another optimizer has them (`assign_scales`)
        return
    change = torch._foreach_sub(scales, before)
    largest = LARGEST_CHANGE
    if isinstance(optimizer, torch.optim.SGD):
        largest = LARGEST_SGD_CHANGE
        torch._foreach_div_(change, torch._foreach_clamp_min(before, TINY))
    torch._foreach_clamp_min_(change, -largest)
    torch._foreach_clamp_max_(change, largest)
    torch._foreach_exp_(change)
    torch._foreach_mul_(change, before)
    torch._foreach_copy_(scales, change)
