"""Products of integer codes by oneDNN's int8 kernels, which torch brings along for its own quantized programs.

Inputs are uint8, which its convolutions ask for whatever the sign of a grid, and weights int8. A level is a code in
units of its scale: `x_code + low` of an input, the code itself of a weight.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

Geometry = tuple[list[int], list[int], list[int], int] | tuple[()]
"""Stride, padding, dilation and groups of a 2-d convolution; nothing of a linear map."""

_ops: Any = torch.ops.onednn


def pack(geometry: Geometry, weight: Tensor, low: Tensor, shape: torch.Size) -> Tensor:
    """A weight in the order that the kernel for inputs of `shape` wants."""
    if not geometry:
        return _ops.qlinear_prepack.default(weight, [shape[:-1].numel(), shape[-1]])
    # It would look at each of the scales, in vain.
    return _ops.qconv_prepack.default(weight, _constant(1, torch.float32, 1), 1.0, int(-low), *geometry, list(shape))


def multiply(
    geometry: Geometry,
    x: Tensor,
    x_scale: Tensor,
    low: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    channels_last: bool = False,
) -> Tensor:
    """`F.linear` or `F.conv2d` of codes.

    Args:
        geometry: Which of them.
        x: uint8 `[..., in]` or `[N, C, H, W]`.
        x_scale, low: float32 `(1,)`: the scale, and the level that code 0 stands for.
        packed: From `pack`.
        scale: Scale of the weight, float32 `(1,)` or one per output channel.
        bias: float32, one per output channel.
        channels_last: Whether a convolution's result is to lie in that order.

    Returns:
        float32.
    """
    zero_point, zeros = -low.int(), _constant(len(scale), torch.int32, 0)
    how = 1.0, 0, torch.float32, "none", [], ""
    if not geometry:
        rows = x.reshape(-1, x.shape[-1])
        y = _ops.qlinear_pointwise.tensor(rows, x_scale, zero_point, packed, scale, zeros, bias, *how)
        return y.view(*x.shape[:-1], y.shape[-1])
    x = x.contiguous(memory_format=torch.channels_last)
    y = _ops.qconv2d_pointwise.tensor(x, x_scale, zero_point, packed, scale, zeros, bias, *geometry, *how)
    return y if channels_last else y.contiguous()


@cache
def _constant(count: int, dtype: torch.dtype, value: int) -> Tensor:
    with torch.inference_mode(False):
        return torch.full((count,), value, dtype=dtype)


@cache
def _exact() -> bool:
    if not (torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()):
        return False
    x, weight = torch.full((16, 64), 255, dtype=torch.uint8), torch.full((16, 64), 127, dtype=torch.int8)
    one, zero = torch.ones(1), torch.zeros(1)
    return bool((multiply((), x, one, zero, pack((), weight, zero, x.shape), one, None) == 255 * 127 * 64).all())


def exact() -> bool:
    """Whether this processor adds products of uint8 and int8 in 32 bits. Without VNNI, x86 adds pairs of them in 16,
    which the largest codes overflow.
    """
    return _exact()


# As torch.compiler.assume_constant_result has it, but without importing the compiler for that, which takes seconds.
exact._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


# -- for compilers, which see one operation ----------------------------------------------------------------------------


@torch.library.custom_op("qat::linear", mutates_args=())
def linear(x: Tensor, x_scale: Tensor, low: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """`multiply` by a weight that is packed just for this once."""
    return multiply((), x, x_scale, low, pack((), weight, low, x.shape), scale, bias)


@linear.register_fake
def _(x: Tensor, x_scale: Tensor, low: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0], dtype=torch.float32)


@torch.library.custom_op("qat::conv2d", mutates_args=())
def conv2d(
    x: Tensor, x_scale: Tensor, low: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int], groups: int, channels_last: bool,
) -> Tensor:  # fmt: skip
    """`multiply` by a weight that is packed just for this once."""
    geometry = stride, padding, dilation, groups
    return multiply(geometry, x, x_scale, low, pack(geometry, weight, low, x.shape), scale, bias, channels_last)


@conv2d.register_fake
def _(
    x: Tensor, x_scale: Tensor, low: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int], groups: int, channels_last: bool,
) -> Tensor:  # fmt: skip
    sizes = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    size = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes]
    y = x.new_empty(x.shape[0], weight.shape[0], *size, dtype=torch.float32)
    return y.contiguous(memory_format=torch.channels_last) if channels_last else y
