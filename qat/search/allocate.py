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
from qat.search.budget import shown
from qat.search.space import Layer, Pair

SLACK = 1e-9
"""Relative; what two orders of adding the same costs may differ by."""
TIGHTER = 2e-6
"""Twice the solver's own tolerance, by which it may overstep a budget."""
ATTEMPTS = 20

Table = Mapping[tuple[str, Pair], float]
"""(layer, pair) -> a number that adds up over layers."""


@dataclass(frozen=True)
class Cost:
    """One kind of cost: what the layers add, and what is there whatever they get.

    The total is `(fixed + sum of the layers') / scale`; an average is a sum with a scale.
    """

    table: Table
    fixed: float = 0.0
    scale: float = 1.0

    def total(self, choice: Mapping[str, Pair]) -> float:
        """Of an allocation."""
        return (self.fixed + sum(self.table[item] for item in choice.items())) / self.scale


@dataclass(frozen=True)
class Problem:
    """What is minimized over what.

    Attributes:
        layers: Each with its pairs.
        harm: The objective.
        costs: What can be limited, by name.
        tied: Groups of layers (names) that get the same pair.
    """

    layers: Sequence[Layer]
    harm: Table
    costs: Mapping[str, Cost]
    tied: Sequence[Sequence[str]] = ()

    def total_harm(self, choice: Mapping[str, Pair]) -> float:
        """Of an allocation."""
        return Cost(self.harm).total(choice)


def solve(problem: Problem, budgets: Mapping[str, float]) -> dict[str, Pair]:
    """The allocation of least harm within the budgets; of several, any one.

    Raises:
        UserError: if there is none, with the smallest feasible value of each budget.
    """
    scaled = {name: float(limit) for name, limit in budgets.items()}
    for _ in range(ATTEMPTS):
        choice = _milp(problem, problem.harm, scaled)
        if choice is None:
            raise UserError(_infeasible(problem, budgets))
        over = [name for name in budgets if problem.costs[name].total(choice) > budgets[name] * (1 + SLACK)]
        if not over:
            return choice
        for name in over:
            scaled[name] *= 1 - TIGHTER
    raise UserError("the solver oversteps the budgets again and again; give them a little room")


def smallest(problem: Problem, name: str, budgets: Mapping[str, float] | None = None) -> dict[str, Pair]:
    """The allocation with the least of one cost, within `budgets` for the others.

    Raises:
        UserError: if no allocation keeps the constraints at all (pairs and ties that exclude each other).
    """
    choice = _milp(problem, problem.costs[name].table, budgets or {})
    if choice is None:
        raise UserError("the layers' options exclude each other: tied layers have no pair in common")
    return choice


def _infeasible(problem: Problem, budgets: Mapping[str, float]) -> str:
    each = {name: problem.costs[name].total(smallest(problem, name)) for name in budgets}
    for name, least in each.items():
        if least > budgets[name]:
            return (
                f"{name}={shown(name, budgets[name])} cannot be met: the smallest feasible is {_at_least(name, least)}"
            )
    first, *others = budgets
    rest = {name: budgets[name] for name in others}
    choice = _milp(problem, problem.costs[first].table, rest)
    said = " and ".join(f"{name}={shown(name, budgets[name])}" for name in others)
    if choice is None:
        return f"no allocation meets {said} together; alone, each can be met"
    least = _at_least(first, problem.costs[first].total(choice))
    return f"{first}={shown(first, budgets[first])} cannot be met with {said}: the smallest feasible is {least}"


def _at_least(name: str, least: float) -> str:
    """To the last digit, so that it can be given as the next budget: three digits may lie below it."""
    return f"{least:.0f} ({shown(name, least)})" if name in ("packed", "size", "bops") else f"{least:.6g}"


def _milp(problem: Problem, objective: Table, budgets: Mapping[str, float]) -> dict[str, Pair] | None:
    from scipy.optimize import Bounds, LinearConstraint, milp

    columns = [(layer.name, pair) for layer in problem.layers for pair in layer.options]
    goal = np.array([objective[c] for c in columns], dtype=float)
    # The solver stops within 1e-6 of the optimum, in units of the objective.
    goal = goal / (np.abs(goal).max() or 1.0) * 1e4
    equalities, right = _equalities(problem, columns)
    sides: Any = right
    constraints = [LinearConstraint(equalities, sides, sides)]
    for name, limit in budgets.items():
        cost = problem.costs[name]
        row, room = np.array([cost.table[c] for c in columns], dtype=float), limit * cost.scale - cost.fixed
        unit = max(abs(room), np.abs(row).max()) or 1.0
        constraints.append(LinearConstraint(row[None] / unit, -np.inf, room * (1 + SLACK) / unit))
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
        for value in dict.fromkeys(part(columns[i][1]) for i in of[first] + of[other]):
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


def front(problem: Problem, name: str, budgets: Mapping[str, float], points: int | None) -> list[dict[str, Pair]]:
    """Pareto-optimal allocations for harm and one cost, from the cheapest to the dearest.

    Args:
        problem: The problem.
        name: The cost.
        budgets: Limits of other costs.
        points: How many budgets between the extremes are tried, equally far apart; `None` walks down from the dearest
            through every point there is.
    """
    cost, others = problem.costs[name], {k: v for k, v in budgets.items() if k != name}
    low = cost.total(smallest(problem, name, others))
    high = min(budgets.get(name, np.inf), cost.total(_cheapest_best(problem, name, others)))
    found: list[dict[str, Pair]] = []
    if points is not None:
        for limit in np.linspace(low, max(low, high), points):
            found.append(_cheapest_best(problem, name, {**others, name: float(limit)}))
    else:
        limit = max(low, high)
        while limit >= low:
            found.append(_cheapest_best(problem, name, {**others, name: limit}))
            limit = cost.total(found[-1]) * (1 - 4 * TIGHTER)
        found.reverse()
    unique = {tuple(choice.items()): choice for choice in found}
    return _undominated(problem, cost, list(unique.values()))


def _cheapest_best(problem: Problem, name: str, budgets: Mapping[str, float]) -> dict[str, Pair]:
    """Of the allocations of least harm within the budgets, the one that costs least."""
    best = solve(problem, budgets)
    harm = Cost(problem.harm)
    within = Problem(problem.layers, problem.harm, {**problem.costs, "": harm}, problem.tied)
    cheaper = _milp(within, problem.costs[name].table, {**budgets, "": harm.total(best)})
    if cheaper is None or harm.total(cheaper) > harm.total(best) * (1 + SLACK):
        return best
    return cheaper if problem.costs[name].total(cheaper) < problem.costs[name].total(best) else best


def _undominated(problem: Problem, cost: Cost, choices: list[dict[str, Pair]]) -> list[dict[str, Pair]]:
    """Without those that cost more than a cheaper one and do no less harm."""
    kept: list[dict[str, Pair]] = []
    least, harm = np.inf, Cost(problem.harm)
    for choice in sorted(choices, key=lambda c: (cost.total(c), harm.total(c))):
        if harm.total(choice) < least:
            kept.append(choice)
            least = harm.total(choice)
    return kept
