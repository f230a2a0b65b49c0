"""Convolutions, linear layers and matrix products for LiteRT; see `qat.export.litert.lower`."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import fx

from qat.errors import UserError
from qat.export.int8_graph import layer_of
from qat.export.litert.builder import Value
from qat.export.litert.handlers import RELU, SAME, VALID, arguments, finish, operand, pair
from qat.export.litert.lower import Codes, Lowering, codes_after


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


def conv2d(low: Lowering, node: fx.Node) -> None:
    x, _, _, stride, padding, dilation, groups = arguments(node, *[None] * 3, 1, 0, 1, 1)
    if isinstance(padding, str):
        raise UserError(f"'{layer_of(node)}': padding={padding!r} has no form in .tflite files; write the numbers")
    (stride, padding, dilation), integer = map(pair, (stride, padding, dilation)), _weighted(low, node) is not None
    value = low.build.ordered(operand(low, x, integer), True)
    weight: Any = node.args[1]
    size = weight.meta["val"].shape[2:]
    # With other strides SAME would put the odd pixel on the other side than torch does.
    same = stride == [1, 1] and all(2 * p == d * (k - 1) for p, d, k in zip(padding, dilation, size, strict=True))
    if any(padding) and not same:
        amounts = np.array([[0, 0], *([p, p] for p in padding), [0, 0]], np.int32)
        n, c, h, w = value.shape
        bigger = low.build.value((n, c, h + 2 * padding[0], w + 2 * padding[1]), value.grid, True)
        value = low.build.op("PAD", [value.index, low.build.constant(amounts)], bigger)
    channels, outputs = value.shape[1], node.meta["val"].shape[1]
    options = {"padding": SAME if same else VALID, "strideH": stride[0], "strideW": stride[1]}
    options |= {"dilationHFactor": dilation[0], "dilationWFactor": dilation[1]}
    if groups == channels and groups > 1:
        options["depthMultiplier"] = outputs // channels
        _product(low, node, "DEPTHWISE_CONV_2D", value, (1, 2, 3, 0), True, **options)
    else:
        _product(low, node, "CONV_2D", value, (0, 2, 3, 1), True, **options)


def linear(low: Lowering, node: fx.Node) -> None:
    value = low.build.ordered(operand(low, node.args[0], _weighted(low, node) is not None), False)
    options = {"keepNumDims": len(value.shape) > 2}
    _product(low, node, "FULLY_CONNECTED", value, (0, 1), False, **options)


def matmul(low: Lowering, node: fx.Node) -> None:
    after = codes_after(node) if all(map(low.is_codes, node.args[:2])) else None
    values = [low.build.ordered(operand(low, x, after is not None), False) for x in node.args[:2]]
    output = low.build.value(low.shape(node), after and after.grid)
    low.build.op("BATCH_MATMUL", [value.index for value in values], output)
    finish(low, node, output, after)
