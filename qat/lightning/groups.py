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
they are made, and so see the final groups. What schedulers take for each group of the user's (functions, highest and
lowest rates) is spread over the groups that there are. Some give all groups one rate during training (the learning rate
finder, stochastic weight averaging): a hook before each step restores the ratio.

Lists of parameters that were complete in float are no longer. Layers that read one tensor share a quantizer, which the
`parameters()` of each of them have. And what a module's own forward quantizes is no child of the submodules whose
`parameters()` a user adds up. `settle` looks at the finished optimizers for both.
"""

import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import MappingProxyType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from qat.errors import UserError
from qat.functional import TINY
from qat.insert import named_quantizers
from qat.layers.site import Site

SGD_FACTOR = 0.1
ADAPTIVE_FACTOR = 3.0
FACTOR = "scale_lr_factor"
"""Key under which a group of scales keeps its factor; checkpoints carry it."""
SPLIT = "scales_of_the_group_before"
"""Key under which a group of scales keeps whether it was split off the user's group in front of it."""
BEFORE = "_scales_before"
"""Attribute under which an optimizer keeps them during a step."""
LARGEST_SGD_CHANGE, LARGEST_CHANGE = 0.2, math.log(2)
"""Of a scale's logarithm in one step."""
EACH = (
    (lr_scheduler.LambdaLR, "lr_lambda"),
    (lr_scheduler.MultiplicativeLR, "lr_lambda"),
    (lr_scheduler.ReduceLROnPlateau, "min_lr"),
)
"""Schedulers with an argument for each group that torch does not ask `_format_param` about."""


def auto_factor(optimizer: torch.optim.Optimizer) -> float:
    """`SGD_FACTOR` for SGD, `ADAPTIVE_FACTOR` for every other optimizer."""
    return SGD_FACTOR if isinstance(optimizer, torch.optim.SGD) else ADAPTIVE_FACTOR


@contextmanager
def own_groups(model: nn.Module, factors: Mapping[str, float | None] = MappingProxyType({"": None})) -> Iterator[None]:
    """While it lasts, every parameter group given to an optimizer loses its scales to groups behind it.

    Args:
        model: With quantizers.
        factors: Learning rate of scales relative to their group's, by path of the submodule that they are in (`""`:
            all); `None` for `auto_factor`.
    """
    factor_of = {
        id(quantizer.scale): factor
        for path, factor in factors.items()
        for _, quantizer in named_quantizers(model.get_submodule(path))
        if isinstance(quantizer.scale, nn.Parameter)
    }
    owned = _owned(model)
    add: Callable[..., None] = torch.optim.Optimizer.add_param_group
    format_param: Callable[..., list[Any]] = lr_scheduler._format_param

    def add_param_group(self: torch.optim.Optimizer, group: dict[str, Any]) -> None:
        if FACTOR in group:  # of another optimizer, which this one wraps
            return add(self, group)
        given = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        members, known = [], _members(self) & owned
        for member in given:  # layers that read one tensor share a quantizer, and each of them lists it
            if (key := id(_tensor(member))) not in known:
                members.append(member)
                known |= {key} & owned
        if isinstance(self, torch.optim.LBFGS):  # one group is all that it takes
            return add(self, {**group, "params": members})
        split: dict[float | None, list[Any]] = {}
        for member in members:
            if id(_tensor(member)) in factor_of:
                split.setdefault(factor_of[id(_tensor(member))], []).append(member)
        rest = [m for m in members if id(_tensor(m)) not in factor_of]
        if rest or not given:
            add(self, {**group, "params": rest})
        lr = group.get("lr", self.defaults.get("lr"))
        for factor, some in split.items():
            by = auto_factor(self) if factor is None else factor
            if not rest and "lr" in group:  # the user's own rate for scales
                by = 1.0
            own = {"params": some, "weight_decay": 0.0, FACTOR: by, SPLIT: bool(rest)}
            add(self, {**group, **own, **({"lr": lr * by} if lr is not None else {})})
        if split and rest and keep_ratio not in self._optimizer_step_pre_hooks.values():
            self.register_step_pre_hook(keep_ratio)
        if split and remember not in self._optimizer_step_pre_hooks.values():
            self.register_step_pre_hook(remember)
            self.register_step_post_hook(in_proportion)

    def format_scaled(name: str, optimizer: torch.optim.Optimizer, param: Any) -> list[Any]:
        if isinstance(param, list | tuple):
            param = _spread(name, optimizer, param)
        values = format_param(name, optimizer, param)
        return _scaled(optimizer, values) if "lr" in name else values

    with ExitStack() as patched:
        patched.enter_context(patch.object(torch.optim.Optimizer, "add_param_group", add_param_group))
        patched.enter_context(patch.object(lr_scheduler, "_format_param", format_scaled))
        for scheduler, argument in EACH:
            patched.enter_context(patch.object(scheduler, "__init__", _spreading(scheduler.__init__, argument)))
        yield


def settle(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Puts what quantizers learn into one optimizer each, whatever parts of the model the optimizers are for.

    A quantizer that two parts share stays in the first of their optimizers, unless these have weights in common, too
    (then a user takes turns). What a module's own forward quantizes, and no part lists, goes where scales of the
    module are.
    """
    owned = _owned(model)
    ids = [_members(optimizer) for optimizer in optimizers]
    for later, optimizer in enumerate(optimizers):
        apart = [own for own in ids[:later] if own & ids[later] <= owned]
        twice = set[int]().union(*apart) & ids[later]
        for group in optimizer.param_groups if twice else ():
            keep = [id(p) not in twice for p in group["params"]]
            for key in {"params", "param_names"} & group.keys():
                group[key] = list(itertools.compress(group[key], keep))
        ids[later] -= twice
    listed = set[int]().union(*ids)
    for path, site in model.named_modules():
        if not isinstance(site, Site):
            continue
        beside = {id(p) for p in model.get_submodule(path.rpartition(".")[0]).parameters()}
        for name, quantizer in named_quantizers(site):
            for of, parameter in quantizer.named_parameters():
                if id(parameter) not in listed:
                    _join((f"{path}.{name}.{of}", parameter), parameter is quantizer.scale, beside, optimizers)
                    listed.add(id(parameter))  # another site may share it


def _owned(model: nn.Module) -> set[int]:
    """Identities of what the quantizers of a model learn."""
    return {id(p) for _, quantizer in named_quantizers(model) for p in quantizer.parameters()}


def _members(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _join(
    named: tuple[str, nn.Parameter], scale: bool, beside: set[int], optimizers: Sequence[torch.optim.Optimizer]
) -> None:
    """Adds a parameter to the first group of its kind behind weights that it goes with: schedulers know that one."""
    for optimizer in optimizers:
        met = False
        for group in optimizer.param_groups:
            met = met or any(id(p) in beside for p in group["params"])
            if met and (FACTOR in group) == scale:
                for key, value in zip(("param_names", "params"), named, strict=True):
                    if key in group:
                        group[key].append(value)
                return


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
    if not scales:  # another optimizer has them (`settle`)
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


def _tensor(member: Any) -> Any:
    """`named_parameters()` gives pairs."""
    return member[1] if isinstance(member, tuple) else member
