"""Which node of an ONNX file is which layer: its weight leads from the initializer, called after the layer, through
DequantizeLinear, Cast, Transpose and the like to the convolution or product that reads it."""

import json

import onnx

from qat.export.onnx.weights import SHARED_KEY, is_weight

CARRIERS = ("DequantizeLinear", "Cast", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Max", "Identity", "Pad")
"""Operations that may stand between a weight and the node that computes with it."""


def shared_weights(model: onnx.ModelProto) -> dict[str, str]:
    """From each weight without an initializer of its own to the identical one that stands for it."""
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    return json.loads(metadata.get(SHARED_KEY, "{}"))


def layer_values(model: onnx.ModelProto) -> dict[str, str]:
    """The name of each layer's output in the graph, in the order of execution; layers that share one initializer are
    left out, since the graph does not tell them apart."""
    shared = shared_weights(model)
    constant = {tensor.name for tensor in model.graph.initializer}
    origin = {name: name for name in constant - set(shared.values()) if is_weight(name)}
    found: dict[str, str] = {}
    products: dict[str, str] = {}
    for node in model.graph.node:
        weights = [origin[name] for name in node.input if name in origin]
        if node.op_type in CARRIERS:
            if weights:
                origin.update(dict.fromkeys(node.output, weights[0]))
            if constant.issuperset(node.input):
                constant.update(node.output)
        elif weights:
            layer = weights[0].rpartition(".")[0]
            found[layer] = node.output[0]
            if node.op_type == "MatMul":
                products[node.output[0]] = layer
        elif node.op_type == "Add" and constant.intersection(node.input):  # the bias of a product
            for name in products.keys() & set(node.input):
                found[products[name]] = node.output[0]
    return found


def expose(model: onnx.ModelProto, only: str | None = None) -> tuple[onnx.ModelProto, dict[str, str]]:
    """Makes the outputs of layers (or of one) outputs of the graph; returns the changed model and their names there."""
    layers = {layer: value for layer, value in layer_values(model).items() if only in (None, layer)}
    have = {value.name for value in model.graph.output}
    for name in dict.fromkeys(layers.values()):
        if name not in have:
            model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    return model, layers
