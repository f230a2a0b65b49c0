"""Passes over a traced graph, so that ONNX Runtime turns it into integer kernels. Each changes the graph in place and
no value of it.

    pool_globally     a mean over all pixels becomes GlobalAveragePool, which has an integer kernel
    clip_codes        ReLU and Clip before QuantizeLinear become a Clip of its codes (rounding is monotone, so they
                      commute), so that it sits right behind the layer; in front of fp8 codes they are kept from being
                      dropped
    quantize_constants  see `qat.export.onnx.constants`
    keep_float        a float weight behind quantized inputs stays float (left alone, the runtime quantizes it as it
                      sees fit), and so does a convolution with groups of weights
    split_readers     a matrix product that is read both as codes and in float keeps an integer kernel
    multiply_packed   see `qat.export.onnx.nbits`
    pack_weights      see `qat.export.onnx.weights`
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from qat.export.onnx.constants import quantize_constants
from qat.export.onnx.graph import (
    PASS_THROUGH,
    PRODUCTS,
    comes_from_codes,
    constant,
    guard,
    initializer,
    insert_behind,
)
from qat.export.onnx.nbits import multiply_packed
from qat.export.onnx.placement import ORT, Placement
from qat.export.onnx.units import make_units
from qat.export.onnx.weights import name_after_layers, note_shared, pack_weights

FP8 = (ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E5M2)


def run_passes(
    model: ir.Model, weights: Mapping[str, np.ndarray], paths: Mapping[str, str], placement: Placement = ORT
) -> ir.Model:
    """Runs every pass; the initializers of a layer are called after it: `conv1.weight`, `conv1.weight_scale`.

    Args:
        model: The traced graph; the exporter has merged identical weights already.
        weights: The integer codes of each layer's weight, by name (`conv1.weight`).
        paths: First path of every module, by each of its paths; the exporter may know it by another.
        placement: Which passes the engine wants.
    """
    name_after_layers(model.graph, paths)
    pool_globally(model)
    clip_codes(model, placement.folds_limits)
    quantize_constants(model)
    if placement.guards_fusions:
        keep_float(model)
        split_readers(model)
    if placement.units:
        make_units(model)
    cleanup = ir.passes.Sequential(
        common.DeduplicateInitializersPass(size_limit=2**20),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedOpsetsPass(),
    )
    model = cleanup(model).model
    if placement.packs_products:
        multiply_packed(model)
    pack_weights(model, placement.narrowest)
    own_zero_points(model.graph)
    model = common.ClearMetadataAndDocStringPass()(model).model
    note_shared(model, weights)
    return model


def own_zero_points(graph: ir.Graph) -> None:
    """Gives each int8 weight its own zero point. Asked to be exact on a processor without VNNI, the runtime refuses
    files where two of them share one (onnxruntime 1.32).
    """
    shared: set[ir.Value] = set()
    for node in graph:
        zero = node.inputs[2] if node.op_type == "DequantizeLinear" and len(node.inputs) == 3 else None
        if zero is None or zero.const_value is None or zero.dtype != ir.DataType.INT8 or not _is_weight(node.inputs[0]):
            continue
        if zero in shared:
            node.replace_input_with(2, initializer(graph, f"{zero.name}_of_{node.outputs[0].name}", constant(zero)))
        shared.add(zero)


def _is_weight(value: ir.Value | None) -> bool:
    node = value.producer() if value is not None else None
    padded = node.inputs[0] if node is not None and node.op_type == "Pad" else value
    return padded is not None and padded.is_initializer()


def pool_globally(model: ir.Model) -> None:
    """ReduceMean over the last two axes of an image becomes GlobalAveragePool (and a Reshape, through which the
    runtime moves Q/DQ)."""
    graph = model.graph
    for node in list(graph):
        if (
            node.op_type != "ReduceMean"
            or node.inputs[0] is None
            or node.inputs[0].shape is None
            or len(node.inputs[0].shape) != 4
        ):
            continue
        axes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
        if axes is None or sorted(int(a) % 4 for a in axes.reshape(-1)) != [2, 3]:
            continue
        source = node.inputs[0]
        pool = ir.node("GlobalAveragePool", [source])
        result = pool.outputs[0]
        result.type = source.type
        graph.insert_before(node, pool)
        if node.attributes.get_int("keepdims", 1) == 0:
            assert source.shape is not None
            # Of an empty batch, the runtime cannot tell what a -1 stands for.
            channels = size if isinstance(size := source.shape[1], int) else -1
            flat = initializer(graph, f"flat_shape_{channels}", np.array([0, channels], np.int64))
            reshape = ir.node("Reshape", [result, flat])
            reshape.outputs[0].type = source.type
            graph.insert_before(node, reshape)
            result = reshape.outputs[0]
        ir.convenience.replace_all_uses_with(node.outputs[0], result, replace_graph_outputs=True)
        graph.remove(node, safe=True)


def clip_codes(model: ir.Model, all_limits: bool = True) -> None:
    """Turns the ReLU or Clip in front of each QuantizeLinear into limits of its codes, or only those that its type has
    anyway; so always those of 16 bits, which no Clip of the runtime's takes.
    """
    for node in list(model.graph):
        if node.op_type == "QuantizeLinear":
            _clip_codes_of(model.graph, node, all_limits)
    common.RemoveUnusedNodesPass()(model)


def _clip_codes_of(graph: ir.Graph, quantize: ir.Node, all_limits: bool) -> None:
    edge, source = _activation_before(graph, quantize)
    scale, zero = constant(quantize.inputs[1]), constant(quantize.inputs[2])
    if source is None or scale is None or scale.size != 1:
        return
    if zero.dtype.kind not in "iu":
        # The runtime takes a zero point of 0 for the lowest code, of fp8 too, and would drop the ReLU.
        guard(graph, source.outputs[0], [(edge, 0)])
        return
    limits = np.iinfo(zero.dtype)
    bounds = (0.0, None) if source.op_type == "Relu" else [constant(v) for v in [*source.inputs, None, None][1:3]]
    codes = [
        None
        if b is None
        else int(np.clip(np.rint(np.float32(b) / scale.reshape(())) + int(zero.reshape(())), limits.min, limits.max))
        for b in bounds
    ]
    low = limits.min if codes[0] is None else codes[0]
    high = limits.max if codes[1] is None else codes[1]
    if not (all_limits and limits.bits == 8) and (low > limits.min or high < limits.max):
        return
    edge.replace_input_with(0, source.inputs[0])
    _limit(graph, quantize, low, high, limits)


def _activation_before(graph: ir.Graph, quantize: ir.Node) -> tuple[ir.Node, ir.Node | None]:
    """The ReLU or Clip in front of `quantize`, behind operations that commute with it, and the node that reads it."""
    edge, source = quantize, quantize.inputs[0].producer() if quantize.inputs[0] else None
    while source is not None and source.op_type in PASS_THROUGH:
        if len(source.outputs[0].uses()) != 1 or source.outputs[0] in graph.outputs or source.inputs[0] is None:
            return edge, None
        edge, source = source, source.inputs[0].producer()
    found = source is not None and source.op_type in ("Relu", "Clip") and source.inputs[0] is not None
    return edge, source if found and source.inputs[0].dtype == ir.DataType.FLOAT else None  # pyright: ignore[reportOptionalMemberAccess]


def _limit(graph: ir.Graph, quantize: ir.Node, low: int, high: int, limits: Any) -> None:
    """Clips the codes of `quantize`: by the Clip that its grid has already, or by a new one if it needs any."""
    output = quantize.outputs[0]
    readers = [reader for reader, _ in output.uses()]
    if len(readers) == 1 and readers[0].op_type == "Clip":
        clip = readers[0]
        low, high = max(low, int(constant(clip.inputs[1]))), min(high, int(constant(clip.inputs[2])))
    elif low > limits.min or high < limits.max:
        clip = insert_behind(graph, output, "Clip", None, None)
    else:
        return
    for index, code in ((1, low), (2, high)):
        clip.replace_input_with(index, initializer(graph, f"code_{code}_{limits.dtype}", np.array(code, limits.dtype)))


def keep_float(model: ir.Model) -> None:
    """Guards quantized inputs of a product from a weight that no integer kernel takes: float, fp8, in blocks, or with
    scales that run along the sum."""
    for node in list(model.graph):
        if node.op_type not in PRODUCTS or node.inputs[0] is None or node.inputs[1] is None:
            continue
        if _stays_float(node.op_type, node.inputs[1].producer()) and comes_from_codes(node.inputs[0]):
            guard(model.graph, node.inputs[0], [(node, 0)])


def _stays_float(op_type: str, weight: ir.Node | None) -> bool:
    if weight is not None and weight.inputs[0] is not None and weight.inputs[0].dtype in FP8:
        return True  # the runtime would put the bias on int32, for which the product of two fp8 scales is too fine
    if op_type == "MatMul":
        return _scales_along_the_sum(weight)
    # The runtime makes an integer kernel of a convolution with blocks of weights, and that then refuses the scales.
    return weight is None or (op_type != "Gemm" and "block_size" in weight.attributes)


def _scales_along_the_sum(dequantize: ir.Node | None) -> bool:
    """Whether the right-hand side of a MatMul has a scale for each of its rows: that of a layer that it is tied to."""
    if dequantize is None or dequantize.op_type != "DequantizeLinear" or "block_size" in dequantize.attributes:
        return False
    codes, scale = dequantize.inputs[0], dequantize.inputs[1]
    if codes is None or codes.shape is None or scale is None or scale.shape is None or not len(scale.shape):
        return False
    axis, ndim = dequantize.attributes.get_int("axis", 1), len(codes.shape)
    return axis % ndim != ndim - 1


def split_readers(model: ir.Model) -> None:
    """Guards a matrix product from the QuantizeLinear behind it where others read the product, too: the runtime has a
    kernel that returns codes and one that returns floats, and leaves what asks for both float."""
    graph = model.graph
    for node in list(graph):
        if node.op_type not in ("Gemm", "MatMul"):
            continue
        output = node.outputs[0]
        coders = [(reader, i) for reader, i in output.uses() if reader.op_type == "QuantizeLinear"]
        if coders and (len(output.uses()) > 1 or output in graph.outputs):
            guard(graph, output, coders)
