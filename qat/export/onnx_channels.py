"""A fourth channel for images of three: ONNX Runtime's integer convolution reads input channels by fours, and is slower
with three (the 7x7 stem of a ResNet-18 at 224x224 takes 2.0 ms, padded 1.3; it was a quarter of the network).

The codes of the image get a channel of zero points, which adds nothing to any sum, so not a bit of the result changes.
The weights get theirs in the graph as well, by a Pad that the runtime carries out once, at load: the file holds them as
they were trained. Only symmetric weights have the kernel that gains, and patches that do not overlap gain nothing.
"""

import numpy as np
import onnx_ir as ir

IMAGE = 3
PADS = np.array([0, 0, 0, 0, 0, 1, 0, 0], np.int64)
"""One more entry behind axis 1 of four."""


def pad_images(model: ir.Model) -> None:
    """Pads input and weight of every convolution that reads three channels of codes."""
    graph = model.graph
    for node in list(graph):
        if node.op_type != "Conv" or node.attributes.get_int("group", 1) != 1 or _is_patches(node):
            continue
        image, weight = (value.producer() if value else None for value in node.inputs[:2])
        if _is_codes_of_image(image) and _is_symmetric(weight):
            assert image is not None and weight is not None
            node.replace_input_with(0, _padded(graph, node, image, image.inputs[2]))
            node.replace_input_with(1, _padded(graph, node, weight, None))


def _is_patches(conv: ir.Node) -> bool:
    kernel, strides = (conv.attributes.get_ints(name, (1, 1)) for name in ("kernel_shape", "strides"))
    return tuple(kernel) == tuple(strides)


def _is_codes_of_image(image: ir.Node | None) -> bool:
    if image is None or image.op_type != "DequantizeLinear" or image.inputs[0] is None:
        return False
    shape = image.outputs[0].shape
    return not image.inputs[0].is_initializer() and shape is not None and len(shape) == 4 and shape[1] == IMAGE


def _is_symmetric(weight: ir.Node | None) -> bool:
    if weight is None or weight.op_type != "DequantizeLinear" or "block_size" in weight.attributes:
        return False
    zero = weight.inputs[2] if len(weight.inputs) > 2 else None
    array = None if zero is None or zero.const_value is None else zero.const_value.numpy()
    return zero is None or (array is not None and array.dtype == np.int8 and not array.any())


def _padded(graph: ir.Graph, reader: ir.Node, dequantize: ir.Node, value: ir.Value | None) -> ir.Value:
    """A second `dequantize`, of its codes with one more channel, in front of `reader`."""
    if "image_pads" not in graph.initializers:
        tensor = ir.tensor(PADS, name="image_pads")
        graph.register_initializer(
            ir.Value(
                name="image_pads", const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(PADS.shape)
            )
        )
    codes = dequantize.inputs[0]
    pad = ir.node("Pad", [codes, graph.initializers["image_pads"], *([value] if value is not None else [])])
    again = ir.node("DequantizeLinear", [pad.outputs[0], *dequantize.inputs[1:]], dict(dequantize.attributes))
    again.outputs[0].type = dequantize.outputs[0].type
    graph.insert_before(reader, [pad, again])
    return again.outputs[0]
