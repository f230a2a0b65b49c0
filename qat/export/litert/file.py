"""Reading a `.tflite` file: its operations and whose weights they read; and the same file with layers made visible."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from qat.errors import UserError, first_line
from qat.export import nibbles
from qat.export.litert.builder import LAYERS, schema

PRODUCTS = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "BATCH_MATMUL")
CLIPS = ("RELU", "RELU6", "MINIMUM", "MAXIMUM")


class TfliteFile:
    """A `.tflite` file, read without its runtime.

    Args:
        path: The file.

    Attributes:
        model: The flatbuffer as objects.
        layers: Every layer's tensor of codes, and the order of axes that gives torch's.

    Raises:
        UserError: if it is none of ours.
    """

    def __init__(self, path: Path) -> None:
        self.s = schema()
        try:
            self.model: Any = self.s.ModelT.InitFromObj(self.s.Model.GetRootAs(path.read_bytes(), 0))
            [about] = [m for m in self.model.metadata if m.name == LAYERS.encode()]
            self.layers: dict[str, Any] = json.loads(bytes(self.model.buffers[about.buffer].data))
        except Exception as error:  # whatever its readers stumble over
            raise UserError(f"{path}: is damaged: {first_line(error)}") from None
        self.graph = self.model.subgraphs[0]

    def kind(self, operator: Any) -> str:
        """The name of an operation."""
        code = self.model.operatorCodes[operator.opcodeIndex].builtinCode
        return next(name for name, value in vars(self.s.BuiltinOperator).items() if value == code)

    def array(self, index: int) -> np.ndarray:
        """A constant; int4 is widened."""
        tensor = self.graph.tensors[index]
        data, kinds = np.asarray(self.model.buffers[tensor.buffer].data, np.uint8), self.s.TensorType
        if tensor.type == kinds.INT4:
            return nibbles.unpack(data, 4, signed=True)[: math.prod(tensor.shape)].reshape(tensor.shape)
        dtype = {kinds.INT8: np.int8, kinds.INT32: np.int32, kinds.FLOAT32: np.float32}[tensor.type]
        return data.view(dtype).reshape(tensor.shape)

    def codes(self) -> dict[str, np.ndarray]:
        """The integer weights by layer."""
        return {name: self.array(index).transpose(axes) for name, (index, axes) in self.layers.items()}

    def is_integer(self, operator: Any) -> bool:
        """Whether it is a product of codes."""
        types = [self.graph.tensors[index].type for index in operator.inputs[:2]]
        return self.kind(operator) in PRODUCTS and all(
            t in (self.s.TensorType.INT8, self.s.TensorType.INT4) for t in types
        )

    def unfollowed(self) -> int:
        """How many products of codes are computed in float because their output is not quantized."""
        writers = {index: operator for operator in self.graph.operators for index in operator.outputs}
        return sum(
            self.kind(operator) in PRODUCTS
            and all(i in writers and self.kind(writers[i]) == "DEQUANTIZE" for i in operator.inputs[:2])
            and not self._becomes_codes(operator)
            for operator in self.graph.operators
        )

    def _becomes_codes(self, operator: Any) -> bool:
        readers = [each for each in self.graph.operators if operator.outputs[0] in each.inputs]
        if len(readers) != 1:
            return False
        kind = self.kind(readers[0])
        return kind == "QUANTIZE" or (kind in CLIPS and self._becomes_codes(readers[0]))

    def integer_nodes(self) -> int:
        """How many products are computed on integers."""
        return sum(map(self.is_integer, self.graph.operators))

    def operators(self) -> dict[str, Any]:
        """The product of each layer; layers that share one tensor are left out, since nothing tells them apart."""
        owners: dict[int, list[str]] = {}
        for name, (index, _) in self.layers.items():
            owners.setdefault(index, []).append(name)
        found: dict[str, Any] = {}
        for operator in self.graph.operators:
            names = [name for index in operator.inputs for name in owners.get(index, [])]
            if self.kind(operator) == "DEQUANTIZE" and names:
                owners[operator.outputs[0]] = names
            elif len(names) == 1:
                found[names[0]] = operator
        return found

    def expose(self, operator: Any) -> int:
        """Makes the output of a product visible in float, without the ReLU behind it; an integer product is computed
        in float from the same codes, and then quantized.

        Returns:
            The tensor.
        """
        if not self.is_integer(operator):
            return operator.outputs[0]
        [result], options = operator.outputs, operator.builtinOptions
        x, weight, bias = operator.inputs
        scales = np.array(self.graph.tensors[bias].quantization.scale, np.float64)
        values = (self.array(bias) * scales).astype(np.float32)
        operator.inputs = [self._dequantized(x, operator), self._dequantized(weight, operator), self._constant(values)]
        operator.outputs = [shown] = [self._tensor(self.graph.tensors[result])]
        at = self.graph.operators.index(operator) + 1
        source = shown
        if options.fusedActivationFunction:
            source = self._tensor(self.graph.tensors[result])
            self.graph.operators.insert(at, self._operator("RELU", shown, source))
            at, options.fusedActivationFunction = at + 1, 0
        self.graph.operators.insert(at, self._operator("QUANTIZE", source, result))
        return shown

    def _tensor(self, like: Any) -> int:
        """A float tensor of the shape of another."""
        tensor = copy.copy(like)
        tensor.type, tensor.quantization, tensor.buffer = self.s.TensorType.FLOAT32, None, 0
        tensor.name = f"shown{len(self.graph.tensors)}"
        self.graph.tensors.append(tensor)
        return len(self.graph.tensors) - 1

    def _constant(self, values: np.ndarray) -> int:
        buffer, index = self.s.BufferT(), self._tensor(self.s.TensorT())
        buffer.data = np.frombuffer(values.tobytes(), np.uint8)
        self.graph.tensors[index].shape, self.graph.tensors[index].buffer = list(values.shape), len(self.model.buffers)
        self.model.buffers.append(buffer)
        return index

    def _dequantized(self, index: int, reader: Any) -> int:
        output = self._tensor(self.graph.tensors[index])
        self.graph.operators.insert(self.graph.operators.index(reader), self._operator("DEQUANTIZE", index, output))
        return output

    def _operator(self, kind: str, source: int, result: int) -> Any:
        code = getattr(self.s.BuiltinOperator, kind)
        known = [c.builtinCode for c in self.model.operatorCodes]
        if code not in known:
            new = self.s.OperatorCodeT()
            new.builtinCode = new.deprecatedBuiltinCode = code
            self.model.operatorCodes.append(new)
            known.append(code)
        operator = self.s.OperatorT()
        operator.opcodeIndex, operator.inputs, operator.outputs = known.index(code), [source], [result]
        return operator
