"""Scales in optimizer groups of their own: no weight decay, and a learning rate relative to that of the weights
beside them.

LSQ scales the gradient of a step size so that, under SGD, it moves as fast as the weights do; with one step per channel
that is noisier than with one per tensor, and a tenth is safer (2 bits at a high learning rate can collapse without it).
Adaptive optimizers divide any such factor out again: under Adam a step size moves by the whole learning rate each step,
whether it is 0.1 or 0.0001. So there it moves in proportion to itself (`qat.lightning.scale_steps`): by that share, as
if its logarithm were trained. The factor is `SGD_FACTOR` for SGD and `ADAPTIVE_FACTOR` for all others.

The split happens while the optimizer is constructed, not afterwards: schedulers copy the groups' learning rates when
they are made, and so see the final groups (`qat.lightning.scale_schedules`). Groups that join during training (layers
that were frozen first) are split as they do (`late_groups`).

Lists of parameters that were complete in float are no longer. Layers that read one tensor share a quantizer, which the
`parameters()` of each of them have. And what a module's own forward quantizes is no child of the submodules whose
`parameters()` a user adds up. `assign_scales` looks at the finished optimizers for both.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from qat.insert import named_quantizers
from qat.layers.site import Site
from qat.lightning.scale_schedules import values_for_all_groups
from qat.lightning.scale_steps import FACTOR, SPLIT, in_proportion, keep_ratio, remember
from qat.quantizers import learned_by

SGD_FACTOR = 0.1
ADAPTIVE_FACTOR = 3.0


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
    owned = learned_by(model)
    add: Callable[..., None] = torch.optim.Optimizer.add_param_group

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
        if split:
            _watch(self)

    with patch.object(torch.optim.Optimizer, "add_param_group", add_param_group), values_for_all_groups():
        yield


@contextmanager
def late_groups(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], factors: Mapping[str, float | None]
) -> Iterator[None]:
    """`own_groups` for optimizers that train already: what joins them brings all that its quantizers learn, but for
    what another trains.
    """
    with own_groups(model, factors):
        add: Callable[..., None] = torch.optim.Optimizer.add_param_group

        def add_param_group(self: torch.optim.Optimizer, group: dict[str, Any]) -> None:
            add(self, group)
            others = [o for o in optimizers if o.param_groups is not self.param_groups]
            if len(others) < len(optimizers):  # it is one of them, or Lightning's of it
                _leave_to(others, self, learned_by(model))
                _join_sites(model, optimizers)

        with patch.object(torch.optim.Optimizer, "add_param_group", add_param_group):
            yield


def _watch(optimizer: torch.optim.Optimizer) -> None:
    """Lets `qat.lightning.scale_steps` see an optimizer's steps, once."""
    if remember not in optimizer._optimizer_step_pre_hooks.values():
        optimizer.register_step_pre_hook(keep_ratio)
        optimizer.register_step_pre_hook(remember)
        optimizer.register_step_post_hook(in_proportion)


def assign_scales(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Puts what quantizers learn into one optimizer each, whatever parts of the model the optimizers are for.

    A quantizer that two parts share stays in the first of their optimizers, unless these have weights in common, too
    (then a user takes turns). What a module's own forward quantizes, and no part lists, goes where scales of the
    module are. An optimizer without scales is ready for those of layers that join it later: when training resumes,
    their groups are put in without a call.
    """
    owned = learned_by(model)
    for later, optimizer in enumerate(optimizers):
        _leave_to(optimizers[:later], optimizer, owned)
    _join_sites(model, optimizers)
    for optimizer in optimizers:  # one with scales is watched already, or wraps another that is
        if not any(FACTOR in group for group in optimizer.param_groups):
            _watch(optimizer)


def _leave_to(others: Sequence[torch.optim.Optimizer], optimizer: torch.optim.Optimizer, owned: set[int]) -> None:
    """Takes what quantizers learn (`owned`) out of an optimizer where one of the others has it, and no weight of it."""
    own = _members(optimizer)
    twice = set[int]().union(*(shared for other in others if (shared := _members(other) & own) <= owned))
    for group in optimizer.param_groups if twice else ():
        keep = [id(p) not in twice for p in group["params"]]
        for key in {"params", "param_names"} & group.keys():
            group[key] = list(itertools.compress(group[key], keep))


def _join_sites(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Adds what no optimizer lists of what a module's own forward quantizes."""
    listed = set[int]().union(*map(_members, optimizers))
    for path, site in model.named_modules():
        if not isinstance(site, Site):
            continue
        beside = {id(p) for p in model.get_submodule(path.rpartition(".")[0]).parameters()}
        for name, quantizer in named_quantizers(site):
            for of, parameter in quantizer.named_parameters():
                if id(parameter) not in listed:
                    _join((f"{path}.{name}.{of}", parameter), parameter is quantizer.scale, beside, optimizers)
                    listed.add(id(parameter))  # another site may share it


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


def _tensor(member: Any) -> Any:
    """`named_parameters()` gives pairs."""
    return member[1] if isinstance(member, tuple) else member
