"""What a traced graph still needs before ONNX Runtime turns it into integer kernels. Each pass changes the graph in place and no value of it.

pool_globally     a mean over all pixels becomes GlobalAveragePool, which has an integer kernel
clip_codes        ReLU and Clip before QuantizeLinear become a Clip of its codes (rounding is monotone, so they commute), so that it sits right behind the layer
pack_weights      int8 codes of at most 4 bits become INT4 initializers, cast back to int8 at load
"""

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

BITS_KEY = "qat.bits"
PASS_THROUGH = ("MaxPool", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose")
"""Operations that commute with clipping."""


def finish(model: ir.Model) -> ir.Model:
    """Runs every pass and drops what only the exporter needed (stack traces outweigh small weights)."""
    pool_globally(model)
    clip_codes(model)
    cleanup = ir.passes.Sequential(
        common.DeduplicateInitializersPass(size_limit=2**20),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedOpsetsPass(),
    )
    model = cleanup(model).model
    pack_weights(model)
    for name, value in list(model.graph.initializers.items()):
        if name.startswith("model."):
            value.name = name.removeprefix("model.")
    for node in model.graph:
        for value in node.outputs:
            if value not in model.graph.outputs:
                value.type, value.shape = (
                    None,
                    None,
                )  # runtimes infer them, and in a small model they outweigh the weights
    return common.ClearMetadataAndDocStringPass()(model).model


def _constant(value: ir.Value | None) -> Any:
    return None if value is None or value.const_value is None else value.const_value.numpy()


def _initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    if name not in graph.initializers:
        tensor = ir.tensor(array, name=name)
        graph.register_initializer(
            ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape))
        )
    return graph.initializers[name]


def pool_globally(model: ir.Model) -> None:
    """ReduceMean over the last two axes of an image becomes GlobalAveragePool (and a Reshape, through which the runtime moves Q/DQ)."""
    graph = model.graph
    for node in list(graph):
        if (
            node.op_type != "ReduceMean"
            or node.inputs[0] is None
            or node.inputs[0].shape is None
            or len(node.inputs[0].shape) != 4
        ):
            continue
        axes = _constant(node.inputs[1]) if len(node.inputs) > 1 else None
        if axes is None or sorted(int(a) % 4 for a in axes.reshape(-1)) != [2, 3]:
            continue
        source, output = node.inputs[0], node.outputs[0]
        pool = ir.node("GlobalAveragePool", [source], name=f"{node.name}_pool")
        result = pool.outputs[0]
        result.name, result.dtype = f"{output.name}_pool", source.dtype
        result.shape = ir.Shape([source.shape[0], source.shape[1], 1, 1])
        graph.insert_before(node, pool)
        if node.attributes.get_int("keepdims", 1) == 0:
            reshape = ir.node(
                "Reshape",
                [result, _initializer(graph, "flat_shape", np.array([0, -1], np.int64))],
                name=f"{node.name}_flat",
            )
            flat = reshape.outputs[0]
            flat.name, flat.dtype, flat.shape = (
                f"{output.name}_flat",
                source.dtype,
                ir.Shape([source.shape[0], source.shape[1]]),
            )
            graph.insert_before(node, reshape)
            result = flat
        ir.convenience.replace_all_uses_with(output, result, replace_graph_outputs=True)
        graph.remove(node, safe=True)


def clip_codes(model: ir.Model) -> None:
    """Turns the ReLU or Clip in front of each QuantizeLinear into limits of its codes."""
    for node in list(model.graph):
        if node.op_type == "QuantizeLinear":
            _clip_codes_of(model.graph, node)
    common.RemoveUnusedNodesPass()(model)


def _clip_codes_of(graph: ir.Graph, quantize: ir.Node) -> None:
    edge, source = _activation_before(graph, quantize)
    scale, zero = _constant(quantize.inputs[1]), _constant(quantize.inputs[2])
    if source is None or scale is None or scale.size != 1:
        return
    limits = np.iinfo(zero.dtype)
    bounds = (0.0, None) if source.op_type == "Relu" else [_constant(v) for v in [*source.inputs, None, None][1:3]]
    codes = [
        None
        if b is None
        else int(np.clip(np.rint(np.float32(b) / scale.reshape(())) + int(zero.reshape(())), limits.min, limits.max))
        for b in bounds
    ]
    low = limits.min if codes[0] is None else codes[0]
    high = limits.max if codes[1] is None else codes[1]
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
        low, high = max(low, int(_constant(clip.inputs[1]))), min(high, int(_constant(clip.inputs[2])))
    elif low > limits.min or high < limits.max:
        clip = ir.node("Clip", [output, None, None], name=f"{quantize.name}_clip")
        clipped = clip.outputs[0]
        clipped.name, clipped.dtype, clipped.shape = f"{output.name}_clipped", output.dtype, output.shape
        ir.convenience.replace_all_uses_with(output, clipped)
        clip.replace_input_with(0, output)
        graph.insert_after(quantize, clip)
    else:
        return
    for index, code in ((1, low), (2, high)):
        clip.replace_input_with(index, _initializer(graph, f"code_{code}_{limits.dtype}", np.array(code, limits.dtype)))


def pack_weights(model: ir.Model) -> None:
    """Stores int8 codes of at most 4 bits as INT4. It runs after all folding, which would undo the Cast."""
    graph = model.graph
    for node in list(graph):
        codes = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        if (
            codes is None
            or not codes.is_initializer()
            or codes.dtype != ir.DataType.INT8
            or int(node.metadata_props.get(BITS_KEY, 8)) > 4
        ):
            continue
        packed_name = f"{codes.name}"
        unpacked = next((n for n in graph if n.op_type == "Cast" and n.name == f"{packed_name}_unpack"), None)
        if unpacked is None:
            assert codes.const_value is not None and codes.name is not None
            array = codes.const_value.numpy().astype(ml_dtypes.int4)
            packed = ir.Value(
                name=packed_name, const_value=ir.Tensor(array, dtype=ir.DataType.INT4, name=packed_name), type=ir.TensorType(ir.DataType.INT4),
                shape=ir.Shape(array.shape),
            )  # fmt: skip
            unpacked = ir.node("Cast", [packed], {"to": int(ir.DataType.INT8)}, name=f"{packed_name}_unpack")
            unpacked.outputs[0].name, unpacked.outputs[0].dtype = f"{packed_name}_int8", ir.DataType.INT8
            unpacked.outputs[0].shape = packed.shape
            graph.insert_before(node, unpacked)
            ir.convenience.replace_all_uses_with(codes, unpacked.outputs[0])
            del graph.initializers[codes.name]
            graph.register_initializer(packed)
