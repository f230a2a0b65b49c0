"""Settings of `qat sensitivity` and `qat search`: `configs/search/*.yaml`, built by its `_target_`."""

from collections.abc import Sequence
from typing import Any, Literal

from qat.errors import UserError, nearest
from qat.measure.cost import COSTS

WIDTHS = range(1, 9)


class Search:
    """The settings, checked.

    Args:
        weight_bits: Widths that weights may get.
        act_bits: Widths that the inputs of layers may get.
        pairs: (weight bits, act bits) that the hardware supports; `None` for every combination of the above.
        least: Pattern (a glob, `@first`, `@last`) -> the least width of the matching layers' weights and inputs.
        tie: Patterns; the layers that one of them matches get the same bits.
        by: Which sensitivity is minimized: `loss` (increase measured, one tensor at a time), `hessian` (HAWQ-V2) or
            `sqnr` (noise to signal).
        samples: Training samples that sensitivities are measured on.
        probes: Random vectors per batch of Hutchinson's estimate; 0 leaves it out.
        repeats: Runs of each exported model that latencies are the medians of.
        budget: Name of a cost -> its limit, `None` for none: `{packed: 60kB, avg_bits: 4}`.
        front: A cost; instead of one budget, all of them between the cheapest and the dearest.
        points: How many budgets of the front, equally far apart; `None` for every one at which the best changes.
        output: The YAML file to write, such as `configs/quant/mine.yaml`; the front writes `mine_1.yaml` and so on.
        dir: Folder of what is measured; `None` for one that the same command finds again.

    Raises:
        UserError: for a value out of its range, an unknown cost, or a limit that cannot be read.
    """

    def __init__(
        self,
        weight_bits: list[int],
        act_bits: list[int],
        pairs: list[list[int]] | None = None,
        least: dict[str, int] | None = None,
        tie: list[str] | None = None,
        by: Literal["loss", "hessian", "sqnr"] = "loss",
        samples: int = 512,
        probes: int = 8,
        repeats: int = 100,
        budget: dict[str, Any] | None = None,
        front: str | None = None,
        points: int | None = 12,
        output: str | None = None,
        dir: str | None = None,
    ) -> None:
        self.pairs = None if pairs is None else _pairs(pairs)
        self.weight_bits = _widths("weight_bits", weight_bits if pairs is None else [w for w, _ in self.pairs or ()])
        self.act_bits = _widths("act_bits", act_bits if pairs is None else [a for _, a in self.pairs or ()])
        self.least = {p: _widths(f"least.{p}", [bits])[0] for p, bits in (least or {}).items()}
        self.tie = list(tie or ())
        for name, value, lowest in (("samples", samples, 1), ("probes", probes, 0), ("repeats", repeats, 1)):
            if value < lowest:
                raise UserError(f"{name}={value}: must be at least {lowest}")
        if points is not None and points < 2:
            raise UserError(f"points={points}: must be at least 2, or null for every point of the front")
        if by == "hessian" and not probes:
            raise UserError("by=hessian needs probes: 1 or more")
        for name in [*(budget or ()), *([front] if front else [])]:
            if name not in COSTS:
                raise UserError(f"'{name}' is no cost{nearest(name, COSTS)} (all: {', '.join(COSTS)})")
        self.by: Literal["loss", "hessian", "sqnr"] = by
        self.samples, self.probes, self.repeats = samples, probes, repeats
        self.budget = {name: COSTS[name].amount(value) for name, value in (budget or {}).items() if value is not None}
        self.front, self.points, self.output, self.dir = front, points, output, dir

    @property
    def costs(self) -> set[str]:
        """The costs that limits or the front are about."""
        return {*self.budget, *([self.front] if self.front else [])}


def _widths(key: str, bits: Sequence[int]) -> list[int]:
    if not bits:
        raise UserError(f"{key}: needs at least one width, such as [2, 4, 8]")
    for width in bits:
        if width not in WIDTHS:
            raise UserError(f"{key}={width}: widths go from {WIDTHS[0]} to {WIDTHS[-1]} bits")
    return sorted(set(bits))


def _pairs(pairs: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    for pair in pairs:
        if len(pair) != 2:
            raise UserError(f"pairs: {list(pair)} is no pair; write [weight bits, act bits], such as [4, 8]")
    if not pairs:
        raise UserError("pairs: needs at least one, such as [[4, 8], [8, 8]], or null for all combinations")
    return [(int(w), int(a)) for w, a in pairs]
