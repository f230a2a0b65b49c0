"""Checkers of ONNX files for engines that are not installed here, as far as their documented rules go.

Each checker returns sentences that name nodes; none means that the file keeps the rules. They look at the graph alone:
numbers are compared by ONNX Runtime, which runs every one of these files.
"""

from collections import defaultdict
from collections.abc import Iterator

import onnx
from onnx import NodeProto, TensorProto

from qat.export.onnx.graph import PRODUCTS
from qat.export.onnx.layers import layer_values

LIMITS = ("Relu", "Clip")


class Graph:
    """A file's graph, by producers and readers of its values."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model, self.nodes = model, list(model.graph.node)
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.producers = {output: node for node in self.nodes for output in node.output}
        self.readers: dict[str, list[NodeProto]] = defaultdict(list)
        for node in self.nodes:
            for name in node.input:
                self.readers[name].append(node)
        layers = {value: layer for layer, value in layer_values(model).items()}
        self.names = {id(n): f"{n.op_type} '{layers.get(n.output[0], n.output[0])}'" for n in self.nodes}

    def made_by(self, value: str, op_type: str) -> bool:
        """Whether a node of that type makes a value."""
        return value in self.producers and self.producers[value].op_type == op_type

    def data(self, node: NodeProto) -> list[str]:
        """A node's inputs that are no shapes, axes or biases: those that could be on a grid."""
        return [name for name in node.input[: 2 if node.op_type in (*PRODUCTS, "Add", "Mul", "Sub") else 1] if name]

    def is_weight(self, dequantize: NodeProto) -> bool:
        return dequantize.input[0] in self.constants

    def computing(self) -> Iterator[NodeProto]:
        """The nodes that neither quantize nor dequantize."""
        return (n for n in self.nodes if n.op_type not in ("QuantizeLinear", "DequantizeLinear"))

    def quantized(self, value: str) -> bool:
        """Whether all that read a value quantize it, behind limits perhaps."""
        readers = self.readers[value]
        return bool(readers) and all(
            reader.op_type == "QuantizeLinear" or (reader.op_type in LIMITS and self.quantized(reader.output[0]))
            for reader in readers
        )

    def products(self) -> list[NodeProto]:
        """Convolutions and matrix products."""
        return [n for n in self.nodes if n.op_type in PRODUCTS]

    def nodes_on_codes(self) -> list[NodeProto]:
        """Products both of whose operands were dequantized just before."""
        return [n for n in self.products() if all(self.made_by(v, "DequantizeLinear") for v in self.data(n))]


def tensorrt_violations(model: onnx.ModelProto) -> list[str]:
    """Nodes that TensorRT's explicit quantization would refuse or leave unfused ("Working with Quantized Types", "Q/DQ
    Layer-Placement Recommendations").
    """
    graph, found = Graph(model), []
    for node in graph.nodes:
        name = graph.names[id(node)]
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero = graph.constants.get(node.input[2]) if len(node.input) > 2 else None
            if zero is not None and zero.data_type not in (TensorProto.INT8, TensorProto.INT4):
                found.append(f"{name} has codes of {TensorProto.DataType.Name(zero.data_type)}, not int8")
            elif zero is not None and onnx.numpy_helper.to_array(zero).any():
                found.append(f"{name} has a zero point that is not zero")
            scale = graph.constants.get(node.input[1])
            if scale is not None and scale.dims and not (node.op_type[0] == "D" and graph.is_weight(node)):
                found.append(f"{name} has several scales for an activation")
            if node.op_type == "DequantizeLinear" and not (
                graph.is_weight(node) or graph.made_by(node.input[0], "QuantizeLinear")
            ):
                found.append(f"{name} reads codes that no QuantizeLinear and no constant makes")
        elif node.op_type in PRODUCTS:
            on_grid = [graph.made_by(value, "DequantizeLinear") for value in graph.data(node)]
            if any(on_grid) and not all(on_grid) and graph.data(node)[0] not in graph.constants and on_grid[0]:
                found.append(f"{name} reads a quantized input and a float weight")
        elif node.op_type == "Add":
            quantized = [_quantized_product(graph, value) for value in graph.data(node)]
            fused = [graph.producers[v].op_type in PRODUCTS for v in graph.data(node) if v in graph.producers]
            if any(quantized) and not any(fused):
                found.append(f"{name} adds a product that was quantized before, which cannot fuse")
    return found


def _quantized_product(graph: Graph, value: str) -> bool:
    """Whether a value is the output of a product that was put on a grid of its own."""
    if not graph.made_by(value, "DequantizeLinear"):
        return False
    quantize = graph.producers.get(graph.producers[value].input[0])
    return quantize is not None and any(graph.made_by(quantize.input[0], kind) for kind in PRODUCTS)


def qnn_violations(model: onnx.ModelProto) -> list[str]:
    """Which nodes are no QDQ node units for ONNX Runtime's QNN execution provider, and which units it has no form for;
    what the model returns is float, so the last node is not asked.
    """
    graph, found = Graph(model), []
    outputs = {value.name for value in model.graph.output}
    for node in graph.computing():
        name = graph.names[id(node)]
        fused = node.op_type in LIMITS and any(graph.made_by(node.input[0], kind) for kind in PRODUCTS)
        if not fused and not all(graph.made_by(value, "DequantizeLinear") for value in graph.data(node)):
            found.append(f"{name} reads a float tensor")
        if not all(graph.quantized(value) for value in node.output if value not in outputs):
            found.append(f"{name} makes a float tensor")
    for node in graph.nodes:
        zero = (
            graph.constants.get(node.input[2]) if node.op_type[-12:] == "antizeLinear" and len(node.input) > 2 else None
        )
        if zero is None:
            continue
        name, kind = graph.names[id(node)], TensorProto.DataType.Name(zero.data_type)
        # A constant that is added has codes like those that it is added to.
        added = any(reader.op_type in ("Add", "Sub", "Mul") for reader in graph.readers[node.output[0]])
        if node.op_type == "DequantizeLinear" and graph.is_weight(node) and not added:
            if onnx.numpy_helper.to_array(zero).any():
                found.append(f"{name} has weights with a zero point")
        elif kind not in ("UINT8", "UINT16"):
            found.append(f"{name} has activations of {kind}, not UINT8 or UINT16")
    return found
