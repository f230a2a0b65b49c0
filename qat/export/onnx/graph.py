"""What the passes over a graph share: its constants, and nodes that are put between a value and its readers."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx_ir as ir

PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
PASS_THROUGH = ("MaxPool", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose")
"""Operations that commute with clipping."""


def constant(value: ir.Value | None) -> Any:
    """The array of a constant; `None` for every other value."""
    return None if value is None or value.const_value is None else value.const_value.numpy()


def array_value(name: str, array: np.ndarray) -> ir.Value:
    """A constant that is in no graph yet."""
    tensor = ir.tensor(array, name=name)
    return ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape))


def initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """The constant of that name, which is registered if there is none."""
    if name not in graph.initializers:
        graph.register_initializer(array_value(name, array))
    return graph.initializers[name]


def comes_from_codes(value: ir.Value | None) -> bool:
    """Whether a value is on a grid: dequantized, or what operations that only move values make of such a value."""
    node = None if value is None else value.producer()
    while node is not None and node.op_type in PASS_THROUGH and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node is not None and node.op_type == "DequantizeLinear"


def insert_behind(graph: ir.Graph, value: ir.Value, op_type: str, *others: ir.Value | None) -> ir.Node:
    """A new node of `value` and `others`, whose output takes the place of `value` wherever that is read or returned."""
    made = ir.node(op_type, [None, *others])
    ir.convenience.replace_all_uses_with(value, made.outputs[0], replace_graph_outputs=True)
    made.replace_input_with(0, value)
    _place(graph, value, made)
    return made


def guard(graph: ir.Graph, value: ir.Value, readers: Iterable[tuple[ir.Node, int]]) -> None:
    """Puts a Max of one input, which changes nothing and which ONNX Runtime neither removes nor fuses, between a value
    and inputs that read it."""
    kept = ir.node("Max", [value])
    _place(graph, value, kept)
    for reader, index in readers:
        reader.replace_input_with(index, kept.outputs[0])


def _place(graph: ir.Graph, value: ir.Value, node: ir.Node) -> None:
    producer = value.producer()
    assert producer is not None
    graph.insert_after(producer, node)
