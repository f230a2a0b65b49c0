"""Costs: what each is, how amounts of it are read and written, and the arithmetic that audit, sweep and search share.

bit operations     MACs x weight bits x input bits, where float counts 32 (a W8A8 MAC has 64)
average bits       of a weight: biases count with their layer
bytes              `qat.measure.storage`
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qat.errors import UserError
from qat.numbers import count, size

FLOAT_BITS = 32
BYTES = {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
TRITS = 5
"""Codes -1, 0 and 1 in a byte: 3^5 = 243."""


@dataclass(frozen=True)
class CostKind:
    """One thing that quantization saves: a search can be limited by it, and points of a sweep compared.

    Attributes:
        name: What configs and reports call it.
        what: What is counted.
        needs: What it is counted in: the model's `shapes`, its packed `integers`, or the exported `file`.
        units: What an amount of it can be written in (in lower case), and how much that is.
        shown: An amount as people read it: `59.9 kB`, `1.24G`, `0.318 ms`, `3.92 bits`.
        whole: Whether there are only whole amounts.
        note: What a search adds to `what`.
    """

    name: str
    what: str
    needs: Literal["shapes", "integers", "file"]
    units: Mapping[str, float]
    shown: Callable[[float], str]
    whole: bool
    note: str = ""

    def amount(self, value: Any) -> float:
        """A limit in bytes, operations, milliseconds or bits, from a number or from text such as `60kB` or `1.5G`.

        Raises:
            UserError: if it is neither, or not above zero.
        """
        match = re.fullmatch(r"\s*([+-]?[0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([a-zA-Z]*)\s*", str(value))
        if isinstance(value, bool) or match is None or match[2].lower() not in self.units:
            accepted = ", ".join(repr(unit) for unit in self.units if unit)
            plain = f", plain or with one of {accepted} behind it" if accepted else ""
            raise UserError(f"{self.name}={value}: must be a number{plain}")
        number = float(match[1]) * self.units[match[2].lower()]
        if number <= 0:
            raise UserError(f"{self.name}={value}: must be above zero")
        return number


COSTS = {
    kind.name: kind
    for kind in (
        CostKind("packed", "bytes of the packed integers", "integers", BYTES, size, True, " (model.safetensors)"),
        CostKind("size", "bytes of the exported file", "file", BYTES, size, True,
                 ", where codes take 2, 4, 8 or 16 bits"),
        CostKind("avg_bits", "bits of a weight, on average", "shapes", {"": 1}, lambda bits: f"{bits:.3g} bits", False),
        CostKind("bops", "bit operations: MACs x weight bits x input bits", "shapes",
                 {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}, lambda number: count(round(number)), True),
        CostKind("latency", "milliseconds of the exported file on this CPU", "file",
                 {"": 1, "ms": 1, "us": 1e-3, "s": 1e3}, lambda time: f"{time:.3g} ms", False),
    )
}  # fmt: skip


def bit_operations(macs: int, weight_bits: int | None, act_bits: int | None) -> int:
    """Bit operations of so many multiply-accumulates; `None` bits are float."""
    return macs * (weight_bits or FLOAT_BITS) * (act_bits or FLOAT_BITS)


def average_bits(sizes: Iterable[tuple[int, int]]) -> float | None:
    """Mean width of (parameters, bits) pairs; `None` if there are none."""
    pairs = list(sizes)
    total = sum(count for count, _ in pairs)
    return sum(count * bits for count, bits in pairs) / total if total else None


def trit_bytes(count: int) -> int:
    """Bytes that `count` codes -1, 0 and 1 fill."""
    return math.ceil(count / TRITS)


def code_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits fill."""
    return math.ceil(count * bits / 8)
