"""The weights in an ONNX file: what they are called, and how their codes are stored.

Layers with identical weights (tied ones among them) share one initializer; the model's metadata says which. Codes of at
most 4 bits are INT4, of at most 2 bits INT2 (unsigned ones UINT4 and UINT2), cast back to one byte at load.
"""

import json
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from qat.export.onnx.placement import IR_2_BITS, OPSET_2_BITS

BITS_KEY = "qat.bits"
SHIFTED_WEIGHT = "weight_plus_half"
"""Name of a weight whose codes became unsigned by half of their range."""
SHARED_KEY = "qat.shared_weights"
"""Metadata of the file: JSON, from the name of each weight that was left out to the identical one that stands for
it."""
PACKED: dict[tuple[ir.DataType, int], tuple[ir.DataType, Any]] = {
    (ir.DataType.INT8, 4): (ir.DataType.INT4, ml_dtypes.int4),
    (ir.DataType.UINT8, 4): (ir.DataType.UINT4, ml_dtypes.uint4),
    (ir.DataType.INT8, 2): (ir.DataType.INT2, ml_dtypes.int2),
    (ir.DataType.UINT8, 2): (ir.DataType.UINT2, ml_dtypes.uint2),
}
"""The type of codes that fit in so many bits, for ONNX and for numpy."""


def is_weight(name: str) -> bool:
    """Whether an initializer of this name holds a weight; if it is of integers, they are its codes."""
    return name.rpartition(".")[2] in ("weight", SHIFTED_WEIGHT)


def name_after_layers(graph: ir.Graph, paths: Mapping[str, str]) -> None:
    """Calls the initializers of a layer after it: `conv1.weight`, `conv1.weight_scale`.

    Args:
        graph: The traced graph.
        paths: First path of every module, by each of its paths; the exporter may know it by another.
    """
    for name, value in list(graph.initializers.items()):
        value.name = _first_path(_short(name), paths, graph)


def _first_path(name: str, paths: Mapping[str, str], graph: ir.Graph) -> str:
    """The name that a tensor of a module with several paths has under the first of them."""
    owner, _, leaf = name.rpartition(".")
    first = f"{paths.get(owner, owner)}.{leaf}".removeprefix(".")
    return name if first in graph.initializers else first


def _short(name: str) -> str:
    """`model.conv1.integer_weight.codes` -> `conv1.weight`."""
    for role in ("weight", "bias"):
        for part, short in (("codes", role), ("scale", f"{role}_scale"), ("zero_point", f"{role}_zero")):
            name = name.replace(f".integer_{role}.{part}", f".{short}")
    name = name.replace(".integer_bias.onnx_value", ".bias")
    return name.removeprefix("model.")


def note_shared(model: ir.Model, weights: Mapping[str, np.ndarray]) -> None:
    """Notes in the metadata which initializer stands for each weight that has none of its own.

    Args:
        model: The finished graph.
        weights: The integer codes of each layer's weight, by name.
    """
    kept = {_content(weights[name]): name for name in model.graph.initializers if name in weights}
    left_out = {name: codes for name, codes in weights.items() if name not in model.graph.initializers}
    if left_out:
        shared = {name: kept[_content(codes)] for name, codes in left_out.items()}
        model.metadata_props[SHARED_KEY] = json.dumps(shared)


def _content(codes: np.ndarray) -> tuple[Any, ...]:
    return codes.dtype, codes.shape, codes.tobytes()


def pack_weights(model: ir.Model, narrowest: int) -> None:
    """Stores codes of few bits in types of as many; `narrowest` is the smallest that the engine has. It runs after all
    folding, which would undo the Cast."""
    for node in list(model.graph):
        codes = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        if codes is None or not codes.is_initializer() or codes.dtype not in (ir.DataType.INT8, ir.DataType.UINT8):
            continue
        bits = int(node.metadata_props.get(BITS_KEY, 8))
        size = next((size for size in (2, 4) if bits <= size and narrowest <= size), None)
        if size is not None:
            _pack(model.graph, codes, node, size)
        if size == 2:
            model.opset_imports[""], model.ir_version = OPSET_2_BITS, IR_2_BITS


def _pack(graph: ir.Graph, codes: ir.Value, reader: ir.Node, size: int) -> None:
    assert codes.const_value is not None and codes.name is not None and codes.dtype is not None
    dtype, element = PACKED[codes.dtype, size]
    tensor = ir.Tensor(codes.const_value.numpy().astype(element), dtype=dtype, name=codes.name)
    packed = ir.Value(name=codes.name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=tensor.shape)
    unpack = ir.node("Cast", [packed], {"to": int(codes.dtype)})
    graph.insert_before(reader, unpack)
    ir.convenience.replace_all_uses_with(codes, unpack.outputs[0])
    del graph.initializers[codes.name]
    graph.register_initializer(packed)
