"""Budgets: what a search can be limited by, and how limits are read and written."""

import re
from typing import Any

from qat.errors import UserError

BUDGETS = {
    "packed": "bytes of the packed integers (model.safetensors)",
    "size": "bytes of the exported file, where codes take 2, 4, 8 or 16 bits",
    "avg_bits": "bits of a weight, on average",
    "bops": "bit operations: MACs x weight bits x input bits",
    "latency": "milliseconds of the exported file on this CPU",
}
UNITS = {
    "packed": {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30},
    "bops": {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12},
    "latency": {"": 1, "ms": 1, "us": 1e-3, "s": 1e3},
    "avg_bits": {"": 1},
}
UNITS["size"] = UNITS["packed"]


def amount(name: str, value: Any) -> float:
    """A limit in bytes, operations, milliseconds or bits, from a number or from text such as `60kB` or `1.5G`.

    Raises:
        UserError: if it is neither, or not above zero.
    """
    units = UNITS[name]
    match = re.fullmatch(r"\s*([+-]?[0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([a-zA-Z]*)\s*", str(value))
    if isinstance(value, bool) or match is None or match[2].lower() not in units:
        accepted = ", ".join(repr(unit) for unit in units if unit)
        raise UserError(f"{name}={value}: must be a number{f' and one of {accepted}' if accepted else ''}")
    number = float(match[1]) * units[match[2].lower()]
    if number <= 0:
        raise UserError(f"{name}={value}: must be above zero")
    return number


def shown(name: str, value: float) -> str:
    """A cost as people read it: `59.9 kB`, `1.24G`, `0.318 ms`, `3.92 bits`."""
    from qat.report.format import count, size

    if name in ("packed", "size"):
        return size(value)
    if name == "bops":
        return count(round(value))
    return f"{value:.3g} ms" if name == "latency" else f"{value:.3g} bits"
