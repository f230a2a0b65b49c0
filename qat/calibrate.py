"""Calibration: one look at data gives every quantizer its first range.

All activation quantizers observe the float model at once (they pass values through while observing), weights are read
where they lie.
"""

import re
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from qat.cascades import untie
from qat.copies import copied
from qat.errors import UserError
from qat.insert import apply_plan, named_quantizers
from qat.layers.weights import quantized_weights
from qat.modes import evaluating
from qat.planning.functions import PROBABILITIES
from qat.planning.plan import Plan
from qat.quantizers import Quantizer
from qat.shards import whole

Named = tuple[str, Quantizer]


def calibrated(model: nn.Module, plan: Plan, run: Callable[[nn.Module], Any]) -> nn.Module:
    """A copy of a float model with the grids of a plan and their ranges; the model stays as it is.

    Args:
        model: The float model.
        plan: The plan of its grids.
        run: Lets calibration batches pass a model.
    """
    made = copied(model)
    apply_plan(made, plan)
    calibrate(made, lambda: run(made))
    return made


def needs_calibration(model: nn.Module) -> bool:
    return any(not q.initialised for _, q in named_quantizers(model))


@torch.no_grad()
def calibrate(model: nn.Module, run: Callable[[], Any], only: Collection[Quantizer] | None = None) -> None:
    """Sets every range from the weights and from what `run()` lets pass.

    Args:
        model: A model with quantizers.
        run: Calls the model on calibration batches.
        only: The quantizers that get a range, `None` for all; the others keep theirs.

    Raises:
        UserError: naming the quantizer that saw nothing (unless one of its kind did, in another member of the same
            list of modules: then it starts with that range, with a warning), or saw NaN or infinity.
    """
    wanted = {quantizer for _, quantizer in named_quantizers(model)} if only is None else set(only)
    if not wanted:
        return
    borrowers: list[tuple[str, Quantizer, list[Named]]] = []
    with observing(model) as found:
        with evaluating(model), _naming(found):
            run()
        weights = {quantizer: whole(weight.tensor) for quantizer, weight in quantized_weights(model).items()}
        unseen = [(n, q) for n, q in found if q.needs_range and q not in weights and not q.samples]
        for name, quantizer in found:
            if quantizer not in wanted:
                continue
            if (name, quantizer) not in unseen or not (siblings := _siblings(name, quantizer, found, unseen)):
                with _named(name):
                    quantizer.calibrate(weights.get(quantizer))
            else:
                borrowers.append((name, quantizer, siblings))
        for name, quantizer, siblings in borrowers:
            _borrow(name, quantizer, siblings)
        untie(model, wanted)


@contextmanager
def observing(model: nn.Module) -> Iterator[list[Named]]:
    """All quantizers, which are yielded, observe meanwhile."""
    found = list(named_quantizers(model))
    for _, quantizer in found:
        quantizer.observe()
    try:
        yield found
    finally:
        for _, quantizer in found:
            quantizer.observe(False)


def _siblings(name: str, quantizer: Quantizer, found: list[Named], unseen: list[Named]) -> list[Named]:
    """Calibrated grids at the same place in other members of a list of modules: `experts.3.up` of `experts.0.up`."""
    parts = name.split(".")
    patterns = [
        re.compile(r"\.".join(r"\d+" if i == at else re.escape(p) for i, p in enumerate(parts)))
        for at, part in enumerate(parts)
        if part.isdigit()
    ]
    for pattern in reversed(patterns):  # the innermost list first: another expert before another block
        alike = [(n, q) for n, q in found if pattern.fullmatch(n) and q.spec == quantizer.spec and (n, q) not in unseen]
        if alike:
            return alike
    return []


def _borrow(name: str, quantizer: Quantizer, siblings: list[Named]) -> None:
    """Takes the widest range among those of siblings: an expert that no token was sent to is no mistake."""
    lender, widest = max(siblings, key=lambda named: float(named[1].scale.detach().sum()))
    quantizer.load_state_dict(widest.state_dict())
    warnings.warn(
        f"nothing passed through '{name}' during calibration (an expert that no token was sent to?); it starts with "
        f"the range of '{lender}'; more calibration samples would give it one of its own",
        stacklevel=3,
    )


@contextmanager
def _naming(found: list[Named]) -> Iterator[None]:
    """Puts the name of the quantizer in front of what it complains about meanwhile."""
    running: list[str] = []
    with ExitStack() as hooks:
        for name, quantizer in found:
            hooks.enter_context(quantizer.register_forward_pre_hook(lambda *_, name=name: running.append(name)))
            hooks.enter_context(quantizer.register_forward_hook(lambda *_: running.clear()))
        try:
            yield
        except UserError as error:
            if not running:
                raise
            raise UserError(f"calibrating '{running[-1]}': {error}{_way_out(running[-1])}") from None


def _way_out(quantizer: str) -> str:
    """A hint for the message: the rule that leaves this tensor float. Empty for weights, which have to be repaired."""
    found = re.match("(.*)(input|output|probability)_quantizer", quantizer)
    if found is None:
        return ""
    owner, kind = found.groups()
    reader = f"{owner}{PROBABILITIES}" if kind == "probability" else owner.removesuffix(".") or "*"
    return f"; if it belongs there (a mask), leave it float with a rule such as {{match: '{reader}', act: off}}"


@contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"calibrating '{name}': {error}") from None
