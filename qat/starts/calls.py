"""Recorded calls of a module, to be made again: whole calls, however they are made, and single samples of them where a
module answers each by itself.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from qat.layers.twin import ours
from qat.planning.functions import first_tensor, flat
from qat.starts.base import Run

ModuleCall = tuple[tuple[Any, ...], dict[str, Any], Tensor]
"""A call of a module: its arguments by position and by name, and the first tensor of its answer."""


def noted(unit: nn.Module, run: Run) -> list[ModuleCall]:
    """The calls of a unit, in order. Copies, for others may write over their tensors later."""
    begun: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    calls: list[ModuleCall] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with ours():
            begun.append(tree_map_only(Tensor, torch.clone, (args, kwargs)))

    def after(_unit: nn.Module, _args: Any, output: Any) -> None:
        args, kwargs = begun.pop()
        if (y := first_tensor(output)) is not None:
            with ours():
                calls.append((args, kwargs, y.clone()))

    with unit.register_forward_pre_hook(before, with_kwargs=True), unit.register_forward_hook(after):
        run()
    return calls


def joined(calls: list[ModuleCall]) -> list[ModuleCall]:
    """One call for all, where each is of one tensor and they differ in length alone."""
    tensors = [[t for t in flat(call) if isinstance(t, Tensor)] for call in calls]
    if len({tuple(t.shape[1:] for t in one) for one in tensors}) > 1:
        return calls
    x = torch.cat([one[0] for one in tensors])
    args, kwargs, _ = calls[0]
    args, kwargs = tree_map_only(Tensor, lambda _: x, (args, kwargs))
    return [(args, kwargs, torch.cat([y for *_, y in calls]))]


def answers_rows(unit: nn.Module, calls: list[ModuleCall]) -> bool:
    """Whether a unit is called with one tensor and answers each of its rows by itself, whatever the others are.

    That is tried: where the first axis is time, say, what it says about every other row alone is something else.
    """
    for args, kwargs, y in calls:
        tensors = [t for t in flat((args, kwargs)) if isinstance(t, Tensor)]
        if len(tensors) != 1 or not tensors[0].ndim or not y.ndim or len(tensors[0]) != len(y):
            return False
    call = joined(calls)[0]
    args, kwargs, y = tree_map_only(Tensor, lambda t: t[1:64:2].clone(), call)
    answer = first_tensor(unit(*args, **kwargs)) if len(y) else None
    if answer is None or answer.shape != y.shape:
        return False
    return bool((answer - y).float().norm() <= 0.01 * y.float().norm())  # sums may be rounded in another order
