"""QDQ node units: operations that only move values get Q/DQ nodes of their own, on the grid of what they move.

No value changes: these operations commute with rounding, and a value on a grid stays where it is.
"""

import onnx_ir as ir

MOVES = ("MaxPool", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Slice", "Gather", "Split")
"""Operations that move their first input."""


def make_units(model: ir.Model) -> None:
    """Puts Q/DQ pairs around operations that move values."""
    graph = model.graph
    for quantize in [node for node in graph if node.op_type == "QuantizeLinear"]:
        _before(graph, quantize)
    for node in list(graph):
        if node.op_type in MOVES and _is(node.inputs[0], "DequantizeLinear"):
            _after(graph, node)


def _is(value: ir.Value | None, op_type: str) -> bool:
    producer = value.producer() if value is not None else None
    return producer is not None and producer.op_type == op_type


def _before(graph: ir.Graph, quantize: ir.Node) -> None:
    """Quantizes what enters the chain of moves whose end `quantize` quantizes, and everything between them."""
    move = quantize.inputs[0].producer() if quantize.inputs[0] is not None else None
    while move is not None and move.op_type in MOVES and not _is(move.inputs[0], "DequantizeLinear"):
        source = move.inputs[0]
        if source is None or len(move.outputs[0].uses()) != 1 or move.outputs[0] in graph.outputs:
            return
        move.replace_input_with(0, _pair(graph, source, quantize, before=move))
        move = source.producer()


def _after(graph: ir.Graph, move: ir.Node) -> None:
    dequantize = move.inputs[0].producer() if move.inputs[0] is not None else None
    assert dequantize is not None
    for output in move.outputs:
        users = list(output.uses())
        if output in graph.outputs or all(user.op_type == "QuantizeLinear" for user, _ in users):
            continue
        quantized = _pair(graph, output, dequantize, after=move)
        for user, index in users:
            user.replace_input_with(index, quantized)


def _pair(
    graph: ir.Graph, value: ir.Value, like: ir.Node, before: ir.Node | None = None, after: ir.Node | None = None
) -> ir.Value:
    """`value` through a Q/DQ pair with the scale and zero point of `like`."""
    quantize = ir.node("QuantizeLinear", [value, *like.inputs[1:3]])
    quantize.outputs[0].type = ir.TensorType(like.inputs[2].dtype)  # pyright: ignore[reportArgumentType, reportOptionalMemberAccess]
    dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], *like.inputs[1:3]])
    dequantize.outputs[0].type = value.type
    if before is not None:
        graph.insert_before(before, [quantize, dequantize])
    elif after is not None:
        graph.insert_after(after, [quantize, dequantize])
    return dequantize.outputs[0]
