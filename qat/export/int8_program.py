"""A converted model as the program that int8 runtimes look for: what torch calls the reference representation.

Every grid is a `quantized_decomposed` pair with its scale and zero point written out as numbers, activations are codes
of one type, and a tensor that several layers read on one grid is quantized once. Runtimes have int8 (or uint8) kernels
alone: a grid whose codes have the other sign is moved by 128, which changes no value, and a narrower one clips before
it is quantized (rounding is monotone, so that gives the same codes).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # defines torch.ops.quantized_decomposed
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from qat.copies import copied
from qat.errors import UserError
from qat.export.torch.trace import traced
from qat.integer import Eager, IntegerActivation, IntegerLayer, IntegerTensor, emitting
from qat.planning.plan import Plan

OPS: Any = torch.ops.quantized_decomposed
ATEN: Any = torch.ops.aten
QUANTIZE, DEQUANTIZE = OPS.quantize_per_tensor.default, OPS.dequantize_per_tensor.default
DEQUANTIZE_CHANNELS = OPS.dequantize_per_channel.default
CONVOLUTIONS = (ATEN.conv1d.default, ATEN.conv2d.default)
PRODUCTS = (*CONVOLUTIONS, ATEN.linear.default, ATEN.matmul.default, ATEN.bmm.default)
IDENTITIES = ATEN.dropout.default, ATEN.contiguous.default, ATEN.clone.default, ATEN.alias.default
CLIPS = {ATEN.relu.default: (0.0, math.inf), ATEN.relu6.default: (0.0, 6.0), ATEN.hardtanh.default: (-1.0, 1.0)}
"""Clips, and their limits where a node names no others."""
MOVES = (
    *(ATEN.max_pool1d.default, ATEN.max_pool2d.default, ATEN.flatten.using_ints, ATEN.view.default),
    *(ATEN.reshape.default, ATEN.permute.default, ATEN.transpose.int, ATEN.squeeze.dim, ATEN.unsqueeze.default),
    *(ATEN.slice.Tensor, ATEN.pad.default, ATEN.constant_pad_nd.default),
)
"""Operations that pick values, or add zeros, which every grid of an activation has: they commute with quantization."""


def int8_refusal(plan: Plan, runtime: str) -> str | None:
    """Why int8 kernels have no form for a plan's weights; `None` if they have one."""
    for name, spec in plan.weights.items():
        if spec.granularity == "group":
            return f"'{name}' has scales for groups of weights, which {runtime} cannot read; use granularity: channel"
        if not (spec.symmetric and spec.signed):
            return f"'{name}' has weights with a zero point, which {runtime} cannot read; use symmetric: true"
    return None


class Int8Emitter(Eager):
    """Writes the operations while a model is traced.

    Args:
        model: A converted model, which is changed: its grids get the numbers that the trace will show.
        dtype: Type of the activation codes, `torch.int8` or `torch.uint8`.
        float_bias: Biases as float constants (runtimes divide them by s_x * s_w themselves, which gives back the codes)
            and not as int32 codes.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, float_bias: bool) -> None:
        self.dtype = dtype
        written: set[IntegerTensor] = set()
        for module in list(model.modules()):
            if isinstance(module, IntegerActivation):
                signed = module.quant_min < 0
                offset = {torch.int8: 0 if signed else -128, torch.uint8: 128 if signed else 0}[dtype]
                self._write_out(module, module.scale, module.zero_point + offset)
                module.code_range = module.quant_min + offset, module.quant_max + offset  # pyright: ignore[reportArgumentType]
            elif isinstance(module, IntegerLayer):
                if module.integer_weight not in written:  # tied layers have one
                    self._weight(module.integer_weight, getattr(module, "channel_axis", None))
                    written.add(module.integer_weight)
                if module.integer_bias is not None:
                    self._bias(module, float_bias)

    @staticmethod
    def _write_out(module: Any, scale: Tensor, zero_point: Tensor) -> None:
        """Makes numbers of a grid, whose tensors nobody reads then: a file would hold them all the same."""
        module.numbers = float(scale), int(zero_point)
        del module.scale, module.zero_point

    def _weight(self, weight: IntegerTensor, axis: int | None) -> None:
        """One scale becomes one per output channel, which every runtime has kernels for."""
        if weight.axis is None and axis is not None:
            outputs = weight.codes.shape[axis]
            weight.scale, weight.axis = weight.scale.expand(outputs).contiguous(), axis
            weight.zero_point = weight.zero_point.expand(outputs).contiguous()
        elif weight.axis is None:
            self._write_out(weight, weight.scale, weight.zero_point)
            return
        weight.zero_point = weight.zero_point.long()

    def _bias(self, layer: IntegerLayer, as_float: bool) -> None:
        assert layer.integer_bias is not None
        if as_float:
            layer.bias = nn.Parameter(Eager.dequantize(self, layer.integer_bias), requires_grad=False)
            layer.integer_bias = None
        else:
            layer.integer_bias.zero_point = layer.integer_bias.zero_point.long()
            if layer.integer_bias.axis is None:
                self._write_out(layer.integer_bias, layer.integer_bias.scale, layer.integer_bias.zero_point)

    def dequantize(self, tensor: IntegerTensor) -> Tensor:
        codes, limits = tensor.codes, torch.iinfo(tensor.codes.dtype)
        if tensor.axis is None:
            scale, zero_point = tensor.numbers  # pyright: ignore[reportGeneralTypeIssues]
            return DEQUANTIZE(codes, scale, zero_point, limits.min, limits.max, codes.dtype)
        low = max(limits.min, -limits.max)  # symmetric; XNNPACK takes -8 .. 7 for packed int4
        return DEQUANTIZE_CHANNELS(codes, tensor.scale, tensor.zero_point, tensor.axis, low, limits.max, codes.dtype)

    def quantize_dequantize(self, x: Tensor, grid: Any) -> Tensor:
        limits, (scale, zero), (low, high) = torch.iinfo(self.dtype), grid.numbers, grid.code_range
        if (low, high) != (limits.min, limits.max):
            x = F.hardtanh(x, (low - zero) * scale, (high - zero) * scale)
        arguments = scale, zero, limits.min, limits.max, self.dtype
        return DEQUANTIZE(QUANTIZE(x, *arguments), *arguments)


def int8_program(
    model: nn.Module,
    example: Tensor,
    dtype: torch.dtype = torch.int8,
    *,
    float_bias: bool = True,
    max_batch: int | None = None,
) -> ExportedProgram:
    """Traces a converted model, which is left as it is.

    Args:
        model: The model, whose forward takes one tensor `[N, ...]` and returns one.
        example: An input of at least two samples.
        dtype: Type of the activation codes.
        float_bias: See `Int8Emitter`.
        max_batch: The largest batch; any, if `None`.

    Raises:
        UserError: if it takes or returns something else, or cannot be traced, with torch's reason.
    """
    if not isinstance(example, Tensor):
        raise UserError(f"{type(model).__name__} is called with {type(example).__name__}, and not with one tensor")
    model = copied(model).eval()
    with emitting(Int8Emitter(model, dtype, float_bias)):
        program = traced(model, example.clone(), max_batch)
    if len(program.graph_signature.user_outputs) != 1:
        raise UserError(
            f"{type(model).__name__} returns several values: this format needs a forward that returns one tensor"
        )
    _drop_identities(program.graph)
    _merge(program.graph)
    while _quantize_early(program.graph):
        _merge(program.graph)
    program.graph_module.recompile()
    return program


def _drop_identities(graph: fx.Graph) -> None:
    """Takes out what changes nothing in evaluation, so that a layer's reader is next to it."""
    for target in IDENTITIES:
        for node in graph.find_nodes(op="call_function", target=target):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _quantize_early(graph: fx.Graph) -> bool:
    """Quantizes (and clips) in front of what only moves values, so that the layer before it sees its grid; returns
    whether there was anything to do."""
    moved = False
    for quantize in reversed(graph.find_nodes(op="call_function", target=QUANTIZE)):
        clips, move, grid = [], quantize.args[0], quantize.args[1:]
        while move.target in CLIPS and len(move.users) == 1:
            clips.insert(0, move)
            move = move.args[0]
        if not _moves(move) or len(move.users) > 1 or move.args[0].target is DEQUANTIZE:
            continue
        source: Any = move.args[0]
        at, moved = source, True
        with graph.inserting_before(move):
            for target, rest in [*((c.target, c.args[1:]) for c in clips), (QUANTIZE, grid), (DEQUANTIZE, grid)]:
                at = graph.call_function(target, (at, *rest))
                at.meta["val"] = source.meta["val"].to(grid[-1]) if target is QUANTIZE else source.meta["val"]
        move.args, quantize.args = (at, *move.args[1:]), (move, *grid)
    graph.eliminate_dead_code()
    return moved


def _moves(node: fx.Node) -> bool:
    """Whether an operation picks values or adds zeros."""
    padding = node.target in (ATEN.pad.default, ATEN.constant_pad_nd.default)
    return node.target in MOVES and not (padding and any(each not in ("constant", None, 0) for each in node.args[2:]))


def _merge(graph: fx.Graph) -> None:
    """Quantizes a tensor once per grid, and makes one clip of a narrow grid's and the model's own in front of it:
    runtimes look for one behind a product."""
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in (QUANTIZE, ATEN.hardtanh.default):
            continue
        if node.target is ATEN.hardtanh.default:
            _clip_once(node)
        key = node.target, node.args
        if key in seen:
            node.replace_all_uses_with(seen[key])
            graph.erase_node(node)
            continue
        seen[key] = node
    graph.eliminate_dead_code()


def _clip_once(clip: fx.Node) -> None:
    """Gives a clip the limits of the one that it reads, too; not where nothing, or one number, lies within both."""
    source: Any = clip.args[0]
    if source.target not in CLIPS:
        return
    (low, high), (least, most) = limits_of(clip), limits_of(source)
    if max(low, least) < min(high, most):
        clip.args = source.args[0], max(low, least), min(high, most)


def limits_of(clip: fx.Node) -> tuple[float, float]:
    """The limits of one of `CLIPS`."""
    given: Any = clip.args[1:]
    low, high = (*given, *CLIPS[clip.target][len(given) :])
    return low, high


def float_products(program: ExportedProgram, kinds: Sequence[Any] | None = None) -> list[str]:
    """The layers whose integer product has no grid behind it, by name: int8 kernels return int8 alone.

    Args:
        program: See `int8_program`.
        kinds: Only products of constant codes of these kinds; all of them, if `None`.
    """
    return [
        name
        for node in program.graph.nodes
        if node.target in (kinds or PRODUCTS) and (name := layer_of(node)) is not None and not _becomes_codes(node)
        if all(_from_codes(operand) for operand in node.args[(0 if kinds is None else 1) : 2])
    ]


def layer_of(node: fx.Node) -> str | None:
    """The module that a node's operation belongs to; of one that torch added, that of a node beside it."""
    for near in (node, *node.users, *node.all_input_nodes):
        paths = [path for path, _ in (near.meta.get("nn_module_stack") or {}).values() if path.startswith("model")]
        if paths:
            return paths[-1].removeprefix("model.")
    return None


def _from_codes(node: Any) -> bool:
    while node.target in MOVES or node.target in IDENTITIES:
        node = node.args[0]
    return node.target in (DEQUANTIZE, DEQUANTIZE_CHANNELS)


def _becomes_codes(node: fx.Node) -> bool:
    if len(node.users) != 1:
        return False
    (reader,) = node.users
    if reader.target in CLIPS:
        return _becomes_codes(reader)
    return reader.target is QUANTIZE
