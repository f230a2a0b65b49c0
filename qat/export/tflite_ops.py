"""How each torch operation is written for LiteRT; see `qat.export.tflite_lower`."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import fx

from qat.errors import UserError
from qat.export.int8_program import ATEN, QUANTIZE, layer_of
from qat.export.tflite_builder import Value
from qat.export.tflite_lower import CLIPS, LOW, Codes, Lowering, bounds, codes_after

Handler = Callable[[Lowering, fx.Node], Any]
VALID = 1
RELU = 1
"""Numbers of the schema: `Padding.VALID`, `ActivationFunctionType.RELU`."""


def _pair(value: Any) -> list[int]:
    values = list(value) if isinstance(value, list | tuple) else [value]
    return values * 2 if len(values) == 1 else values


def _arguments(node: fx.Node, *defaults: Any) -> list[Any]:
    """Positional arguments, completed by defaults."""
    return [*node.args, *defaults[len(node.args) :]]


def _weighted(low: Lowering, node: fx.Node) -> Codes | None:
    """The grid of a product's result, if it can be computed on integers: codes times codes, and a grid behind it."""
    x, weight = node.args[:2]
    return codes_after(node) if low.is_codes(x) and _is_weight(low, weight) else None


def _is_weight(low: Lowering, node: Any) -> bool:
    return node not in low.values and node.name not in low.parameters and low.array(node) is not None


def _product(
    low: Lowering, node: fx.Node, kind: str, x: Value, axes: Sequence[int], last: bool, **options: Any
) -> None:
    """A layer: integers where `_weighted` says so, else float, its weight made float as the file runs."""
    weight: Any = node.args[1]
    bias = node.args[2] if len(node.args) > 2 else None
    outputs, after = node.meta["val"].shape[1 if last else -1], _weighted(low, node)
    if after is None:
        w = _float_weight(low, node, axes)
        b = low.build.constant(np.zeros(outputs, np.float32)) if bias is None else low.float(bias).index
        low.values[node] = low.build.op(kind, [x.index, w, b], low.build.value(low.shape(node), None, last), **options)
        return
    assert x.grid is not None
    scales = np.float32(x.grid[0]) * low.scales(weight)[0]
    codes = np.zeros(outputs, np.int32) if bias is None else low.array(bias)
    b = low.build.constant(codes, np.broadcast_to(scales, outputs) if len(scales) > 1 else scales)
    output = low.build.value(low.shape(node), after.grid, last)
    activation = {"fusedActivationFunction": RELU} if after.relu else {}
    low.build.op(kind, [x.index, low.weight(weight, axes), b], output, **options, **activation)
    low.limited(output, after, relu=True)


def _float_weight(low: Lowering, node: fx.Node, axes: Sequence[int]) -> int:
    weight = node.args[1]
    if _is_weight(low, weight):
        return low.float_weight(weight, axes).index  # pyright: ignore[reportArgumentType]
    array = low.array(weight)
    if array is None:
        raise UserError(
            f"'{layer_of(node)}': its weight is computed, which has no form in this package's .tflite files"
        )
    return low.build.constant(array.transpose(axes))


def _operand(low: Lowering, node: Any, integer: bool) -> Value:
    return low.values[node] if integer else low.float(node)


def conv2d(low: Lowering, node: fx.Node) -> None:
    x, _, _, stride, padding, dilation, groups = _arguments(node, *[None] * 3, 1, 0, 1, 1)
    if isinstance(padding, str):
        raise UserError(f"'{layer_of(node)}': padding={padding!r} has no form in .tflite files; write the numbers")
    (stride, padding, dilation), integer = map(_pair, (stride, padding, dilation)), _weighted(low, node) is not None
    value = low.build.ordered(_operand(low, x, integer), True)
    if any(padding):
        amounts = np.array([[0, 0], *([p, p] for p in padding), [0, 0]], np.int32)
        n, c, h, w = value.shape
        bigger = low.build.value((n, c, h + 2 * padding[0], w + 2 * padding[1]), value.grid, True)
        value = low.build.op("PAD", [value.index, low.build.constant(amounts)], bigger)
    channels, outputs = value.shape[1], node.meta["val"].shape[1]
    options = {"padding": VALID, "strideH": stride[0], "strideW": stride[1]}
    options |= {"dilationHFactor": dilation[0], "dilationWFactor": dilation[1]}
    if groups == channels and groups > 1:
        options["depthMultiplier"] = outputs // channels
        _product(low, node, "DEPTHWISE_CONV_2D", value, (1, 2, 3, 0), True, **options)
    else:
        _product(low, node, "CONV_2D", value, (0, 2, 3, 1), True, **options)


def linear(low: Lowering, node: fx.Node) -> None:
    value = low.build.ordered(_operand(low, node.args[0], _weighted(low, node) is not None), False)
    options = {"keepNumDims": len(value.shape) > 2}
    _product(low, node, "FULLY_CONNECTED", value, (0, 1), False, **options)


def _aligned(low: Lowering, values: list[Value]) -> list[Value]:
    """The same order of memory for all operands."""
    last = any(value.last for value in values) and all(len(value.shape) in (0, 4) for value in values)
    return [low.build.ordered(value, last) for value in values]


def binary(kind: str) -> Handler:
    def write(low: Lowering, node: fx.Node) -> None:
        if node.kwargs.get("alpha", 1) != 1:
            raise UserError(f"'{layer_of(node)}': alpha={node.kwargs['alpha']} has no form in .tflite files")
        operands = list(node.args[:2])
        after = codes_after(node) if all(map(low.is_codes, operands)) and kind != "DIV" else None
        values = _aligned(low, [_operand(low, x, after is not None) for x in operands])
        last = any(value.last for value in values)
        output = low.build.value(low.shape(node), after and after.grid, last)
        options = {"fusedActivationFunction": RELU} if after is not None and after.relu else {}
        low.build.op(kind, [value.index for value in values], output, **options)
        _finish(low, node, output, after, relu=True)

    return write


def _finish(low: Lowering, node: fx.Node, output: Value, after: Codes | None, relu: bool = False) -> None:
    """What a node returns: floats, or the codes that a quantize node behind it returns."""
    if after is None:
        low.values[node] = output
    else:
        low.limited(output, after, relu)


def unary(kind: str, **options: Any) -> Handler:
    def write(low: Lowering, node: fx.Node) -> None:
        value = low.float(node.args[0])
        output = low.build.value(low.shape(node), None, value.last)
        low.values[node] = low.build.op(kind, [value.index], output, **options)

    return write


def gelu(low: Lowering, node: fx.Node) -> None:
    unary("GELU", approximate=node.kwargs.get("approximate", "none") == "tanh")(low, node)


def silu(low: Lowering, node: fx.Node) -> None:
    value = low.float(node.args[0])
    gate = low.build.op("LOGISTIC", [value.index], low.build.value(value.shape, None, value.last))
    output = low.build.value(value.shape, None, value.last)
    low.values[node] = low.build.op("MUL", [value.index, gate.index], output)


def softmax(low: Lowering, node: fx.Node) -> None:
    value = low.build.ordered(low.float(node.args[0]), False)
    if node.args[1] not in (-1, len(value.shape) - 1):
        raise UserError(f"'{layer_of(node)}': softmax over dim={node.args[1]}: .tflite files have the last one alone")
    output = low.build.value(value.shape)
    low.values[node] = low.build.op("SOFTMAX", [value.index], output, beta=1.0)


def clip(low: Lowering, node: fx.Node) -> None:
    x: Any = node.args[0]
    if (after := codes_after(node)) is not None:
        low.quantized(low.values[x] if low.is_codes(x) else low.float(x), after)
        return
    value = low.float(x)
    for kind, bound in zip(("MAXIMUM", "MINIMUM"), bounds(node), strict=True):
        if bound is not None:
            limit = low.build.constant(np.array(bound, np.float32))
            value = low.build.op(kind, [value.index, limit], low.build.value(value.shape, None, value.last))
    low.values[node] = value


def quantize(low: Lowering, node: fx.Node) -> None:
    """What nothing before it was fused with."""
    x: Any = node.args[0]
    scale, zero, lowest, highest = node.args[1:5]
    value = low.values[x] if low.is_codes(x) else low.float(x)
    low.quantized(value, Codes(node, (scale, zero), lowest, highest))  # pyright: ignore[reportArgumentType]


def max_pool2d(low: Lowering, node: fx.Node) -> None:
    x, kernel, stride, padding, dilation, ceil = _arguments(node, None, None, [], 0, 1, False)
    kernel, stride = _pair(kernel), _pair(stride or kernel)
    if _pair(dilation) != [1, 1] or ceil:
        raise UserError(f"'{layer_of(node)}': max pooling with dilation or ceil_mode has no form here")
    value, after = _moved(low, node, x)
    value = low.build.ordered(value, True)
    if any(padding := _pair(padding)):  # with the lowest number, which no maximum is
        n, c, h, w = value.shape
        pads = low.build.constant(np.array([[0, 0], *([p, p] for p in padding), [0, 0]], np.int32))
        if value.grid is None:
            lowest = low.build.constant(np.array(np.finfo(np.float32).min, np.float32))
        else:
            lowest = low.build.constant(np.array(LOW, np.int8), [value.grid[0]], zero=value.grid[1])
        bigger = low.build.value((n, c, h + 2 * padding[0], w + 2 * padding[1]), value.grid, True)
        value = low.build.op("PADV2", [value.index, pads, lowest], bigger)
    output = low.build.value(low.shape(node), value.grid, True)
    options = {"filterHeight": kernel[0], "filterWidth": kernel[1], "strideH": stride[0], "strideW": stride[1]}
    low.build.op("MAX_POOL_2D", [value.index], output, padding=VALID, **options)
    _finish(low, node, output, after)


def _moved(low: Lowering, node: fx.Node, x: Any) -> tuple[Value, Codes | None]:
    """The operand of an operation that picks values: codes, if its result is put on the same grid."""
    after = codes_after(node) if low.is_codes(x) else None
    if after is not None and low.values[x].grid == after.grid:
        return low.values[x], after
    return low.float(x), None


def reshape(low: Lowering, node: fx.Node) -> None:
    value, after = _moved(low, node, node.args[0])
    value = low.build.ordered(value, False)
    output = low.build.value(low.shape(node), value.grid)
    if output.shape.count(-1) > 1:
        raise UserError(f"'{layer_of(node)}': two sizes that depend on the batch have no form in .tflite files")
    shape = low.build.constant(np.array(output.shape, np.int32))
    low.build.op("RESHAPE", [value.index, shape], output, newShape=list(output.shape))
    _finish(low, node, output, after)


def permute(low: Lowering, node: fx.Node) -> None:
    value, after = _moved(low, node, node.args[0])
    value, rank = low.build.ordered(value, False), len(value.shape)
    if node.target is ATEN.transpose.int:
        axes = list(range(rank))
        a, b = node.args[1:3]
        axes[a], axes[b] = axes[b], axes[a]  # pyright: ignore
    else:
        axes = [axis % rank for axis in node.args[1]]  # pyright: ignore
    output = low.build.value(low.shape(node), value.grid)
    low.build.op("TRANSPOSE", [value.index, low.build.constant(np.array(axes, np.int32))], output)
    _finish(low, node, output, after)


def slices(low: Lowering, node: fx.Node) -> None:
    x, axis, start, end, step = _arguments(node, None, 0, None, None, 1)
    value, after = _moved(low, node, x)
    rank, at = len(value.shape), value.axis(axis)
    begins, ends, steps = (np.full(rank, number, np.int32) for number in (0, 0, 1))
    size, unlimited = value.memory[at], 2**31 - 1
    begins[at] = start or 0
    ends[at], steps[at] = unlimited if end is None or end >= unlimited else end, step
    masked = sum(1 << i for i in range(rank) if i != at or ends[i] == unlimited or ends[i] == size)
    output = low.build.value(low.shape(node), value.grid, value.last)
    inputs = [value.index, *map(low.build.constant, (begins, ends, steps))]
    low.build.op("STRIDED_SLICE", inputs, output, beginMask=masked & ~(1 << at), endMask=masked)
    _finish(low, node, output, after)


def pad(low: Lowering, node: fx.Node) -> None:
    """Zeros on both sides; torch names the last axis first."""
    x, amounts, *rest = node.args
    if any(each not in ("constant", None, 0) for each in rest):
        raise UserError(f"'{layer_of(node)}': padding with anything but zeros has no form here")
    value, after = _moved(low, node, x)
    pads = np.zeros((len(value.shape), 2), np.int32)
    for i, (before, behind) in enumerate(zip(amounts[::2], amounts[1::2], strict=True)):  # pyright: ignore
        pads[value.axis(-1 - i)] = before, behind
    output = low.build.value(low.shape(node), value.grid, value.last)
    low.build.op("PAD", [value.index, low.build.constant(pads)], output)
    _finish(low, node, output, after)


def mean(low: Lowering, node: fx.Node) -> None:
    """A mean over axes; a global average pool is one over pixels."""
    pool = node.target is ATEN.adaptive_avg_pool2d.default
    if pool and _pair(node.args[1]) != [1, 1]:
        raise UserError(f"'{layer_of(node)}': adaptive pooling to more than one pixel has no form in .tflite files")
    x, axes, keep = (node.args[0], [2, 3], True) if pool else _arguments(node, None, None, False)[:3]
    after = codes_after(node) if low.is_codes(x) else None
    value = _operand(low, x, after is not None)
    value = low.build.ordered(value, value.last and (keep or sorted(a % 4 for a in axes) == [2, 3]))
    output = low.build.value(low.shape(node), after and after.grid, value.last and keep)
    index = low.build.constant(np.array(sorted(value.axis(axis) for axis in axes), np.int32))
    low.build.op("MEAN", [value.index, index], output, keepDims=keep)
    _finish(low, node, output, after)


def cat(low: Lowering, node: fx.Node) -> None:
    operands, axis = _arguments(node, None, 0)[:2]
    after = codes_after(node) if all(map(low.is_codes, operands)) else None
    if after is not None and any(low.values[x].grid != after.grid for x in operands):
        after = None
    values = _aligned(low, [_operand(low, x, after is not None) for x in operands])
    output = low.build.value(low.shape(node), after and after.grid, values[0].last)
    low.build.op("CONCATENATION", [value.index for value in values], output, axis=values[0].axis(axis))
    _finish(low, node, output, after)


def matmul(low: Lowering, node: fx.Node) -> None:
    after = codes_after(node) if all(map(low.is_codes, node.args[:2])) else None
    values = [low.build.ordered(_operand(low, x, after is not None), False) for x in node.args[:2]]
    output = low.build.value(low.shape(node), after and after.grid)
    low.build.op("BATCH_MATMUL", [value.index for value in values], output)
    _finish(low, node, output, after)


HANDLERS: dict[Any, Handler] = {
    ATEN.conv2d.default: conv2d,
    ATEN.linear.default: linear,
    ATEN.add.Tensor: binary("ADD"),
    ATEN.sub.Tensor: binary("SUB"),
    ATEN.mul.Tensor: binary("MUL"),
    ATEN.div.Tensor: binary("DIV"),
    ATEN.sigmoid.default: unary("LOGISTIC"),
    ATEN.tanh.default: unary("TANH"),
    ATEN.exp.default: unary("EXP"),
    ATEN.rsqrt.default: unary("RSQRT"),
    ATEN.hardswish.default: unary("HARD_SWISH"),
    ATEN.gelu.default: gelu,
    ATEN.silu.default: silu,
    ATEN.softmax.int: softmax,
    ATEN.max_pool2d.default: max_pool2d,
    ATEN.adaptive_avg_pool2d.default: mean,
    ATEN.mean.dim: mean,
    ATEN.slice.Tensor: slices,
    **dict.fromkeys([ATEN.pad.default, ATEN.constant_pad_nd.default], pad),
    ATEN.cat.default: cat,
    ATEN.matmul.default: matmul,
    ATEN.bmm.default: matmul,
    QUANTIZE: quantize,
    **dict.fromkeys(CLIPS, clip),
    **dict.fromkeys([ATEN.flatten.using_ints, ATEN.view.default, ATEN.reshape.default], reshape),
    **dict.fromkeys([ATEN.squeeze.dim, ATEN.unsqueeze.default], reshape),
    **dict.fromkeys([ATEN.permute.default, ATEN.transpose.int], permute),
}
