"""Puts a `.tflite` file together: tensors with their grids, constants, operations.

LiteRT computes on images channels last, torch channels first. A `Value` knows the shape that torch sees and which of
the two orders its memory has; `Builder` transposes only where an operation needs the other one. The batch is -1 in
shapes and 1 in the file, which the interpreter resizes.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qat.export import nibbles

LAYERS = "qat.layers"
"""Metadata of the file: JSON, from each layer to the tensor of its codes and the order of axes that gives torch's."""
CHANNELS_LAST, CHANNELS_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)
OPTIONS = {
    "CONV_2D": "Conv2DOptions",
    "DEPTHWISE_CONV_2D": "DepthwiseConv2DOptions",
    "FULLY_CONNECTED": "FullyConnectedOptions",
    "MAX_POOL_2D": "Pool2DOptions",
    "AVERAGE_POOL_2D": "Pool2DOptions",
    "MEAN": "ReducerOptions",
    "ADD": "AddOptions",
    "SUB": "SubOptions",
    "MUL": "MulOptions",
    "DIV": "DivOptions",
    "CONCATENATION": "ConcatenationOptions",
    "BATCH_MATMUL": "BatchMatMulOptions",
    "SOFTMAX": "SoftmaxOptions",
    "GELU": "GeluOptions",
    "RESHAPE": "ReshapeOptions",
    "GATHER": "GatherOptions",
    "STRIDED_SLICE": "StridedSliceOptions",
}
"""The table with an operation's settings, for those that have any."""

Grid = tuple[float, int]
"""Scale and zero point of int8 codes."""


def schema() -> Any:
    """The flatbuffer schema of `.tflite` files as Python classes."""
    from ai_edge_litert import schema_py_generated  # pyright: ignore[reportMissingImports]

    return schema_py_generated


@dataclass(frozen=True)
class Value:
    """A tensor that an operation returns.

    Attributes:
        index: Index of the tensor in the file.
        shape: Shape as torch sees it, -1 for the batch.
        grid: Grid of int8 codes; `None` for floats.
        last: Whether memory is channels last.
    """

    index: int
    shape: tuple[int, ...]
    grid: Grid | None = None
    last: bool = False

    @property
    def memory(self) -> tuple[int, ...]:
        """The shape in memory."""
        return tuple(self.shape[axis] for axis in CHANNELS_LAST) if self.last else self.shape

    def axis(self, axis: int) -> int:
        """Where one of torch's axes is in memory."""
        axis %= len(self.shape)
        return CHANNELS_LAST.index(axis) if self.last else axis


class Builder:
    """One graph with one input and one output."""

    def __init__(self) -> None:
        self.s = schema()
        self.graph = self.s.SubGraphT()
        self.graph.tensors, self.graph.operators, self.graph.name = [], [], "main"
        self.buffers = [self.s.BufferT()]  # the first is empty by convention
        self.codes: list[str] = []
        self.layers: dict[str, Any] = {}
        self._constants: dict[Any, int] = {}
        self._reordered: dict[tuple[int, bool], Value] = {}

    def _add(self, tensor: Any, name: str) -> int:
        tensor.name = name or None
        self.graph.tensors.append(tensor)
        return len(self.graph.tensors) - 1

    def value(
        self, shape: Sequence[int], grid: Grid | None = None, last: bool = False, kind: str = "FLOAT32", name: str = ""
    ) -> Value:
        """A tensor that an operation writes."""
        value = Value(-1, tuple(shape), grid, last)
        tensor = self.s.TensorT()
        tensor.shape = [abs(size) for size in value.memory]
        tensor.shapeSignature = list(value.memory)
        tensor.type = getattr(self.s.TensorType, kind if grid is None else "INT8")
        if grid is not None:
            tensor.quantization = self._quantization([grid[0]], [grid[1]], 0)
        return Value(self._add(tensor, name), value.shape, grid, last)

    def _quantization(self, scales: Sequence[float], zeros: Sequence[int], axis: int) -> Any:
        quantization = self.s.QuantizationParametersT()
        quantization.scale, quantization.zeroPoint = np.array(scales, np.float32), np.array(zeros, np.int64)
        quantization.quantizedDimension = axis
        return quantization

    def constant(self, array: Any, scales: Any = (), axis: int = 0, *, zero: int = 0, bits: int = 8) -> int:
        """A constant tensor.

        Args:
            array: float32, int32, int64, or codes.
            scales: Scales of codes: one, or one per entry of `axis`.
            axis: See there.
            zero: Zero point of codes.
            bits: Codes of up to 4 bits are packed, two in a byte.
        """
        array = np.ascontiguousarray(array)
        key = array.tobytes(), array.shape, str(array.dtype), tuple(map(float, scales)), axis, zero
        if key in self._constants:
            return self._constants[key]
        tensor, packed = self.s.TensorT(), array.dtype == np.int8 and bits <= 4
        tensor.shape, tensor.buffer = list(array.shape), len(self.buffers)
        tensor.type = getattr(self.s.TensorType, "INT4" if packed else str(array.dtype).upper())
        if len(scales):
            tensor.quantization = self._quantization(scales, [zero] * len(scales), axis)
        buffer = self.s.BufferT()
        content = nibbles.pack(array.reshape(-1), 4) if packed else array
        buffer.data = np.frombuffer(content.tobytes(), np.uint8)
        self.buffers.append(buffer)
        return self._constants.setdefault(key, self._add(tensor, ""))

    def op(self, kind: str, inputs: Sequence[int], output: Value, **options: Any) -> Value:
        """Adds an operation and returns its output."""
        operator = self.s.OperatorT()
        if kind not in self.codes:
            self.codes.append(kind)
        operator.opcodeIndex, operator.inputs, operator.outputs = self.codes.index(kind), list(inputs), [output.index]
        if kind in OPTIONS:
            table = getattr(self.s, f"{OPTIONS[kind]}T")()
            for key, value in options.items():
                setattr(table, key, value)
            operator.builtinOptionsType = getattr(self.s.BuiltinOptions, OPTIONS[kind])
            operator.builtinOptions = table
        self.graph.operators.append(operator)
        return output

    def ordered(self, value: Value, last: bool) -> Value:
        """`value` in the order of memory that is asked for (channels last or not), where it has two."""
        if value.last == last or len(value.shape) != 4:
            return value
        key = value.index, last
        if key not in self._reordered:
            output = self.value(value.shape, value.grid, last)
            _, channels, *pixels = value.shape
            if 1 in (channels, math.prod(pixels)):  # the same bytes
                shape = self.constant(np.array(output.memory, np.int32))
                self.op("RESHAPE", [value.index, shape], output, newShape=list(output.memory))
            else:
                axes = self.constant(np.array(CHANNELS_LAST if last else CHANNELS_FIRST, np.int32))
                self.op("TRANSPOSE", [value.index, axes], output)
            self._reordered[key] = output
        return self._reordered[key]

    def finish(self, source: Value, result: Value) -> bytes:
        """The file."""
        s, model = self.s, self.s.ModelT()
        self.graph.inputs, self.graph.outputs = [source.index], [result.index]
        model.version, model.subgraphs, model.buffers, model.description = 3, [self.graph], self.buffers, "qat"
        model.operatorCodes = []
        for kind in self.codes:
            code = s.OperatorCodeT()
            code.builtinCode = getattr(s.BuiltinOperator, kind)
            code.deprecatedBuiltinCode = min(code.builtinCode, 127)
            model.operatorCodes.append(code)
        about, buffer = s.MetadataT(), s.BufferT()
        buffer.data = np.frombuffer(json.dumps(self.layers).encode(), np.uint8)
        about.name, about.buffer = LAYERS, len(self.buffers)
        self.buffers.append(buffer)
        model.metadata = [about]
        return serialize(model)


def serialize(model: Any) -> bytes:
    """A model's objects as the bytes of a file."""
    import flatbuffers  # pyright: ignore[reportMissingImports]

    class Sharing(flatbuffers.Builder):
        """Stores equal vectors once: the zero points of all weights and biases are zero."""

        def __init__(self) -> None:
            super().__init__(2**16)
            self.stored: dict[Any, int] = {}

        def CreateNumpyVector(self, x: np.ndarray) -> int:  # noqa: N802 - the package's name
            key = x.dtype.str, x.tobytes()
            if key not in self.stored:
                self.stored[key] = super().CreateNumpyVector(x)
            return self.stored[key]

    builder = Sharing()
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())
