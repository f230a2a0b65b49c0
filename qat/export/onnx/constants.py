"""Constants on grids. A tensor that is computed from no data (a slice of a table of positions, a buffer) becomes the
codes that QuantizeLinear would make of it each time: they take fewer bytes, and OpenVINO cannot compile such a node.
"""

from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from qat.export.onnx.graph import constant, initializer


def quantize_constants(model: ir.Model) -> None:
    """Replaces every QuantizeLinear (and the Clip behind it) of a constant by its codes."""
    graph = model.graph
    for node in list(graph):
        codes = _codes(node)
        if codes is not None:
            output = node.outputs[0]
            ir.convenience.replace_all_uses_with(output, initializer(graph, f"{output.name}_codes", codes))
    common.RemoveUnusedNodesPass()(model)


def _codes(node: ir.Node) -> np.ndarray | None:
    """Codes that a node makes of constants; `None` if it makes anything else."""
    if node.op_type not in ("QuantizeLinear", "Clip") or (x := _value(node.inputs[0])) is None:
        return None
    first, second = (_value(value) for value in node.inputs[1:3])
    if first is None or second is None or second.dtype.kind not in "iu" or first.size != 1:
        return None
    if node.op_type == "Clip":
        return x.clip(first, second)
    limits = np.iinfo(second.dtype)
    return (np.rint(x / first) + second.astype(np.float32)).clip(limits.min, limits.max).astype(second.dtype)


def _value(value: ir.Value | None) -> Any:
    """The value of a constant, or of a constant's codes."""
    node = None if value is None else value.producer()
    if (array := constant(value)) is not None or node is None or node.op_type != "DequantizeLinear":
        return array
    codes, scale, zero = (_value(each) for each in node.inputs[:3])
    if codes is None or scale is None or scale.size != 1 or zero is None or zero.dtype.kind not in "iu":
        return None
    return (codes.astype(np.float32) - zero.astype(np.float32)) * scale
