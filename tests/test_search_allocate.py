"""The integer program: against brute force, in time, and what it says where there is nothing to find."""

import itertools
import random
import time

import pytest

from qat.errors import UserError
from qat.search.allocate import Cost, Problem, front, smallest, solve
from qat.search.budget import amount
from qat.search.space import Layer


def _problem(layers: int, weights: tuple[int, ...], acts: tuple[int, ...], seed: int, shared: bool = False) -> Problem:
    """A random one; shared: the third layer has the first one's weight, the fourth reads what the second does."""
    rng, options = random.Random(seed), tuple(itertools.product(weights, acts))
    names = [f"l{i}" for i in range(layers)]
    weight = {n: "l0" if shared and n == "l2" else n for n in names}
    act = {n: "l1" if shared and n == "l3" else n for n in names}
    made = [Layer(n, f"{weight[n]}.weight", f"{act[n]}.input", options) for n in names]
    harm, packed, bops = {}, {}, {}
    for name in names:
        sensitivity, count, macs = rng.random(), rng.randrange(100, 50_000), rng.randrange(1000, 10**7)
        for w, a in options:
            harm[name, (w, a)] = sensitivity * (4.0**-w * rng.random() + 4.0**-a * rng.random())
            packed[name, (w, a)] = -(-count * w // 8)
            bops[name, (w, a)] = macs * w * a
    return Problem(made, harm, {"packed": Cost(packed, 1000), "bops": Cost(bops)})


def _allowed(problem: Problem):
    """Every allocation that keeps the ties."""
    for pairs in itertools.product(*(layer.options for layer in problem.layers)):
        choice = {layer.name: pair for layer, pair in zip(problem.layers, pairs, strict=True)}
        grids: dict[str, int] = {}
        agree = all(
            grids.setdefault(grid, bits) == bits
            for layer in problem.layers
            for grid, bits in zip((layer.weight, layer.act), choice[layer.name], strict=True)
        )
        if agree and all(choice[group[0]] == choice[name] for group in problem.tied for name in group):
            yield choice


def _harm(problem: Problem, choice) -> float:
    return Cost(problem.harm).total(choice)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("tied", [(), (("l0", "l4"),)], ids=["free", "a-tied-pair"])
@pytest.mark.parametrize("shared", [False, True], ids=["own-tensors", "shared-tensors"])
def test_the_optimum_is_that_of_brute_force(seed, tied, shared):
    problem = _problem(5, (2, 4, 8), (4, 8), seed, shared)
    problem = Problem(problem.layers, problem.harm, problem.costs, tied)
    least = {name: problem.costs[name].total(smallest(problem, name)) for name in problem.costs}
    every = list(_allowed(problem))
    for name in least:
        assert least[name] == min(problem.costs[name].total(choice) for choice in every)
    budgets = {"packed": least["packed"] * 1.5, "bops": least["bops"] * 2.5}
    within = [c for c in every if all(problem.costs[n].total(c) <= limit for n, limit in budgets.items())]
    found = solve(problem, budgets)
    assert found in within
    assert _harm(problem, found) == pytest.approx(min(_harm(problem, c) for c in within), rel=1e-9)


def test_the_front_is_that_of_brute_force():
    problem = _problem(4, (2, 4, 8), (8,), seed=3)
    cost = problem.costs["packed"]
    points = sorted((cost.total(c), _harm(problem, c)) for c in _allowed(problem))
    best: list[tuple[float, float]] = []
    for point in points:
        if not best or point[1] < best[-1][1]:
            best.append(point)
    found = [(cost.total(c), _harm(problem, c)) for c in front(problem, "packed", {}, None)]
    assert [c for c, _ in found] == [c for c, _ in best]
    assert [h for _, h in found] == pytest.approx([h for _, h in best])
    some = [(cost.total(c), _harm(problem, c)) for c in front(problem, "packed", {}, 4)]
    assert 2 <= len(some) <= 4 and set(some) <= set(found)


def test_fifty_layers_of_six_choices_take_less_than_five_seconds():
    problem = _problem(50, (2, 3, 4, 5, 6, 8), (8,), seed=0)
    least = problem.costs["packed"].total(smallest(problem, "packed"))
    start = time.process_time()
    choice = solve(problem, {"packed": least * 1.8})
    assert time.process_time() - start < 5
    assert problem.costs["packed"].total(choice) <= least * 1.8


def test_a_budget_is_met_to_the_last_byte():
    problem = _problem(12, (2, 3, 4, 5, 6, 8), (4, 8), seed=1)
    cost = problem.costs["packed"]
    for factor in (1, 1.1, 1.37, 2):
        limit = int(cost.total(smallest(problem, "packed")) * factor)
        assert cost.total(solve(problem, {"packed": limit})) <= limit


def test_a_budget_that_cannot_be_met_names_the_smallest_feasible_which_can():
    problem = _problem(5, (2, 4, 8), (4, 8), seed=0)
    with pytest.raises(UserError, match=r"packed=10 B cannot be met: the smallest feasible is (\d+)") as caught:
        solve(problem, {"packed": 10})
    least = int(str(caught.value).rpartition(" is ")[2].partition(" ")[0])
    assert problem.costs["packed"].total(solve(problem, {"packed": least})) == least


def test_of_two_budgets_the_smallest_feasible_keeps_the_other():
    problem = _problem(5, (2, 4, 8), (4, 8), seed=0)
    tight = {name: problem.costs[name].total(smallest(problem, name)) for name in problem.costs}
    opposed = Problem(problem.layers, problem.harm, {**problem.costs, "latency": _opposed(problem)})
    slow = opposed.costs["latency"].total(smallest(opposed, "latency"))
    with pytest.raises(UserError, match=r"latency=.* cannot be met with packed=.*: the smallest feasible is"):
        solve(opposed, {"latency": slow, "packed": tight["packed"]})


def _opposed(problem: Problem) -> Cost:
    """Few bits are slow."""
    return Cost({(name, (w, a)): 1.0 / w for name, (w, a) in problem.harm})


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [("packed", "0.5MB", 5e5), ("size", "60 kB", 6e4), ("size", "1KiB", 1024), ("bops", "1.5G", 1.5e9),
     ("avg_bits", 4, 4), ("latency", "300us", 0.3), ("packed", 60000, 6e4)],
)  # fmt: skip
def test_limits_are_read_with_their_units(name, text, value):
    assert amount(name, text) == pytest.approx(value)


@pytest.mark.parametrize(("name", "text"), [("avg_bits", "4kB"), ("packed", "a lot"), ("bops", "-3"), ("latency", 0)])
def test_other_limits_are_refused(name, text):
    with pytest.raises(UserError, match=f"{name}={text}: must be"):
        amount(name, text)
