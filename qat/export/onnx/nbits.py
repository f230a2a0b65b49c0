"""Weights alone on a grid, for the kernel that ONNX Runtime has for them: `com.microsoft.MatMulNBits`.

It multiplies float activations by packed codes and their scales, and widens neither as a whole: a Gemm behind
DequantizeLinear does, so that it is no faster than a float one and needs its memory. A weight `[N, K]` becomes

    B         uint8 [N, blocks, bytes of a block]: codes + 2 ** (bits - 1), lowest bits first, in 2, 4 or 8 bits
    scales    float32 [N, blocks]

with blocks along K of a power of two, at least 16. A scale that more weights share is repeated, in blocks of the size
that takes the fewest bytes. `accuracy_level` 1 keeps activations and sums in float32; the runtime's faster level 4
rounds activations to int8, which training did not.
"""

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common
from onnx import helper, numpy_helper

from qat.errors import UserError
from qat.export import nibbles
from qat.export.onnx.graph import array_value, comes_from_codes, constant

DOMAIN, OPERATION = "com.microsoft", "MatMulNBits"
FLOAT32 = 1
"""`accuracy_level`."""


def multiply_packed(model: ir.Model) -> None:
    """Turns every Gemm of a float input and an integer weight into a MatMulNBits.

    Raises:
        UserError: if there is none, or the operation cannot hold one's weight.
    """
    graph = model.graph
    made: dict[str, ir.Value] = {}
    for node in list(graph):
        weight = node.inputs[1].producer() if node.op_type == "Gemm" and node.inputs[1] is not None else None
        if weight is None or weight.op_type != "DequantizeLinear" or comes_from_codes(node.inputs[0]):
            continue
        attributes, arrays = _packed(weight)
        packed, scales = (_constant(made, name, array) for name, array in arrays.items())
        bias = [None, None, *node.inputs[2:]] if len(node.inputs) > 2 else []
        product = ir.node(OPERATION, [node.inputs[0], packed, scales, *bias], attributes, domain=DOMAIN)
        ir.convenience.replace_nodes_and_values(graph, node, [node], [product], node.outputs, product.outputs)
    if not made:
        raise UserError("weight_only=matmulnbits: no layer has a quantized weight and a float input; use qdq")
    common.RemoveUnusedNodesPass()(model)
    for name, value in made.items():
        if name in graph.initializers:
            raise UserError(f"'{name}' is read by a float input and by another: weight_only=matmulnbits cannot be")
        graph.register_initializer(value)
    model.opset_imports[DOMAIN] = 1


def _constant(made: dict[str, ir.Value], name: str, array: np.ndarray) -> ir.Value:
    """The constant of that content and, as far as equal codes do not have other scales, of that name."""
    while not np.array_equal(constant(value := made.setdefault(name, array_value(name, array))), array):
        name += "_"
    return value


def _packed(dequantize: ir.Node) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The operation's attributes, and by name what takes the place of the weight and of its scales."""
    assert dequantize.inputs[0] is not None and dequantize.inputs[0].name is not None
    codes, scale, zero = (constant(value) for value in dequantize.inputs[:3])
    name = dequantize.inputs[0].name
    layer = name.rpartition(".")[0]
    if zero.dtype == np.uint8 or zero.any():
        raise UserError(f"weight of '{layer}': weight_only=matmulnbits is for signed grids; set symmetric: true")
    codes, (rows, width) = codes.astype(np.int16), codes.shape
    bits = next((b for b in (2, 4, 8) if -(2 ** (b - 1)) <= codes.min() and codes.max() < 2 ** (b - 1)), None)
    if bits is None:
        raise UserError(f"weight of '{layer}': weight_only=matmulnbits is for at most 8 bits; use qdq")
    size = dequantize.attributes.get_int("block_size", 0)
    if size:
        if dequantize.attributes.get_int("axis", 1) != 1 or size < 16 or size & (size - 1):
            raise UserError(f"weight of '{layer}': blocks of {size} are no power of two from 16 on; set group_size: 32")
    else:
        sizes = [2**n for n in range(4, max(5, (width - 1).bit_length() + 1))]
        size = min(sizes, key=lambda s: -(-width // s) * (s * bits // 8 + scale.itemsize))
        scale = np.broadcast_to(scale.reshape(-1, 1), (rows, -(-width // size)))
    packed = nibbles.pack(np.pad(codes, ((0, 0), (0, -width % size))) + 2 ** (bits - 1), bits)
    attributes = {"K": width, "N": rows, "bits": bits, "block_size": size, "accuracy_level": FLOAT32}
    packed = packed.reshape(rows, -(-width // size), size * bits // 8)
    return attributes, {name: packed, f"{name}_scale": np.ascontiguousarray(scale)}


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
