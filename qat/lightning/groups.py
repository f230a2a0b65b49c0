"""Scales in optimizer groups of their own: no weight decay, and a learning rate relative to that of the weights
beside them.

LSQ scales the gradient of a step size so that, under SGD, it moves as fast as the weights do; with one step per channel
that is noisier than with one per tensor, and a tenth is safer (2 bits at a high learning rate can collapse without it).
Adaptive optimizers divide any such factor out again: under Adam a step size moves by the whole learning rate each step,
whether it is 0.1 or 0.0001. So there it moves in proportion to itself: by that share, as if its logarithm were trained.
The factor is `SGD_FACTOR` for SGD and `ADAPTIVE_FACTOR` for all others.

Under SGD, too, a change is applied to the logarithm of a scale, which is the same where it is small, and never exceeds
a fifth in one step. Scales of 8-bit weights are so small that a gradient a hundred times as large as usual, as a run
has now and then, would take one below zero, and a BatchNorm behind a channel without a grid turns what is left into
gradients that no later step survives.

The split happens while the optimizer is constructed, not afterwards: schedulers copy the groups' learning rates when
they are made, and so see the final groups. Two of them overwrite those rates (OneCycleLR, CyclicLR); what they are
told is multiplied by each group's factor, too. Others give all groups one rate during training (the learning rate
finder, stochastic weight averaging): a hook before each step restores the ratio.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from qat.functional import TINY

SGD_FACTOR = 0.1
ADAPTIVE_FACTOR = 3.0
FACTOR = "scale_lr_factor"
"""Key under which a group of scales keeps its factor; checkpoints carry it."""
BEFORE = "_scales_before"
"""Attribute under which an optimizer keeps them during a step."""
LARGEST_SGD_CHANGE, LARGEST_CHANGE = 0.2, 0.6931471805599453
"""Of a scale's logarithm in one step."""


def auto_factor(optimizer: torch.optim.Optimizer) -> float:
    """`SGD_FACTOR` for SGD, `ADAPTIVE_FACTOR` for every other optimizer."""
    return SGD_FACTOR if isinstance(optimizer, torch.optim.SGD) else ADAPTIVE_FACTOR


@contextmanager
def own_groups(scales: list[tuple[nn.Parameter, float | None]]) -> Iterator[None]:
    """While it lasts, every parameter group given to an optimizer loses its scales to groups behind it.

    Args:
        scales: The parameters to set apart, each with its learning rate relative to its group's (`None` for
            `auto_factor`).
    """
    factor_of = {id(scale): factor for scale, factor in scales}
    add: Callable[..., None] = torch.optim.Optimizer.add_param_group
    format_param: Callable[..., list[Any]] = lr_scheduler._format_param

    def add_param_group(self: torch.optim.Optimizer, group: dict[str, Any]) -> None:
        members = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        split: dict[float | None, list[Any]] = {}
        for member in members:
            if id(_tensor(member)) in factor_of:
                split.setdefault(factor_of[id(_tensor(member))], []).append(member)
        rest = [m for m in members if id(_tensor(m)) not in factor_of]
        if rest or not split:
            add(self, {**group, "params": rest})
        lr = group.get("lr", self.defaults.get("lr"))
        for factor, some in split.items():
            by = auto_factor(self) if factor is None else factor
            own = {"params": some, "weight_decay": 0.0, FACTOR: by, **({"lr": lr * by} if lr is not None else {})}
            add(self, {**group, **own})
        if split and rest and keep_ratio not in self._optimizer_step_pre_hooks.values():
            self.register_step_pre_hook(keep_ratio)
        if split and remember not in self._optimizer_step_pre_hooks.values():
            self.register_step_pre_hook(remember)
            self.register_step_post_hook(in_proportion)

    def format_scaled(name: str, optimizer: torch.optim.Optimizer, param: Any) -> list[Any]:
        factors = [group.get(FACTOR) for group in optimizer.param_groups]
        if isinstance(param, list | tuple) and len(param) == sum(f is None for f in factors):
            param = _spread(param, factors)
        values = format_param(name, optimizer, param)
        return [v if f is None or "lr" not in name else v * f for v, f in zip(values, factors, strict=True)]

    with (
        patch.object(torch.optim.Optimizer, "add_param_group", add_param_group),
        patch.object(lr_scheduler, "_format_param", format_scaled),
    ):
        yield


def keep_ratio(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Before a step: scales learn at their factor of the rate beside them, whoever has set all groups to one rate
    since.
    """
    beside: Any = None
    for group in optimizer.param_groups:
        if FACTOR not in group:
            beside = group["lr"]
        elif beside is not None:
            group["lr"] = beside * group[FACTOR]


def _scales(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    return (scale for group in optimizer.param_groups if FACTOR in group for scale in group["params"])


def remember(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Before a step: keeps the scales for `in_proportion`."""
    vars(optimizer)[BEFORE] = [scale.detach().clone() for scale in _scales(optimizer)]


@torch.no_grad()
def in_proportion(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """After a step: makes each scale's change one of its logarithm, so that it stays positive, and limits it."""
    scales, before = list(_scales(optimizer)), vars(optimizer).pop(BEFORE)
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


def _spread(values: list[Any] | tuple[Any, ...], factors: list[float | None]) -> list[Any]:
    """One value per group of the user's becomes one per group: scales take that of the group they were split from."""
    given, spread = iter(values), []
    for factor in factors:
        spread.append(next(given) if factor is None else spread[-1])
    return spread


def _tensor(member: Any) -> Any:
    """`named_parameters()` gives pairs."""
    return member[1] if isinstance(member, tuple) else member
