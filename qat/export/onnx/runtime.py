"""ONNX Runtime as the judge: what it loads, which kernels it picks, what it computes."""

import collections
import tempfile
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from qat.errors import UserError, first_line
from qat.export.onnx.checks import Graph
from qat.export.onnx.graph import PASS_THROUGH
from qat.export.onnx.layers import expose, layer_values, shared_weights
from qat.export.onnx.nbits import packed_codes
from qat.export.onnx.weights import SHIFTED_WEIGHT, is_weight
from qat.export.target import INPUT, unrunnable

CODES: dict[int, Any] = {
    **dict.fromkeys([onnx.TensorProto.INT8, onnx.TensorProto.INT4, onnx.TensorProto.INT2], np.int8),
    **dict.fromkeys([onnx.TensorProto.UINT8, onnx.TensorProto.UINT4, onnx.TensorProto.UINT2], np.uint8),
    **{onnx.TensorProto.INT16: np.int16, onnx.TensorProto.UINT16: np.int32},
}
"""Types of stored weights, and what they are compared as."""
FP8 = (onnx.TensorProto.FLOAT8E4M3FN, onnx.TensorProto.FLOAT8E5M2)
"""Types that are compared as bit patterns."""
PROVIDERS = ["CPUExecutionProvider"]
INTEGER_KERNELS = ("QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "MatMulInteger", "ConvInteger")


def session_options(threads: int = 0, *, exact: bool = True) -> ort.SessionOptions:
    """Options of a session that logs nothing.

    Args:
        threads: Threads within one operation; 0: as many as there are cores.
        exact: Whether products of codes are added up exactly on every processor (see `saturates`).
    """
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what is wrong comes as an exception
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.x64quantprecision", "1" if exact else "0")
    return options


@cache
def saturates() -> bool:
    """Whether the runtime's own default is wrong on this processor for 8-bit weights: x86 without VNNI adds pairs of
    products of uint8 and int8 in int16, which saturates.
    """
    x, w = np.full((1, 64), 255, np.uint8), np.full((64, 1), 127, np.int8)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMulInteger", ["x", "w"], ["y"])],
        "product",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.UINT8, x.shape)],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.INT32, [1, 1])],
        [onnx.numpy_helper.from_array(w, "w")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8)
    session = ort.InferenceSession(model.SerializeToString(), session_options(exact=False), providers=PROVIDERS)
    return int(np.asarray(session.run(None, {"x": x})[0]).item()) != 255 * 127 * 64


def open_session(content: str | bytes, options: ort.SessionOptions, path: Path) -> ort.InferenceSession:
    """Loads a file, or its content, with the options of `session_options`, or without what keeps it from being loaded.

    Raises:
        UserError: if the runtime refuses it, naming `path`.
    """
    # Asked to be exact, it refuses int8 weights that several layers read. And it makes int8 activations uint8, and
    # stumbles over those that it moved before; so it gets to leave them.
    refused: list[Exception] = []
    for entries in ({}, {"session.x64quantprecision": "0"}, {"session.qdqisint8allowed": "1"}):
        for entry, value in entries.items():
            options.add_session_config_entry(entry, value)
        try:
            return ort.InferenceSession(content, options, providers=PROVIDERS)
        except Exception as error:  # the runtime's own exception types are private
            refused.append(error)
    raise UserError(f"{path}: onnxruntime refuses it: {first_line(refused[0])}")


class OnnxRunner:
    """A loaded file.

    Args:
        path: An ONNX file with one input.
        optimize: With the runtime's graph optimizations (which make the integer kernels), or node by node as written.
        threads: Threads within one operation.

    Raises:
        UserError: if the file is missing or the runtime refuses it.
    """

    def __init__(self, path: str | Path, *, optimize: bool = True, threads: int = 0) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"{self.path}: no such file")
        self.optimize, self.threads = optimize, threads
        self._session = self._session_of(str(self.path), optimize=optimize)

    def _session_of(
        self, content: str | bytes, *, optimize: bool, optimized_copy: str | None = None
    ) -> ort.InferenceSession:
        options = session_options(self.threads)
        # Idle threads would wait for the next call at full speed, on the cores of whatever is measured in turn.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        level = ort.GraphOptimizationLevel
        options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
        if optimized_copy is not None:
            options.optimized_model_filepath = optimized_copy
        return open_session(content, options, self.path)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Runs one batch.

        Raises:
            UserError: if the file does not take such a batch.
        """
        try:
            return np.asarray(self._session.run(None, {INPUT: x})[0])
        except Exception as error:
            raise unrunnable(self.path, x, first_line(error)) from None

    def layer_outputs(self, x: np.ndarray, only: str | None = None) -> dict[str, np.ndarray]:
        content, layers = expose(onnx.load(str(self.path)), only)
        # A layer whose output is seen is no integer kernel: if all are, this would be neither one nor the other.
        session = self._session_of(content.SerializeToString(), optimize=self.optimize and only is not None)
        values = session.run(list(layers.values()), {INPUT: x})
        return {name: np.asarray(value) for name, value in zip(layers, values, strict=True)}

    @cached_property
    def _executed(self) -> list[onnx.NodeProto]:
        """The nodes that the runtime makes of the file; a copy, which does not keep the weights in memory."""
        with tempfile.TemporaryDirectory() as folder:
            target = str(Path(folder) / "optimized.onnx")
            self._session_of(str(self.path), optimize=self.optimize, optimized_copy=target)
            return list(onnx.GraphProto(node=onnx.load(target).graph.node).node)

    def float_layers(self) -> list[str]:
        """The layers that the runtime computes in float: their output exists, and no integer kernel made it, or what
        their bias is added to.
        """
        made = {name: node for node in self._executed for name in node.output}

        def in_float(node: onnx.NodeProto) -> bool:
            added = [made[name] for name in node.input if name in made] if node.op_type == "Add" else []
            return all(each.op_type not in INTEGER_KERNELS for each in (node, *added))

        layers = layer_values(onnx.load(str(self.path)))
        return [layer for layer, value in layers.items() if value in made and in_float(made[value])]

    def kernels(self) -> collections.Counter[str]:
        """How many nodes of each kind the runtime executes."""
        return collections.Counter(node.op_type for node in self._executed)

    def integer_nodes(self) -> int:
        """How many convolutions and matrix products run on integers."""
        kernels = self.kernels()
        return sum(kernels[name] for name in INTEGER_KERNELS)


def weight_codes(path: str | Path) -> dict[str, np.ndarray]:
    """The codes of the weights in an ONNX file, by layer, in the model's types; packed ones are widened here."""
    model = onnx.load(str(path))
    found = {}
    for tensor in model.graph.initializer:
        if is_weight(tensor.name) and tensor.data_type in CODES:
            found[tensor.name] = onnx.numpy_helper.to_array(tensor).astype(CODES[tensor.data_type])
        elif is_weight(tensor.name) and tensor.data_type in FP8:
            found[tensor.name] = onnx.numpy_helper.to_array(tensor).view(np.uint8)
    found |= packed_codes(model)
    for name, same in shared_weights(model).items():
        found[name] = found[same]
    return {name.rpartition(".")[0]: _unshifted(name, array) for name, array in found.items()}


def _unshifted(name: str, codes: np.ndarray) -> np.ndarray:
    """Signed codes, if half of their range was added to them."""
    if name.rpartition(".")[2] != SHIFTED_WEIGHT:
        return codes
    kind = np.dtype(np.int8 if codes.dtype == np.uint8 else np.int16)
    return (codes.astype(np.int32) + np.iinfo(kind).min).astype(kind)


def float_convolutions(path: str | Path) -> int:
    """How many convolutions of quantized inputs and weights the runtime computes in float: those whose output is not
    quantized, or whose input is padded by a node of its own."""
    graph = Graph(onnx.load(str(path)))
    fp8 = {name for name, tensor in graph.constants.items() if tensor.data_type in FP8}

    def quantized(name: str) -> bool:
        node = graph.producers.get(name)
        return (
            node is not None
            and node.op_type == "DequantizeLinear"
            and node.input[2] not in fp8
            and all(a.name != "block_size" for a in node.attribute)
        )

    def padded(name: str) -> bool:
        return graph.made_by(name, "Pad") and quantized(graph.producers[name].input[0])

    def becomes_codes(name: str) -> bool:
        if len(graph.readers[name]) != 1:
            return False
        (reader,) = graph.readers[name]
        return reader.op_type == "QuantizeLinear" or (
            reader.op_type in PASS_THROUGH and becomes_codes(reader.output[0])
        )

    return sum(
        node.op_type == "Conv"
        and quantized(node.input[1])
        and (padded(node.input[0]) or (quantized(node.input[0]) and not becomes_codes(node.output[0])))
        for node in graph.nodes
    )
