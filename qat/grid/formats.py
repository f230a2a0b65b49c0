"""Number formats: which values a code can have, in units of the scale, and how a ratio x / scale is rounded to one.

A *level* is a value in units of the scale, so a grid is {level * scale}. A ratio is clipped to the range, then rounded
to nearest, ties to even: for limits on the grid that is what runtimes do, which round first. The formats:

    int        whole numbers low .. high (low = quant_min - zero_point and so on): two's complement or unsigned, of 1 to
               16 bits
    midrise    odd numbers -(2^b - 1) .. 2^b - 1: b bits without a zero (binary is its one-bit case; stretched-elastic
               2-bit weights use it)
    e4m3, ...  small floating point, by exponent and mantissa bits (OCP 8-bit floating point v1.0 and Microscaling v1.0;
               e4m3 is the "fn" variant without infinity)

Each rounding is a pure function of tensors, so that compiled kernels can take it in. NaN stays NaN.
A code is the level itself for integer formats (what integer runtimes multiply), and the bit pattern for floating point.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

Rounding = Callable[[Tensor], Tensor]
"""A ratio within the range -> its level; in float32 or float64, in the ratio's own memory if that helps."""


round_int: Rounding = Tensor.round_
"""Nearest whole number, ties to even."""


def round_midrise(ratio: Tensor) -> Tensor:
    """Nearest odd number; even numbers, zero among them, go up."""
    # floor(r / 2), but exact for r so small that half of it would be zero.
    return ratio.floor_().div_(2).floor_().mul_(2).add_(1)


@dataclass(frozen=True)
class Float:
    """A floating-point format without infinities (values beyond `largest` saturate), with subnormals.

    Called, it rounds; so equal formats are equal roundings, and copies of a quantizer share its compiled kernels.

    Attributes:
        exponent_bits, mantissa_bits: Field widths; one more bit is the sign.
        largest: Largest finite value.
        bias: Exponent bias; the smallest normal number is 2 ** (1 - bias).
    """

    exponent_bits: int
    mantissa_bits: int
    largest: float
    bias: int

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def smallest(self) -> float:
        """Smallest positive value, a subnormal."""
        return 2.0 ** (1 - self.bias - self.mantissa_bits)

    def __call__(self, ratio: Tensor) -> Tensor:
        """Nearest representable value, ties to even mantissa; `ratio` is at most `largest` in size.

        The distance between neighbours is a power of two that the exponent field of the ratio (in float32) gives;
        dividing by it is exact. A float64 ratio that float32 rounds up to a power of two rounds to that power on either
        spacing.
        """
        exponent = ((ratio.float().view(torch.int32) >> 23) & 0xFF).clamp_min(128 - self.bias)
        spacing = ((exponent - self.mantissa_bits) << 23).view(torch.float32)
        return (ratio / spacing).round() * spacing

    @cached_property
    def magnitudes(self) -> tuple[float, ...]:
        """Every non-negative finite value in order: the index is the bit pattern without the sign."""
        values = []
        for pattern in range(2 ** (self.bits - 1)):
            exponent, mantissa = divmod(pattern, 2**self.mantissa_bits)
            fraction = mantissa / 2**self.mantissa_bits + (exponent > 0)
            values.append(math.ldexp(fraction, max(exponent, 1) - self.bias))
        return tuple(v for v in values if v <= self.largest)

    def encode(self, level: Tensor) -> Tensor:
        """Bit patterns of representable values: uint8, the sign (of zeros too) in the highest of `bits`."""
        index = torch.searchsorted(self._magnitudes(level.device), level.abs().float())
        return (index + level.signbit() * 2 ** (self.bits - 1)).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """Values of the bit patterns that `encode` makes, float32."""
        sign_bit = 2 ** (self.bits - 1)
        magnitude = self._magnitudes(codes.device)[(codes & (sign_bit - 1)).long()]
        return torch.where(codes >= sign_bit, -magnitude, magnitude)

    def _magnitudes(self, device: torch.device) -> Tensor:
        return torch.tensor(self.magnitudes, dtype=torch.float32, device=device)


FLOATS = {
    "e4m3": Float(4, 3, 448.0, 7),
    "e5m2": Float(5, 2, 57344.0, 15),
    "e3m2": Float(3, 2, 28.0, 3),
    "e2m3": Float(2, 3, 7.5, 1),
    "e2m1": Float(2, 1, 6.0, 1),
}
"""fp8 (two), fp6 (two) and fp4: the element formats of OCP Microscaling v1.0."""
