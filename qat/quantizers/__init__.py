"""Quantizers: one file each, found by its name (`QuantSpec.quantizer`). A new one is a new file: nothing lists them."""

import importlib
import inspect
import pkgutil
from functools import cache
from pathlib import Path

import torch
from torch import nn

from qat.errors import UserError, nearest
from qat.grid.spec import QuantSpec
from qat.quantizers.base import Quantizer


def names() -> list[str]:
    """The quantizers that exist: the files of this folder."""
    return sorted(m.name for m in pkgutil.iter_modules([str(Path(__file__).parent)]) if m.name != "base")


@cache
def find(name: str) -> type[Quantizer]:
    """The quantizer class of the file `qat/quantizers/<name>.py`.

    Raises:
        UserError: if there is no such file, with the nearest name.
    """
    if name not in names():
        raise UserError(f"quantizer={name}: no such quantizer{nearest(name, names())}")
    module = importlib.import_module(f"qat.quantizers.{name}")
    mine = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
    (cls,) = (c for c in mine if issubclass(c, Quantizer))
    return cls


def create(spec: QuantSpec, shape: torch.Size | None = None, axis: int = 0) -> Quantizer:
    """Builds the quantizer that `spec` names, with its options. An `axis` below zero counts from the last.

    Raises:
        UserError: for an option that it does not have, or a spec that does not suit it or the shape.
    """
    cls = find(spec.quantizer)
    own = list(inspect.signature(cls.__init__).parameters)[4:]  # behind self, spec, shape and axis
    options = spec.options or {}
    for option in options:
        if option not in own:
            hint = nearest(option, own) if own else "; it has none"
            raise UserError(f"options.{option}: quantizer={spec.quantizer} has no such option{hint}")
    return cls(spec, shape, axis if shape is None else _channel_axis(spec, shape, axis), **options)


def learned_by(model: nn.Module) -> set[int]:
    """Identities of the parameters that the quantizers of a model learn."""
    return {id(p) for m in model.modules() if isinstance(m, Quantizer) for p in m.parameters()}


def _channel_axis(spec: QuantSpec, shape: torch.Size, axis: int) -> int:
    """`axis` of a weight, counted from the first.

    Raises:
        UserError: if the granularity asks for axes that the weight lacks.
    """
    if spec.granularity not in ("channel", "group"):
        return axis
    if len(shape) < 2:
        raise UserError(
            f"granularity={spec.granularity}: a weight of shape {tuple(shape)} has no channels of several numbers; "
            "set granularity: tensor"
        )
    axes = range(2 if spec.granularity == "group" else len(shape))
    found = axis + len(shape) if axis < 0 else axis
    if found not in axes:
        raise UserError(
            f"axis={axis}: granularity={spec.granularity} of a weight of shape {tuple(shape)} takes an axis from 0 to "
            f"{axes[-1]}"
        )
    return found


__all__ = ["Quantizer", "create", "find", "learned_by", "names"]
