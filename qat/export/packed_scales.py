"""Scales in the bytes that their format has.

    float16       two bytes
    pow2, e8m0    the exponent of a float32, one byte
    e4m3          fp8 numbers, one byte each, times one float32 for the tensor (NVFP4)

What cannot be given back to the last bit, such as a scale that a BatchNorm was folded into, stays float32.
"""

import torch
from torch import Tensor

from qat.grid.formats import FLOATS

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
    stored = _stored(scale, kind)
    return stored if stored is not None and torch.equal(unpack_scale(stored[0], kind, stored[1]), scale) else None


def unpack_scale(packed: Tensor, kind: str, unit: float) -> Tensor:
    """The inverse of `pack_scale`, float32."""
    if kind == "float16":
        return packed.float()
    if kind == "e4m3":
        return E4M3.decode(packed) * torch.tensor(unit, dtype=torch.float32)
    return (packed.to(torch.int32) << 23).view(torch.float32)


def _stored(scale: Tensor, kind: str) -> tuple[Tensor, float] | None:
    """The bytes that scales of this kind have, and their unit, whether it has these or not."""
    if kind == "float16":
        return scale.half(), 1.0
    if kind in ("pow2", "e8m0"):
        return (scale.view(torch.int32) >> 23).to(torch.uint8), 1.0
    if kind != "e4m3" or not scale.numel():
        return None
    # The largest scale is the largest e4m3 number times the unit, which is such a quotient itself (`two_level`): the
    # same division gives it back.
    unit = scale.amax() / E4M3.largest
    return E4M3.encode(E4M3((scale / unit).clamp_max(E4M3.largest))), float(unit)
