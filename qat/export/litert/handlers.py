"""Helpers that the handlers of operations share; see `qat.export.litert.lower`."""

from collections.abc import Callable
from typing import Any

from torch import fx

from qat.export.litert.builder import Value
from qat.export.litert.lower import Codes, Lowering, codes_after

Handler = Callable[[Lowering, fx.Node], Any]
SAME, VALID = 0, 1
RELU = 1
"""Numbers of the schema: `Padding`, `ActivationFunctionType.RELU`."""


def pair(value: Any) -> list[int]:
    """One number for each of the two axes of an image."""
    values = list(value) if isinstance(value, list | tuple) else [value]
    return values * 2 if len(values) == 1 else values


def arguments(node: fx.Node, *defaults: Any) -> list[Any]:
    """Positional arguments, completed by defaults."""
    return [*node.args, *defaults[len(node.args) :]]


def operand(low: Lowering, node: Any, integer: bool) -> Value:
    """The operand of an operation, as codes or in float."""
    return low.values[node] if integer else low.float(node)


def aligned(low: Lowering, values: list[Value]) -> list[Value]:
    """Operands brought to one order of memory."""
    last = any(value.last for value in values) and all(len(value.shape) in (0, 4) for value in values)
    return [low.build.ordered(value, last) for value in values]


def finish(low: Lowering, node: fx.Node, output: Value, after: Codes | None, relu: bool = False) -> None:
    """Notes the result of a node: floats, or the codes that a quantize node behind it returns."""
    if after is None:
        low.values[node] = output
    else:
        low.limited(output, after, relu)


def moved(low: Lowering, node: fx.Node, x: Any) -> tuple[Value, Codes | None]:
    """The operand of an operation that picks values: codes, if its result is put on the same grid."""
    after = codes_after(node) if low.is_codes(x) else None
    if after is not None and low.values[x].grid == after.grid:
        return low.values[x], after
    return low.float(x), None
