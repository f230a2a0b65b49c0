"""The best allocation within budgets, as an integer program for HiGHS (`scipy.optimize.milp`).

One variable x[l, p] in {0, 1} for each layer l and each of its pairs p = (weight bits, input bits):

    minimize    sum harm[l, p] x[l, p]
    such that   sum_p x[l, p] = 1                                  for each layer
                sum cost_k[l, p] x[l, p] <= budget_k - fixed_k     for each budget
                sum_{p: w(p) = b} (x[l, p] - x[m, p]) = 0          for l, m with one weight, each width b; likewise
                                                                   inputs, and pairs of layers that are tied

(HAWQ-V3, Yao et al., arXiv 2011.10680, section 3.4, has the same program with one width per layer.) Harms add up by
assumption: each is measured alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qat.errors import UserError
from qat.measure.cost import COSTS
from qat.search.space import Layer, Pair

SLACK = 1e-12
"""Relative; what two orders of adding the same costs may differ by."""
LOOSE = 1e-6
"""The solver's tolerance, which its budgets are wider by: its rounding must not exclude what fits exactly."""
ATTEMPTS = 100

Table = Mapping[tuple[str, Pair], float]
"""(layer, pair) -> a number that adds up over layers."""
Item = tuple[str, Pair]
"""A column of the program."""


@dataclass(frozen=True)
class Cost:
    """One kind of cost: what the layers add, and what is there whatever they get.

    The total is `(fixed + sum of the layers') / scale`; an average is a sum with a scale.
    """

    table: Table
    fixed: float = 0.0
    scale: float = 1.0

    def total(self, choice: Mapping[str, Pair]) -> float:
        """The cost of an allocation."""
        return (self.fixed + sum(self.table[item] for item in choice.items())) / self.scale


@dataclass(frozen=True)
class Problem:
    """An allocation problem: harm is minimized over one pair for each layer.

    Attributes:
        layers: The layers, each with its pairs.
        harm: The objective.
        costs: Costs that can be limited, by name.
        tied: Groups of layers (names) that get the same pair.
    """

    layers: Sequence[Layer]
    harm: Table
    costs: Mapping[str, Cost]
    tied: Sequence[Sequence[str]] = ()

    def total_harm(self, choice: Mapping[str, Pair]) -> float:
        """The harm of an allocation."""
        return Cost(self.harm).total(choice)


def solve(problem: Problem, budgets: Mapping[str, float]) -> dict[str, Pair]:
    """The allocation of least harm within the budgets; of several, any one.

    Raises:
        UserError: if there is none, with the smallest feasible value of each budget.
    """
    choice = optimum(problem, problem.harm, budgets)
    if choice is None:
        raise UserError(_infeasible(problem, budgets))
    return choice


def smallest(problem: Problem, name: str, budgets: Mapping[str, float] | None = None) -> dict[str, Pair]:
    """The allocation with the least of one cost, within `budgets` for the others.

    Raises:
        UserError: if no allocation keeps the budgets, or the constraints at all (pairs and ties that exclude each
            other).
    """
    choice = optimum(problem, problem.costs[name].table, budgets or {})
    if choice is None and budgets:
        raise UserError(_infeasible(problem, budgets))
    if choice is None:
        raise UserError("the layers' options exclude each other: tied layers have no pair in common")
    return choice


def _infeasible(problem: Problem, budgets: Mapping[str, float]) -> str:
    limits = {name: f"{name}={COSTS[name].shown(limit)}" for name, limit in budgets.items()}
    each = {name: problem.costs[name].total(smallest(problem, name)) for name in budgets}
    for name, least in each.items():
        if least > budgets[name] or len(budgets) == 1:
            return f"{limits[name]} cannot be met: the smallest feasible is {_at_least(name, least)}"
    first, *others = budgets
    rest = {name: budgets[name] for name in others}
    choice = optimum(problem, problem.costs[first].table, rest)
    said = " and ".join(limits[name] for name in others)
    if choice is None:
        return f"no allocation meets {said} together; alone, each can be met"
    least = _at_least(first, problem.costs[first].total(choice))
    return f"{limits[first]} cannot be met with {said}: the smallest feasible is {least}"


def _at_least(name: str, least: float) -> str:
    """With enough digits to be given as the next budget: three may lie below it."""
    if COSTS[name].whole:
        return f"{least:.0f} ({COSTS[name].shown(least)})"
    return next(text for digits in range(6, 18) if float(text := f"{least:.{digits}g}") >= least)


@dataclass(frozen=True)
class _Limit:
    """A budget, counted from where every layer has its cheapest option.

    Attributes:
        excess: What an option costs more than the cheapest of its layer.
        room: What all of these together may come to.
    """

    excess: dict[Item, float]
    room: float

    def over(self, choice: Mapping[str, Pair]) -> float:
        """By how much an allocation exceeds the budget; negative below it."""
        return sum(self.excess[item] for item in choice.items()) - self.room

    def cover(self, choice: Mapping[str, Pair]) -> tuple[set[Item], int]:
        """A cut that an allocation over the budget breaks and none within it does: options of few layers, and how many
        of them an allocation may have. These layers alone, at what they cost here or more, are over the budget.
        """
        over, kept = self.over(choice), list[Item]()
        for item in sorted(choice.items(), key=self.excess.__getitem__):
            if self.excess[item] < over:
                over -= self.excess[item]
            else:
                kept.append(item)
        least = {name: self.excess[name, pair] for name, pair in kept}
        return {i for i, cost in self.excess.items() if cost >= least.get(i[0], np.inf)}, len(kept) - 1


def _limit(problem: Problem, cost: Cost, budget: float) -> _Limit:
    least = {layer.name: min(cost.table[layer.name, pair] for pair in layer.options) for layer in problem.layers}
    items = [(layer.name, pair) for layer in problem.layers for pair in layer.options]
    room = (budget + SLACK * abs(budget)) * cost.scale - cost.fixed - sum(least.values())
    return _Limit({item: cost.table[item] - least[item[0]] for item in items}, room)


def optimum(problem: Problem, objective: Table, budgets: Mapping[str, float]) -> dict[str, Pair] | None:
    """The best allocation that keeps the budgets to the letter, `None` if there is none.

    The solver oversteps a budget within its tolerance, which the choice for a small layer beside large ones may be less
    than. So it is not shown options that are too dear whatever the other layers have, and what it oversteps with is cut
    off: a smaller budget could exclude what is right.
    """
    limits = [_limit(problem, problem.costs[name], budget) for name, budget in budgets.items()]
    cuts: list[tuple[set[Item], int]] = []
    for _ in range(ATTEMPTS):
        choice = _milp(problem, objective, limits, cuts)
        over = [limit for limit in limits if choice is not None and limit.over(choice) > 0]
        if choice is None or not over:
            return choice
        cuts += [limit.cover(choice) for limit in over]
    raise UserError("the solver oversteps the budgets again and again; give them a little room")


def _milp(
    problem: Problem, objective: Table, limits: Sequence[_Limit], cuts: Sequence[tuple[set[Item], int]]
) -> dict[str, Pair] | None:
    from scipy.optimize import Bounds, LinearConstraint, milp

    every = [(layer.name, pair) for layer in problem.layers for pair in layer.options]
    columns = [c for c in every if all(limit.excess[c] <= limit.room for limit in limits)]
    if len({name for name, _ in columns}) < len(problem.layers):
        return None
    goal = np.array([objective[c] for c in columns], dtype=float)
    # The solver stops within 1e-6 of the optimum, in units of the objective.
    goal = goal / (np.abs(goal).max() or 1.0) * 1e4
    equalities, right = _equalities(problem, columns)
    sides: Any = right
    constraints = [LinearConstraint(equalities, sides, sides)]
    for limit in limits:
        row = np.array([limit.excess[c] for c in columns])
        if row.any():
            constraints.append(LinearConstraint(row[None] / limit.room, -np.inf, 1 + LOOSE))
    for items, most in cuts:
        constraints.append(LinearConstraint(np.array([[c in items for c in columns]], dtype=float), -np.inf, most))
    result: Any = milp(
        goal, integrality=np.ones(len(columns)), bounds=Bounds(0, 1), constraints=constraints,
        options={"mip_rel_gap": 0.0},
    )  # fmt: skip
    if result.x is None:
        return None
    return {name: pair for (name, pair), x in zip(columns, result.x, strict=True) if x > 0.5}


def _equalities(problem: Problem, columns: list[tuple[str, Pair]]) -> tuple[Any, NDArray[np.float64]]:
    """Rows of the constraints that hold with equality, sparse, and their right-hand sides."""
    from scipy.sparse import csr_array

    rows: list[dict[int, float]] = []
    right: list[float] = []
    of: dict[str, list[int]] = {}
    for i, (name, _) in enumerate(columns):
        of.setdefault(name, []).append(i)
    for indices in of.values():
        rows.append(dict.fromkeys(indices, 1.0))
        right.append(1.0)
    for first, other, part in _links(problem):
        for value in dict.fromkeys(part(columns[i][1]) for i in of[first]):  # the first's one is the other's one
            row = {i: 1.0 for i in of[first] if part(columns[i][1]) == value}
            row |= {i: -1.0 for i in of[other] if part(columns[i][1]) == value}
            rows.append(row)
            right.append(0.0)
    where = [(r, c) for r, row in enumerate(rows) for c in row]
    values = [v for row in rows for v in row.values()]
    matrix = csr_array((values, tuple(np.array(where).T)), shape=(len(rows), len(columns)))
    return matrix, np.array(right)


def _links(problem: Problem) -> list[tuple[str, str, Callable[[Pair], Any]]]:
    """Layers that must agree, and in what."""
    links: list[tuple[str, str, Callable[[Pair], Any]]] = []
    for part, grid in ((0, "weight"), (1, "act")):
        first: dict[str, str] = {}
        for layer in problem.layers:
            name = getattr(layer, grid)
            if name is not None and first.setdefault(name, layer.name) != layer.name:
                links.append((first[name], layer.name, lambda pair, part=part: pair[part]))
    return links + [(group[0], other, lambda pair: pair) for group in problem.tied for other in group[1:]]
