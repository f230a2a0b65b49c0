"""Smaller ONNX files. A small quantized model has more graph than weights: what a runtime infers or assumes anyway is
left out.

    names         of nodes and of values in between; layers' constants keep theirs, constants that several share get
                  short ones
    defaults      attributes at the value that the ONNX standard gives them
    value types   `value_info`, which repeats the type of every initializer
"""

import itertools

import onnx
import onnx_ir as ir

DEFAULTS = {
    "auto_pad": "NOTSET",
    "group": 1,
    "dilations": 1,
    "strides": 1,
    "pads": 0,
    "ceil_mode": 0,
    "storage_order": 0,
}
"""Attributes of convolutions and pools; a list is at its default if every element is."""
OWN_NAMES = (".weight", ".weight_plus_half", ".weight_scale", ".bias", ".bias_scale")


def slim(model: ir.Model) -> onnx.ModelProto:
    """The file's content, without the superfluous; `model` is changed."""
    graph = model.graph
    taken = {value.name for value in (*graph.inputs, *graph.outputs, *graph.initializers.values())}
    names = (name for number in itertools.count() if (name := f"{number:x}") not in taken)
    for value in list(graph.initializers.values()):
        if not f".{value.name}".endswith(OWN_NAMES):
            value.name = next(names)
    for node in graph:
        node.name = None
        for value in node.outputs:
            if value not in graph.outputs:
                value.name, value.type, value.shape = next(names), None, None
        for name in [a.name for a in node.attributes.values() if a.name in DEFAULTS and _is_default(a)]:
            del node.attributes[name]
    proto = ir.to_proto(model)
    del proto.graph.value_info[:]
    return proto


def _is_default(attribute: ir.Attr) -> bool:
    value, default = attribute.value, DEFAULTS[attribute.name]
    return all(v == default for v in value) if isinstance(value, list | tuple) else value == default
