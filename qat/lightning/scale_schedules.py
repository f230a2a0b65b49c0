"""Arguments of schedulers that have one value for each parameter group of the user's, given to the groups that there
are.

A user counts groups without those of scales (`qat.lightning.scale_groups`). Functions, highest and lowest rates that
are written one per group go to the scales of each, too: rates times their factor.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.optim import lr_scheduler

from qat.errors import UserError
from qat.lightning.scale_steps import FACTOR, SPLIT

EACH = (
    (lr_scheduler.LambdaLR, "lr_lambda"),
    (lr_scheduler.MultiplicativeLR, "lr_lambda"),
    (lr_scheduler.ReduceLROnPlateau, "min_lr"),
)
"""Schedulers with an argument for each group that torch does not ask `_format_param` about."""


@contextmanager
def values_for_all_groups() -> Iterator[None]:
    """While it lasts, schedulers take lists with one value for each group of the user's."""
    format_param: Callable[..., list[Any]] = lr_scheduler._format_param

    def format_scaled(name: str, optimizer: torch.optim.Optimizer, param: Any) -> list[Any]:
        if isinstance(param, list | tuple):
            param = _spread(name, optimizer, param)
        values = format_param(name, optimizer, param)
        return _scaled(optimizer, values) if "lr" in name else values

    with ExitStack() as patched:
        patched.enter_context(patch.object(lr_scheduler, "_format_param", format_scaled))
        for scheduler, argument in EACH:
            patched.enter_context(patch.object(scheduler, "__init__", _spreading(scheduler.__init__, argument)))
        yield


def _spreading(init: Callable[..., None], argument: str) -> Callable[..., None]:
    """A scheduler's `__init__` that takes a list for the user's groups."""

    @functools.wraps(init)
    def spreading(self: Any, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> None:
        bound = inspect.signature(init).bind(self, optimizer, *args, **kwargs)
        values = bound.arguments.get(argument)
        if isinstance(values, list | tuple):
            values = _spread(argument, optimizer, values)
            bound.arguments[argument] = _scaled(optimizer, values) if argument == "min_lr" else values
        init(*bound.args, **bound.kwargs)

    return spreading


def _spread(name: str, optimizer: torch.optim.Optimizer, values: Sequence[Any]) -> list[Any]:
    """One value per group of the user's becomes one per group: scales take that of the group they were split from."""
    groups = optimizer.param_groups
    if len(values) != (count := sum(not group.get(SPLIT) for group in groups)):
        raise UserError(f"{name}: {len(values)} values for {count} parameter groups; scales take those of their group")
    given, spread = iter(values), []
    for group in groups:
        spread.append(spread[-1] if group.get(SPLIT) else next(given))
    return spread


def _scaled(optimizer: torch.optim.Optimizer, rates: list[Any]) -> list[Any]:
    return [rate * group.get(FACTOR, 1.0) for rate, group in zip(rates, optimizer.param_groups, strict=True)]
