"""Objectives: what points are compared by, and which of them nobody beats.

Every objective needs its direction said: a front with one axis upside down looks as good as a right one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from qat.errors import UserError, nearest
from qat.measure.cost import COSTS

OBJECTIVES = {
    "metric": "the metric of the exported file",
    **{name: COSTS[name].what for name in ("size", "packed", "bops", "latency", "avg_bits")},
}
"""What each of them is."""


def check(objectives: Mapping[str, Any], metric: str, mode: str, exports: bool = True) -> dict[str, str]:
    """Checks names and directions.

    Args:
        objectives: Name -> `max` or `min`.
        metric: Name of the metric, for messages.
        mode: What the config says of the metric.
        exports: Whether the points export a file.

    Raises:
        UserError: for an unknown objective (with those there are), or a missing or contradictory direction.
    """
    if not objectives:
        raise UserError("sweep.objectives: say what to optimize, such as {metric: max, size: min}")
    for name, direction in objectives.items():
        key = f"sweep.objectives.{name}"
        if name not in OBJECTIVES:
            raise UserError(
                f"{key}: there is no such objective{nearest(name, OBJECTIVES)} (all: {', '.join(OBJECTIVES)})"
            )
        if direction not in ("max", "min"):
            raise UserError(f"{key}={direction}: needs a direction, max or min")
        if name in COSTS and COSTS[name].needs == "file" and not exports:
            raise UserError(f"{key}: with export=none there is no file to measure; packed and bops need none")
        if name == "metric" and direction != mode:
            raise UserError(f"{key}={direction} contradicts mode={mode}, which says what is better for metric={metric}")
    return dict(objectives)


def dominates(a: Sequence[float], b: Sequence[float], directions: Sequence[str]) -> bool:
    """Whether `a` is nowhere worse than `b` and somewhere better."""
    signs = [1 if direction == "max" else -1 for direction in directions]
    gains = [sign * (x - y) for sign, x, y in zip(signs, a, b, strict=True)]
    return min(gains) >= 0 and max(gains) > 0


def undominated(values: Sequence[Sequence[float]], directions: Sequence[str]) -> list[int]:
    """Indices of the points that no other dominates."""
    return [i for i, b in enumerate(values) if not any(dominates(a, b, directions) for a in values)]
