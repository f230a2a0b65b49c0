"""Weights alone on a grid, for the kernel that ONNX Runtime has for them: `com.microsoft.MatMulNBits`.

It multiplies float activations by packed codes and their scales, and widens neither as a whole: a Gemm behind
DequantizeLinear does, so that it is no faster than a float one and needs its memory. A weight `[N, K]` becomes

    B         uint8 [N, blocks, bytes of a block]: codes + 2 ** (bits - 1), lowest bits first, in 2, 4 or 8 bits
    scales    float32 [N, blocks]

with blocks along K of a power of two, at least 16. A scale that more weights share is repeated, in blocks of the size
that takes the fewest bytes. `accuracy_level` 1 keeps activations and sums in float32; the runtime's faster level 4
rounds activations to int8, which training did not.
"""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from qat.errors import UserError
from qat.export import nibbles
from qat.export.onnx.graph import PASS_THROUGH
from qat.files import atomic

DOMAIN, OPERATION = "com.microsoft", "MatMulNBits"
FLOAT32 = 1
"""`accuracy_level`."""


def rewrite(path: Path) -> None:
    """Turns every Gemm of a float input and an integer weight in a file into a MatMulNBits.

    Raises:
        UserError: if there is none, or the operation cannot hold one's weight.
    """
    model = onnx.load(str(path))
    graph = model.graph
    producers = {name: node for node in graph.node for name in node.output}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    made: dict[str, dict[str, Any]] = {}
    for index, node in enumerate(graph.node):
        dequantize = producers.get(node.input[1]) if node.op_type == "Gemm" else None
        if dequantize is None or dequantize.op_type != "DequantizeLinear" or _is_quantized(node.input[0], producers):
            continue
        name = _source(dequantize.input[0], producers)
        made.setdefault(name, _packed(name, dequantize, constants))
        bias = ["", "", *node.input[2:]] if len(node.input) > 2 else []
        inputs = [node.input[0], name, f"{name}_scale", *bias]
        graph.node[index].CopyFrom(
            helper.make_node(OPERATION, inputs, node.output, domain=DOMAIN, **made[name]["attributes"])
        )
    if not made:
        raise UserError("weight_only=matmulnbits: no layer has a quantized weight and a float input; use qdq")
    _sweep(graph, made)
    model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    with atomic(path) as temporary:
        temporary.write_bytes(model.SerializeToString())


def _source(name: str, producers: dict[str, onnx.NodeProto]) -> str:
    """The initializer behind a Cast."""
    return producers[name].input[0] if name in producers else name


def _is_quantized(name: str, producers: dict[str, onnx.NodeProto]) -> bool:
    node = producers.get(name)
    while node is not None and node.op_type in PASS_THROUGH:
        node = producers.get(node.input[0])
    return node is not None and node.op_type == "DequantizeLinear"


def _packed(name: str, dequantize: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> dict[str, Any]:
    """The operation's attributes, and what takes the place of the weight and its scales."""
    codes = numpy_helper.to_array(constants[name])
    scale, zero = (numpy_helper.to_array(constants[n]) for n in dequantize.input[1:3])
    layer = name.rpartition(".")[0]
    if zero.dtype == np.uint8 or zero.any():
        raise UserError(f"weight of '{layer}': weight_only=matmulnbits is for signed grids; set symmetric: true")
    codes, (rows, width) = codes.astype(np.int16), codes.shape
    bits = next(b for b in (2, 4, 8) if -(2 ** (b - 1)) <= codes.min() and codes.max() < 2 ** (b - 1))
    attributes = {a.name: helper.get_attribute_value(a) for a in dequantize.attribute}
    size = attributes.get("block_size", 0)
    if size:
        if attributes["axis"] != 1 or size < 16 or size & (size - 1):
            raise UserError(f"weight of '{layer}': blocks of {size} are no power of two from 16 on; set group_size: 32")
    else:
        sizes = [2**n for n in range(4, max(5, (width - 1).bit_length() + 1))]
        size = min(sizes, key=lambda s: -(-width // s) * (s * bits // 8 + scale.itemsize))
        scale = np.broadcast_to(scale.reshape(-1, 1), (rows, -(-width // size)))
    packed = nibbles.pack(np.pad(codes, ((0, 0), (0, -width % size))) + 2 ** (bits - 1), bits)
    return {
        "attributes": {"K": width, "N": rows, "bits": bits, "block_size": size, "accuracy_level": FLOAT32},
        name: packed.reshape(rows, -(-width // size), size * bits // 8),
        f"{name}_scale": np.ascontiguousarray(scale),
    }


def _sweep(graph: onnx.GraphProto, made: dict[str, dict[str, Any]]) -> None:
    """Puts the packed weights in the place of the others, and takes out what nobody reads any more."""
    fresh = {key: value for entry in made.values() for key, value in entry.items() if key != "attributes"}
    while True:
        read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
        idle = [node for node in graph.node if not read.intersection(node.output)]
        if not idle:
            break
        for node in idle:
            graph.node.remove(node)
    if both := next((n for n in made if any(n in node.input for node in graph.node if node.op_type == "Cast")), None):
        raise UserError(f"'{both}' is read by a float input and by another: weight_only=matmulnbits cannot be")
    kept = [tensor for tensor in graph.initializer if tensor.name in read and tensor.name not in fresh]
    del graph.initializer[:]
    graph.initializer.extend([*kept, *(numpy_helper.from_array(array, name) for name, array in fresh.items())])


def packed_codes(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """The weights of a model's MatMulNBits as int8 `[N, K]`, by the name of the initializer."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        if node.op_type == OPERATION:
            value = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            packed = numpy_helper.to_array(constants[node.input[1]]).reshape(value["N"], -1)
            codes = nibbles.unpack(packed, value["bits"], signed=False)[:, : value["K"]]
            found[node.input[1]] = (codes.astype(np.int16) - 2 ** (value["bits"] - 1)).astype(np.int8)
    return found
