"""Rewrites for OpenVINO's CPU plugin: graphs that it would compute otherwise than they say are written so that it does
not (2026.4, measured: tests/test_rules_openvino.py).

    averages    of codes are rounded to codes, unless their readers are quantizers or nothing that can be quantized; and
                a norm behind a grid takes the variance of codes, to which its epsilon means something else
    extremes    ReduceMax and ReduceMin return other values where the quantizer behind them is fused into them
    joins       a quantizer behind a concatenation of quantized tensors is moved in front of it. Convolutions read
                unsigned codes, and signed ones that become so in front of a concatenation lose their scale
    no bias     the scales of a product's channels, which stop at a bias, are carried on through what follows: through a
                reshape of [N * T, C] to [N, T, C] they become those of T (and the plugin refuses the file if C does
                not divide T), and through a mean over T others yet

A Max with -inf, which changes no value and which the plugin neither removes nor fuses with what is in front of it,
stands behind such averages and extremes. Signed codes that go through or come from a concatenation to a convolution are
unsigned in the file, by half of their range, as the plugin makes them elsewhere. Products with a scale for each channel
and without a bias, or with none but zeros, get the smallest one that is not zero.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

from qat.export.onnx.cascades import MOVES_VALUES
from qat.export.onnx.graph import PRODUCTS, constant, initializer, insert_behind
from qat.export.onnx.units import MOVES

AVERAGES = ("AveragePool", "GlobalAveragePool")
EXTREMES = ("ReduceMax", "ReduceMin")
HALF = 128
LEAST = np.finfo(np.float32).tiny
"""A bias that is none: it is lost in any sum, and 0 + 1e-38 lies in the same step as 0."""


def evade_rewrites(model: ir.Model) -> None:
    """Gives products biases, keeps averages and extremes apart from their readers, and makes signed codes of joined
    tensors unsigned."""
    graph, lowest = model.graph, np.array(-np.inf, np.float32)
    for node in list(graph):
        if node.op_type in PRODUCTS and _scaled_by_channel(node.inputs[1]) and not _biased(node):
            _add_bias(graph, node)
        averages = node.op_type in AVERAGES and any(r.op_type != "QuantizeLinear" for r in _readers(node))
        real = node.outputs[0].dtype in (None, ir.DataType.FLOAT)  # not of what `any` and `all` become
        if averages or (node.op_type in EXTREMES and real):
            insert_behind(graph, node.outputs[0], "Max", initializer(graph, "minus_infinity", lowest))
        elif node.op_type == "QuantizeLinear" and node.inputs[2].dtype == ir.DataType.INT8:  # pyright: ignore[reportOptionalMemberAccess]
            source = node.inputs[0].producer() if node.inputs[0] is not None else None
            if _joined(node.outputs[0], source is not None and source.op_type == "Concat"):
                _make_unsigned(graph, node)


def _scaled_by_channel(weight: ir.Value | None) -> bool:
    source = weight.producer() if weight is not None else None
    if source is None or source.op_type not in (*MOVES, "DequantizeLinear"):
        return False
    if source.op_type in MOVES:
        return _scaled_by_channel(source.inputs[0])
    scale = source.inputs[1]
    return scale is not None and scale.const_value is not None and scale.const_value.size > 1


def _biased(product: ir.Node) -> bool:
    """Whether something is added that is not zero in every channel, as biases are before training."""
    if product.op_type != "MatMul":
        return _nonzero(product.inputs[2] if len(product.inputs) > 2 else None)
    readers = product.outputs[0].consumers()
    return len(readers) == 1 and readers[0].op_type == "Add" and any(map(_nonzero, readers[0].inputs))


def _nonzero(bias: ir.Value | None) -> bool:
    source = bias.producer() if bias is not None else None
    values = constant(source.inputs[0] if source is not None and source.op_type == "DequantizeLinear" else bias)
    return values is not None and bool(values.any())


def _add_bias(graph: ir.Graph, product: ir.Node) -> None:
    """Adds next to nothing to each channel; a constant of its own, since the plugin fuses none that others read."""
    output = product.outputs[0]
    assert output.shape is not None and product.inputs[1] is not None
    channels: Any = output.shape[1 if product.op_type in ("Conv", "ConvTranspose") else -1]
    name = f"{product.inputs[1].name}_{output.name}_least"
    bias = initializer(graph, name, np.full(channels, LEAST, np.float32))
    if product.op_type == "MatMul":
        insert_behind(graph, output, "Add", bias)
    else:
        product.resize_inputs(3)
        product.replace_input_with(2, bias)


def _readers(node: ir.Node) -> Iterator[ir.Node]:
    """Nodes that read the outputs of a node, behind operations that move values."""
    for output in node.outputs:
        for reader, _ in output.uses():
            yield from _readers(reader) if reader.op_type in MOVES else (reader,)


def _joined(value: ir.Value, behind: bool) -> bool:
    """Whether a convolution reads the value from `behind` a concatenation, or through one."""
    for reader, index in value.uses():
        if reader.op_type == "Conv" and index == 0 and behind:
            return True
        passes = reader.op_type in (*MOVES_VALUES, "Clip", "DequantizeLinear")
        if passes and any(_joined(output, behind or reader.op_type == "Concat") for output in reader.outputs):
            return True
    return False


def _make_unsigned(graph: ir.Graph, quantize: ir.Node) -> None:
    """Adds half of the range to the codes' zero point and limits."""
    for reader in (quantize, *quantize.outputs[0].consumers()):
        _shift(graph, reader, (1, 2) if reader.op_type == "Clip" else (2,))
        if reader.op_type == "Clip":
            for dequantize in reader.outputs[0].consumers():
                _shift(graph, dequantize, (2,))


def _shift(graph: ir.Graph, node: ir.Node, inputs: tuple[int, ...]) -> None:
    for index in inputs:
        code = node.inputs[index]
        assert code is not None and code.const_value is not None
        shifted = int(code.const_value.numpy()) + HALF
        node.replace_input_with(index, initializer(graph, f"code_{shifted}_uint8", np.array(shifted, np.uint8)))
