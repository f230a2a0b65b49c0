"""From the int8 program of a converted model to LiteRT's operations.

An operation whose operands are codes and whose result is quantized becomes an int8 one, with the ReLU or clip between
them in its limits; biases stay the int32 codes of the accumulator. Everything else is computed in float between
DEQUANTIZE and QUANTIZE, a layer that no grid follows among it, whose weight stays codes in the file all the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.export import ExportedProgram

from qat.errors import UserError
from qat.export.int8_graph import CLIPS, DEQUANTIZE, DEQUANTIZE_CHANNELS, QUANTIZE, layer_of, limits_of
from qat.export.litert.builder import Builder, Grid, Value
from qat.integer import WEIGHT_CODES, IntegerLayer, reads_elementwise

LOW, HIGH = -128, 127


@dataclass(frozen=True)
class Codes:
    """The grid that an operation's result is put on.

    Attributes:
        quantize: The node that does it.
        grid: The grid of that node.
        low, high: Limits of the codes, by the node and the clips before it.
        clips: The clips before it.
    """

    quantize: fx.Node
    grid: Grid
    low: int
    high: int
    clips: tuple[fx.Node, ...] = ()

    @property
    def relu(self) -> bool:
        """Whether the limits are those of a ReLU."""
        return self.low == self.grid[1] and self.high == HIGH


def codes_after(node: fx.Node) -> Codes | None:
    """The grid behind a node, if nothing but clips stands between and nobody else reads what is there."""
    clips, at = ([node] if node.target in CLIPS else []), node
    while len(at.users) == 1:
        (at,) = at.users
        if at.target is QUANTIZE:
            break
        if at.target not in CLIPS:
            return None
        clips.append(at)
    if at.target is not QUANTIZE:
        return None
    numbers: Any = at.args[1:5]
    scale, zero, low, high = numbers
    for below, above in map(limits_of, clips):
        low, high = max(low, _code(below, scale, zero)), min(high, _code(above, scale, zero))
    return Codes(at, (scale, zero), low, high, tuple(clips))


def _code(bound: float, scale: Any, zero: Any) -> int:
    return int(np.clip(np.rint(np.float32(bound) / np.float32(scale)) + zero, LOW, HIGH))


class Lowering:
    """One program on its way.

    Args:
        program: See `int8_program`, with int32 biases.
        model: The converted model that it was traced from.
        handlers: How operations are written, by their torch names.
        int4: Whether codes of up to 4 bits take 4 bits.
    """

    def __init__(
        self,
        program: ExportedProgram,
        model: nn.Module,
        handlers: dict[Any, Callable[["Lowering", fx.Node], Any]],
        int4: bool = False,
    ) -> None:
        self.int4 = int4
        self.program, self.model, self.handlers, self.build = program, model, handlers, Builder()
        names = {**program.graph_signature.inputs_to_parameters, **program.graph_signature.inputs_to_buffers}
        state = {**program.state_dict, **program.constants}
        lifted = program.graph_signature.inputs_to_lifted_tensor_constants
        self.parameters = {name: state[key] for name, key in {**names, **lifted}.items()}
        self.owners = names
        self.values: dict[fx.Node, Value] = {}
        """Results of nodes; for quantize and dequantize nodes, the codes."""
        self.floats: dict[fx.Node, Value] = {}
        self.absorbed: set[fx.Node] = set()
        """The clips that became limits of operations before them."""

    def run(self) -> bytes:
        """Writes all of it."""
        source = result = None
        for node in self.program.graph.nodes:
            if node.op == "placeholder" and node.name not in self.parameters:
                kind = {torch.int64: "INT64", torch.int32: "INT32"}.get(node.meta["val"].dtype, "FLOAT32")
                source = self.values[node] = self.build.value(self.shape(node), kind=kind, name="input")
            elif node.op == "output":
                result = self.build.ordered(self.float(node.args[0][0]), False)
            elif node.op == "call_function" and node not in self.values and node not in self.absorbed:
                self._call(node)
        assert source is not None and result is not None
        self.build.graph.tensors[result.index].name = "output"
        return self.build.finish(source, result)

    def _call(self, node: fx.Node) -> None:
        if node.target in (DEQUANTIZE, DEQUANTIZE_CHANNELS):
            codes: Any = node.args[0]
            if codes.name not in self.parameters:
                self.values[node] = self.values[codes]
            elif self._is_operand(node):
                shape, grid = self.shape(node), (node.args[1], node.args[2])
                value = self.weight(node, range(len(shape)))
                self.values[node] = Value(value, shape, grid)  # pyright: ignore[reportArgumentType]
        elif node.target not in self.handlers:
            if node.users:
                where = f"'{layer_of(node)}': " if layer_of(node) else ""
                raise UserError(f"{where}{node.target} has no form in this package's .tflite files")
        else:
            self.handlers[node.target](self, node)

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """The shape of what a node returns, -1 for what depends on the batch."""
        return tuple(size if isinstance(size, int) else -1 for size in node.meta["val"].shape)

    # -- operands ------------------------------------------------------------------------------------------------------

    def array(self, node: Any) -> np.ndarray | None:
        """A constant's values; of codes, the codes."""
        if isinstance(node, fx.Node) and node.target in (DEQUANTIZE, DEQUANTIZE_CHANNELS):
            node = node.args[0]
        if isinstance(node, fx.Node):
            found = self.parameters.get(node.name)
            return None if found is None else found.detach().cpu().numpy()
        return np.array(node, np.float32)

    def is_codes(self, node: Any) -> bool:
        """Whether an operand is read from codes that an operation wrote."""
        return isinstance(node, fx.Node) and node.target is DEQUANTIZE and node in self.values

    def scales(self, node: fx.Node) -> tuple[np.ndarray, int]:
        """Scales of constant codes, and the axis that they belong to."""
        args: Any = node.args
        if node.target is DEQUANTIZE:
            return np.array([args[1]], np.float32), 0
        return self.parameters[args[1].name].numpy(), args[3]

    def bits(self, node: fx.Node) -> int:
        """Width that constant codes are stored in."""
        return self._layer(node).integer_weight.bits if self.int4 and not self._is_operand(node) else 8

    def _is_operand(self, node: fx.Node) -> bool:
        """Whether constant codes are an operand like any other, of an addition or an elementwise product."""
        codes: Any = node.args[0]
        name = self.owners.get(codes.name, "")
        return name.endswith(WEIGHT_CODES) and reads_elementwise(self._layer(node))

    def _layer(self, node: fx.Node) -> IntegerLayer:
        """Whose constant codes they are."""
        codes: Any = node.args[0]
        name = self.owners[codes.name].removeprefix("model.")
        layer = self.model.get_submodule(name.removesuffix(WEIGHT_CODES))
        assert isinstance(layer, IntegerLayer)
        return layer

    def weight(self, node: fx.Node, axes: Sequence[int]) -> int:
        """Constant codes as a tensor of the file, their axes in the order that its operation wants."""
        scales, axis = self.scales(node)
        codes: Any = self.array(node)
        zero: Any = node.args[2] if self._is_operand(node) else 0
        at = list(axes).index(axis)
        index = self.build.constant(codes.transpose(axes), scales, at, zero=zero, bits=self.bits(node))
        own = self._layer(node).integer_weight
        for name, module in self.model.named_modules():
            if isinstance(module, IntegerLayer) and module.integer_weight is own:  # tied layers have one
                self.build.graph.tensors[index].name = f"{name}.weight"
                self.build.layers[name] = [index, [int(axis) for axis in np.argsort(axes)]]
        return index

    def float(self, node: Any) -> Value:
        """An operand in float."""
        if not isinstance(node, fx.Node):
            return self._constant(np.array(node, np.float32))
        if node in self.floats:
            return self.floats[node]
        if node.name in self.parameters:
            self.floats[node] = self._constant(self.array(node))
        elif node.target in (DEQUANTIZE, DEQUANTIZE_CHANNELS) and node not in self.values:
            self.floats[node] = self.float_weight(node, range(len(self.shape(node))))
        elif self.values[node].grid is not None:
            codes = self.values[node]
            self.floats[node] = self.build.op(
                "DEQUANTIZE", [codes.index], self.build.value(codes.shape, None, codes.last)
            )
        else:
            return self.values[node]
        return self.floats[node]

    def float_weight(self, node: fx.Node, axes: Sequence[int]) -> Value:
        """Constant codes, made floats as the file is run; int32 ones (biases) are constants right away."""
        codes: Any = self.array(node)
        if codes.dtype == np.int32:
            return self._constant((codes * self.scales(node)[0].astype(np.float64)).astype(np.float32))
        output = self.build.value([codes.shape[axis] for axis in axes])
        return self.build.op("DEQUANTIZE", [self.weight(node, axes)], output)

    def _constant(self, array: Any) -> Value:
        return Value(self.build.constant(array), array.shape)

    # -- results -------------------------------------------------------------------------------------------------------

    def limited(self, value: Value, after: Codes, relu: bool = False) -> None:
        """Keeps codes within limits, as what the quantize node returns.

        Args:
            value: The codes.
            after: The limits.
            relu: Whether the operation that wrote them kept those of a ReLU.
        """
        assert value.grid is not None
        scale, zero = value.grid
        for kind, code, free in (("MAXIMUM", after.low, LOW), ("MINIMUM", after.high, HIGH)):
            if code != free and not (relu and after.relu):
                bound = self.build.constant(np.array(code, np.int8), [scale], zero=zero)
                value = self.build.op(kind, [value.index, bound], self.build.value(value.shape, value.grid, value.last))
        self.values[after.quantize] = value
        self.absorbed.update(after.clips)

    def quantized(self, node: fx.Node, after: Codes) -> None:
        """Puts what a node returns on the grid of the quantize node.

        Codes of another grid go through float: from codes to codes the runtime multiplies by a factor of few bits, and
        7 (XNNPACK) or 15 of 256 codes become the neighbour of what they are on a grid of 4 bits.
        """
        value = self.values[node] if self.is_codes(node) else self.float(node)
        if value.grid != after.grid:
            value = self.float(node)
            output = self.build.value(value.shape, after.grid, value.last)
            value = self.build.op("QUANTIZE", [value.index], output)
        self.limited(value, after)
