"""Pareto-optimal allocations for harm and one cost (`qat search front=...`)."""

from collections.abc import Mapping

import numpy as np

from qat.search.allocate import SLACK, Cost, Problem, optimum, smallest, solve
from qat.search.space import Pair


def pareto_choices(
    problem: Problem, name: str, budgets: Mapping[str, float], points: int | None
) -> list[dict[str, Pair]]:
    """Pareto-optimal allocations for harm and one cost, from the cheapest to the dearest.

    Args:
        problem: The problem.
        name: The cost.
        budgets: Limits of this cost and of others.
        points: How many budgets between the extremes are tried, equally far apart; `None` walks down from the dearest
            through every point there is.
    """
    cost, others = problem.costs[name], {k: v for k, v in budgets.items() if k != name}
    low = cost.total(smallest(problem, name, others))
    high = cost.total(_cheapest_best(problem, name, budgets))
    found: list[dict[str, Pair]] = []
    if points is not None:
        for limit in np.linspace(low, max(low, high), points):
            found.append(_cheapest_best(problem, name, {**others, name: float(limit)}))
    else:
        limit = max(low, high)
        while limit >= low:
            found.append(_cheapest_best(problem, name, {**others, name: limit}))
            limit = float(np.nextafter(cost.total(found[-1]) * (1 - 2 * SLACK), -np.inf))
        found.reverse()
    unique = {tuple(choice.items()): choice for choice in found}
    return _undominated(problem, cost, list(unique.values()))


def _cheapest_best(problem: Problem, name: str, budgets: Mapping[str, float]) -> dict[str, Pair]:
    """The allocation that costs least, of those with the least harm within the budgets."""
    best = solve(problem, budgets)
    harm = Cost(problem.harm)
    within = Problem(problem.layers, problem.harm, {**problem.costs, "": harm}, problem.tied)
    cheaper = optimum(within, problem.costs[name].table, {**budgets, "": harm.total(best)})
    if cheaper is None:
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
