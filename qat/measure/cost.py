"""Costs of a layer, from counts and widths alone: the arithmetic that audit, sweep and search share.

bit operations     MACs x weight bits x input bits, where float counts 32 (a W8A8 MAC has 64)
average bits       of a weight: biases count with their layer
bytes              `qat.measure.storage`
"""

import math
from collections.abc import Iterable

FLOAT_BITS = 32


def bit_operations(macs: int, weight_bits: int | None, act_bits: int | None) -> int:
    """Bit operations of so many multiply-accumulates; `None` bits are float."""
    return macs * (weight_bits or FLOAT_BITS) * (act_bits or FLOAT_BITS)


def average_bits(sizes: Iterable[tuple[int, int]]) -> float | None:
    """Mean width of (parameters, bits) pairs; `None` if there are none."""
    pairs = list(sizes)
    total = sum(count for count, _ in pairs)
    return sum(count * bits for count, bits in pairs) / total if total else None


def trit_bytes(count: int) -> int:
    """Bytes that `count` codes -1, 0 and 1 fill, five in each: 3^5 = 243."""
    return math.ceil(count / 5)


def code_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits fill."""
    return math.ceil(count * bits / 8)
