"""How each torch operation is written for LiteRT: element by element here, products and what moves values beside it;
see `qat.export.litert.lower`."""

from typing import Any

import numpy as np
from torch import fx

from qat.errors import UserError
from qat.export.int8_graph import ATEN, CLIPS, QUANTIZE, layer_of, limits_of
from qat.export.litert.handlers import RELU, Handler, aligned, finish, operand
from qat.export.litert.lower import Codes, Lowering, codes_after
from qat.export.litert.moves import cat, max_pool2d, mean, pad, permute, reshape, slices
from qat.export.litert.products import conv2d, linear, matmul


def binary(kind: str) -> Handler:
    def write(low: Lowering, node: fx.Node) -> None:
        if node.kwargs.get("alpha", 1) != 1:
            raise UserError(f"'{layer_of(node)}': alpha={node.kwargs['alpha']} has no form in .tflite files")
        operands = list(node.args[:2])
        after = codes_after(node) if all(map(low.is_codes, operands)) and kind != "DIV" else None
        values = aligned(low, [operand(low, x, after is not None) for x in operands])
        last = any(value.last for value in values)
        output = low.build.value(low.shape(node), after and after.grid, last)
        options = {"fusedActivationFunction": RELU} if after is not None and after.relu else {}
        low.build.op(kind, [value.index for value in values], output, **options)
        finish(low, node, output, after, relu=True)

    return write


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
        low.quantized(x, after)
        return
    value = low.float(x)
    for kind, bound in zip(("MAXIMUM", "MINIMUM"), limits_of(node), strict=True):
        if np.isfinite(bound):
            limit = low.build.constant(np.array(bound, np.float32))
            value = low.build.op(kind, [value.index, limit], low.build.value(value.shape, None, value.last))
    low.values[node] = value


def quantize(low: Lowering, node: fx.Node) -> None:
    """Writes a quantize node that was not fused with the operation before it."""
    x: Any = node.args[0]
    scale, zero, lowest, highest = node.args[1:5]
    low.quantized(x, Codes(node, (scale, zero), lowest, highest))  # pyright: ignore[reportArgumentType]


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
