"""Grids behind grids, for engines that multiply by the reciprocal of a scale where training divides (`qat.cascades`).

All scales of an interval round the values of the first grid alike. The one that the second QuantizeLinear divides by is
moved away from the ends of the interval; DequantizeLinear keeps what was trained.
"""

from typing import Any

import numpy as np
import onnx_ir as ir

from qat.cascades import MARGIN
from qat.export.onnx.graph import constant, initializer
from qat.export.onnx.units import MOVES

MOVES_VALUES = (*MOVES, "Pad", "Concat", "Max", "Relu")
"""Operations that make no new value but zero, which lies on every grid."""


def steady_cascades(model: ir.Model) -> None:
    """Moves the scale of every QuantizeLinear that reads values of other grids, where one of them is nearly a tie."""
    graph = model.graph
    for node in [node for node in graph if node.op_type == "QuantizeLinear"]:
        sources = _grids(node.inputs[0])
        if not sources:
            continue
        scale = _number(node.inputs[1])
        assert scale is not None
        new = moved(np.concatenate([_values(source) for source in sources]), scale, *_limits(node))
        if new != scale:
            node.replace_input_with(1, initializer(graph, f"{node.outputs[0].name}_divisor", np.array(new)))


def _grids(value: ir.Value | None) -> list[ir.Node]:
    """The DequantizeLinear of every activation grid that `value` consists of; none if it holds other numbers, too."""
    node = None if value is None else value.producer()
    if node is None:
        return []
    if node.op_type == "DequantizeLinear":
        return [node] if _quantize(node) is not None else []
    padding = node.op_type == "Pad" and len(node.inputs) > 2 and node.inputs[2] is not None
    if node.op_type not in MOVES_VALUES or (padding and _number(node.inputs[2]) != 0):
        return []
    found = [_grids(read) for read in (node.inputs if node.op_type in ("Concat", "Max") else node.inputs[:1])]
    return [grid for grids in found for grid in grids] if all(found) else []


def _number(value: ir.Value | None) -> np.ndarray | None:
    """A constant of one element."""
    array = constant(value)
    return array.reshape(()) if array is not None and array.size == 1 else None


def _limits(quantize: ir.Node) -> tuple[int, int]:
    """The lowest and highest code behind a QuantizeLinear, less its zero point."""
    zero = _number(quantize.inputs[2])
    assert zero is not None
    limits, readers = np.iinfo(zero.dtype), [reader for reader, _ in quantize.outputs[0].uses()]
    low, high = np.array(limits.min), np.array(limits.max)
    if [reader.op_type for reader in readers] == ["Clip"]:
        least, most = (_number(limit) for limit in readers[0].inputs[1:3])
        low, high = low if least is None else least, high if most is None else most
    return int(low) - int(zero), int(high) - int(zero)


def _quantize(dequantize: ir.Node) -> ir.Node | None:
    """The QuantizeLinear that made the codes; `None` if they are constants."""
    codes = dequantize.inputs[0]
    node = None if codes is None else codes.producer()
    if node is not None and node.op_type == "Clip" and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node if node is not None and node.op_type == "QuantizeLinear" else None


def _values(dequantize: ir.Node) -> np.ndarray:
    """Every value that a grid has, in float32, as training computes them."""
    quantize, scale = _quantize(dequantize), _number(dequantize.inputs[1])
    assert quantize is not None and scale is not None
    low, high = _limits(quantize)
    return np.arange(low, high + 1).astype(np.float32) * scale


def moved(values: np.ndarray, scale: Any, low: int, high: int) -> np.float32:
    """The scale nearest to `scale` that gives all values the codes that it gives them, and none near a tie; where there
    is none, the middle of those that give these codes (which may be no other than `scale`).

    Args:
        values: The numbers that are quantized, `[N]`.
        scale: One float32.
        low, high: The lowest and the highest code, less the zero point.
    """

    def codes(divisor: Any) -> np.ndarray:
        return np.clip(np.rint(values / divisor), low, high)

    as_trained, size = codes(scale), np.abs(values.astype(np.float64))
    code, above = np.abs(as_trained), as_trained != 0
    not_clipped = (values > 0) & (as_trained < high) | (values < 0) & (as_trained > low)

    def between(margin: float) -> tuple[float, float]:
        least = (size / (code + 0.5 - margin))[not_clipped].max(initial=0)
        return float(least), float((size[above] / (code[above] - 0.5 + margin)).min(initial=np.inf))

    least, most = between(MARGIN)
    new = np.float32(min(max(float(scale), least), most) if least <= most else sum(between(0)) / 2)
    return new if (codes(new) == as_trained).all() else np.float32(scale)
