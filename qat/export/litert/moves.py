"""Operations that move values, or pick and average them, for LiteRT; see `qat.export.litert.lower`."""

import numpy as np
from torch import fx

from qat.errors import UserError
from qat.export.int8_graph import ATEN, layer_of
from qat.export.litert.handlers import VALID, aligned, arguments, finish, moved, operand, pair
from qat.export.litert.lower import LOW, Lowering, codes_after


def max_pool2d(low: Lowering, node: fx.Node) -> None:
    x, kernel, stride, padding, dilation, ceil = arguments(node, None, None, [], 0, 1, False)
    kernel, stride = pair(kernel), pair(stride or kernel)
    if pair(dilation) != [1, 1] or ceil:
        raise UserError(f"'{layer_of(node)}': max pooling with dilation or ceil_mode has no form here")
    value, after = moved(low, node, x)
    value = low.build.ordered(value, True)
    if any(padding := pair(padding)):  # with the lowest number, which no maximum is
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
    finish(low, node, output, after)


def reshape(low: Lowering, node: fx.Node) -> None:
    value, after = moved(low, node, node.args[0])
    value = low.build.ordered(value, False)
    output = low.build.value(low.shape(node), value.grid)
    if output.shape.count(-1) > 1:
        raise UserError(f"'{layer_of(node)}': two sizes that depend on the batch have no form in .tflite files")
    shape = low.build.constant(np.array(output.shape, np.int32))
    low.build.op("RESHAPE", [value.index, shape], output, newShape=list(output.shape))
    finish(low, node, output, after)


def permute(low: Lowering, node: fx.Node) -> None:
    value, after = moved(low, node, node.args[0])
    value, rank = low.build.ordered(value, False), len(value.shape)
    if node.target is ATEN.transpose.int:
        axes = list(range(rank))
        _, a, b = arguments(node, *[None] * 3)
        axes[a], axes[b] = axes[b], axes[a]
    else:
        _, order = arguments(node, None, None)
        axes = [axis % rank for axis in order]
    output = low.build.value(low.shape(node), value.grid)
    low.build.op("TRANSPOSE", [value.index, low.build.constant(np.array(axes, np.int32))], output)
    finish(low, node, output, after)


def slices(low: Lowering, node: fx.Node) -> None:
    x, axis, start, end, step = arguments(node, None, 0, None, None, 1)
    value, after = moved(low, node, x)
    rank, at = len(value.shape), value.axis(axis)
    begins, ends, steps = (np.full(rank, number, np.int32) for number in (0, 0, 1))
    size, unlimited = value.memory[at], 2**31 - 1
    begins[at] = start or 0
    ends[at], steps[at] = unlimited if end is None or end >= unlimited else end, step
    masked = sum(1 << i for i in range(rank) if i != at or ends[i] == unlimited or ends[i] == size)
    output = low.build.value(low.shape(node), value.grid, value.last)
    inputs = [value.index, *map(low.build.constant, (begins, ends, steps))]
    low.build.op("STRIDED_SLICE", inputs, output, beginMask=masked & ~(1 << at), endMask=masked)
    finish(low, node, output, after)


def pad(low: Lowering, node: fx.Node) -> None:
    """Zeros on both sides; torch names the last axis first."""
    x, amounts, *rest = arguments(node, None, None, None, None)
    if any(each not in ("constant", None, 0) for each in rest):
        raise UserError(f"'{layer_of(node)}': padding with anything but zeros has no form here")
    value, after = moved(low, node, x)
    pads = np.zeros((len(value.shape), 2), np.int32)
    for i, (before, behind) in enumerate(zip(amounts[::2], amounts[1::2], strict=True)):
        pads[value.axis(-1 - i)] = before, behind
    output = low.build.value(low.shape(node), value.grid, value.last)
    low.build.op("PAD", [value.index, low.build.constant(pads)], output)
    finish(low, node, output, after)


def mean(low: Lowering, node: fx.Node) -> None:
    """A mean over axes; a global average pool is one over pixels."""
    pool = node.target is ATEN.adaptive_avg_pool2d.default
    if pool and pair(node.args[1]) != [1, 1]:
        raise UserError(f"'{layer_of(node)}': adaptive pooling to more than one pixel has no form in .tflite files")
    x, axes, keep = (node.args[0], [2, 3], True) if pool else arguments(node, None, None, False)[:3]
    after = codes_after(node) if low.is_codes(x) else None
    value = operand(low, x, after is not None)
    value = low.build.ordered(value, value.last and (keep or sorted(a % 4 for a in axes) == [2, 3]))
    output = low.build.value(low.shape(node), after and after.grid, value.last and keep)
    index = low.build.constant(np.array(sorted(value.axis(axis) for axis in axes), np.int32))
    low.build.op("MEAN", [value.index, index], output, keepDims=keep)
    finish(low, node, output, after)


def cat(low: Lowering, node: fx.Node) -> None:
    operands, axis = arguments(node, None, 0)[:2]
    after = codes_after(node) if all(map(low.is_codes, operands)) else None
    if after is not None and any(low.values[x].grid != after.grid for x in operands):
        after = None
    values = aligned(low, [operand(low, x, after is not None) for x in operands])
    output = low.build.value(low.shape(node), after and after.grid, values[0].last)
    low.build.op("CONCATENATION", [value.index for value in values], output, axis=values[0].axis(axis))
    finish(low, node, output, after)
