"""Codes of 2, 4 or 8 bits in bytes, as LiteRT, OpenVINO and MatMulNBits have them: the first in the lowest bits."""

import numpy as np


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Packs integers, of which only the lowest `bits` count.

    Args:
        codes: `[..., N]`.
        bits: 2, 4 or 8.

    Returns:
        uint8 `[..., ceil(N * bits / 8)]`, with zeros at the end where codes do not fill the last byte.
    """
    count = 8 // bits
    fields = codes.astype(np.uint8) & np.uint8(2**bits - 1)
    fields = np.pad(fields, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % count)])
    fields = fields.reshape(*codes.shape[:-1], -1, count) << np.arange(0, 8, bits, dtype=np.uint8)
    return fields.sum(-1, dtype=np.uint8)


def unpack(packed: np.ndarray, bits: int, signed: bool) -> np.ndarray:
    """All codes in bytes `[..., B]`, what fills the last byte among them: int8 or uint8 `[..., B * 8 / bits]`."""
    packed = packed.view(np.int8 if signed else np.uint8)
    unused = 8 - bits  # bits above a code that was shifted to the top
    top = np.left_shift(packed[..., None], unused - np.arange(0, 8, bits, dtype=packed.dtype))
    return (top >> unused).reshape(*packed.shape[:-1], -1)
