"""Scale formats: hardware stores scales in fewer bits than float32, and training has to use the ones it will have.

    float32    at least `TINY`
    float16    2 ** -24 .. 65504
    pow2       2 ** -26 .. 2 ** 127
    e8m0       2 ** -126 .. 2 ** 127. The format has 2 ** -127 too, a subnormal float32 that hardware may flush to zero;
               blocks so small that they would need it use 2 ** -126
    e4m3       fp8 numbers times one float32 scale per tensor

All arithmetic is float32, whatever the tensor's own type: fp16 cannot hold most of these scales, and a division in
bfloat16 gives other codes.
"""

from typing import Any

import torch
from torch import Tensor

from qat.grid.formats import FLOATS
from qat.grid.functional import SCALE_FLOOR, TINY, over, positive
from qat.grid.spec import QuantSpec

HUGE = 2.0**127
HALF_FLOOR = 2.0**-24
POW2_FLOOR = 2.0**-26
"""The smallest power-of-two scale: integer engines multiply two scales and have to hold the product."""


def binade(x: Tensor) -> Tensor:
    """The largest power of two that is not above `x`, float32, from 2 ** -126 to 2 ** 127: `x` without its mantissa."""
    return (x.float().clamp(TINY, HUGE).view(torch.int32) & 0x7F800000).view(torch.float32)


def power_of_two(scale: Tensor) -> Tensor:
    """The nearest power of two (by ratio), at least `POW2_FLOOR`."""
    return binade(scale.float() * 2**0.5).clamp_min(POW2_FLOOR)


def half(scale: Tensor) -> Tensor:
    """The nearest float16, at least its smallest subnormal."""
    return scale.float().clamp(HALF_FLOOR, 65504.0).half().float()


def microscaling(scale: Tensor) -> Tensor:
    """The block scale of OCP Microscaling v1.0, section 6.3: 2 ** (floor(log2 largest magnitude) - emax).

    `emax` is the exponent of the element format's largest value, so that the block's largest magnitude lies in the
    format's top binade, where a little of it saturates. The specification's int8 has elements code / 64 and emax 0;
    here elements are codes and emax is 6, which is the same grid.

    Args:
        scale: The largest magnitude divided by 2 ** emax (exactly: see `qat.grid.ranges.scale_and_zero_point`).
    """
    return binade(scale)


def two_level(scale: Tensor, tensor_scale: Tensor | None = None) -> Tensor:
    """NVFP4's block scales: e4m3 multiples of one float32 scale per tensor, the largest being e4m3's largest value.

    With `scale` the largest magnitude of each block over 6, that tensor scale is the tensor's largest magnitude over
    6 * 448. A block scale is at least e4m3's smallest subnormal, so no block loses its scale.

    Args:
        scale: Scale of each block.
        tensor_scale: Scale of the tensor, should it be another than that; what is larger saturates.
    """
    e4m3 = FLOATS["e4m3"]
    if tensor_scale is None:
        tensor_scale = over(scale.float().amax(), e4m3.largest).clamp_min(TINY / e4m3.smallest)
    scale = scale.float()
    low, high = (scale.new_full((1,), v) for v in (e4m3.smallest, e4m3.largest))
    return e4m3((scale / tensor_scale).clamp(low, high)) * tensor_scale


def snap(scale: Tensor, spec: QuantSpec) -> Tensor:
    """The scales that `spec.scale` can store, nearest to `scale` (for `e8m0` by its own rule); always above zero."""
    match spec.scale:
        case "float16":
            return half(scale)
        case "pow2":
            return power_of_two(scale)
        case "e8m0":
            return microscaling(scale)
        case "e4m3":
            return two_level(scale)
    return positive(scale)


def floor(spec: QuantSpec) -> float:
    """The scale at which one that shrinks has collapsed: the smallest of its format, of float32 that of calibration."""
    return {"float32": SCALE_FLOOR, "float16": HALF_FLOOR, "pow2": POW2_FLOOR}.get(spec.scale, TINY)


def acting(scale: Tensor, spec: QuantSpec) -> Tensor:
    """A learned scale as it is stored: in the format of `spec`, with a straight-through gradient: float32.
    Kernels keep float32 scales above zero.
    """
    scale = scale.float()  # of a float64 model, too
    if spec.scale == "float32":
        return scale
    if not scale.requires_grad:
        return snap(scale, spec)
    return SnapSTE.apply(scale, spec)  # pyright: ignore[reportReturnType]


class SnapSTE(torch.autograd.Function):
    """`snap` for learned scales; the gradient passes as if it were not there."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor, spec: QuantSpec) -> Tensor:
        return snap(scale, spec)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
