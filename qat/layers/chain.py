"""Grids that a tensor passes in turn: a finer one that it shares with other readers, then the reader's own."""

from typing import Any

from torch import nn


def chain(grids: list[Any]) -> nn.Module | None:
    """The grids as one module: `None` for none, and one stays itself."""
    return nn.Sequential(*grids) if len(grids) > 1 else next(iter(grids), None)


def in_turn(grids: nn.Module | None) -> list[Any]:
    """What `chain` was made of."""
    if grids is None:
        return []
    return list(grids) if isinstance(grids, nn.Sequential) else [grids]


def last_grid(grids: nn.Module | None) -> Any:
    """The reader's own; `None` if it reads through none."""
    return grids[-1] if isinstance(grids, nn.Sequential) else grids
