"""Scales in the bytes that their format has.

    float16       two bytes
    pow2, e8m0    the exponent of a float32, one byte
    e4m3          fp8 numbers, one byte each, times one float32 for the tensor (NVFP4)

What cannot be given back to the last bit, such as a scale that a BatchNorm was folded into, stays float32.
"""

import torch
from torch import Tensor

from qat.formats import FLOATS

E4M3 = FLOATS["e4m3"]


def pack_scale(scale: Tensor, kind: str) -> tuple[Tensor, float] | None:
    """The bytes of scales.

    Args:
        scale: float32.
        kind: One of `QuantSpec.scale`.

    Returns:
        The bytes, in the shape of `scale` (for `float16`, float16), and what all of them are times; `None` if `kind`
        has not these scales exactly.
    """
    for packed, unit in _candidates(scale, kind):
        if torch.equal(unpack_scale(packed, kind, unit), scale):
            return packed, unit
    return None


def unpack_scale(packed: Tensor, kind: str, unit: float) -> Tensor:
    """The inverse of `pack_scale`, float32."""
    if kind == "float16":
        return packed.float()
    if kind == "e4m3":
        return E4M3.decode(packed) * torch.tensor(unit, dtype=torch.float32)
    return (packed.to(torch.int32) << 23).view(torch.float32)


def _candidates(scale: Tensor, kind: str) -> list[tuple[Tensor, float]]:
    if kind == "float16":
        return [(scale.half(), 1.0)]
    if kind in ("pow2", "e8m0"):
        return [((scale.view(torch.int32) >> 23).to(torch.uint8), 1.0)]
    if kind != "e4m3" or not scale.numel():
        return []
    # The largest scale is the largest e4m3 number times the unit, rounded: the unit is the quotient or a neighbour.
    unit = scale.amax() / E4M3.largest
    units = [unit, *(torch.nextafter(unit, torch.tensor(to)) for to in (0.0, torch.inf))]
    return [(E4M3.encode(E4M3((scale / u).clamp_max(E4M3.largest))), float(u)) for u in units]
