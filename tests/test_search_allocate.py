"""The integer program: against brute force, in time, and what it says where there is nothing to find."""

import itertools
import random
import time

import pytest

from qat.errors import UserError
from qat.measure.cost import COSTS
from qat.search.allocate import Cost, Problem, _Limit, smallest, solve
from qat.search.front import _undominated, pareto_choices
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


def _uneven(seed: int) -> Problem:
    """Of layers that cost from 1 to 1e10, some of which share tensors or are tied."""
    rng, options = random.Random(seed), tuple(itertools.product((2, 4, 8), (4, 8)))
    names = [f"l{i}" for i in range(rng.randint(1, 4))]
    own = lambda name, part: f"{name if rng.random() < 0.7 else 'l0'}.{part}"  # noqa: E731
    layers = [Layer(n, own(n, "weight"), own(n, "input"), options) for n in names]
    harm = {(n, p): rng.choice([rng.random(), 10 ** rng.uniform(-6, 0), -1e-3]) for n in names for p in options}
    bops = {item: float(rng.randint(1, 10 ** rng.choice([1, 6, 10]))) for item in harm}
    bits = {(n, (w, a)): 100.0 * w for n, (w, a) in harm}
    costs = {"bops": Cost(bops, rng.choice([0, 1e9])), "avg_bits": Cost(bits, 0, 100 * len(names))}
    return Problem(layers, harm, costs, [names[:2]] if rng.random() < 0.3 else ())


@pytest.mark.parametrize("seed", range(25))
def test_budgets_that_just_fit_are_met_however_uneven_the_layers_are(seed):
    problem, rng = _uneven(seed), random.Random(seed)
    every = list(_allowed(problem))
    totals = {name: sorted(cost.total(c) for c in every) for name, cost in problem.costs.items()}
    for budgets in (
        {"bops": totals["bops"][0]},
        {"bops": rng.choice(totals["bops"]), "avg_bits": totals["avg_bits"][-1]},
        {"bops": totals["bops"][-1], "avg_bits": rng.choice(totals["avg_bits"])},
    ):
        within = [c for c in every if all(problem.costs[n].total(c) <= limit for n, limit in budgets.items())]
        found = solve(problem, budgets)
        assert found in within
        assert _harm(problem, found) == pytest.approx(min(_harm(problem, c) for c in within), rel=1e-6, abs=1e-9)
    with pytest.raises(UserError, match=r"^bops=.* cannot be met: the smallest feasible is"):
        solve(problem, {"bops": totals["bops"][0] * (1 - 1e-11)})


def test_the_smallest_budget_is_met_beside_a_head_of_two_classes():
    macs = [115605504, *(348585984, 116195328, 464781312, 464781312) * 12, 768 * 2]  # ViT-B
    options, rng = tuple(itertools.product((2, 4, 8), (2, 4, 8))), random.Random(0)
    layers = [Layer(f"l{i}", f"l{i}.weight", f"l{i}.input", options) for i in range(len(macs))]
    harm = {(la.name, (w, a)): rng.random() * 4.0**-w + rng.random() * 4.0**-a for la in layers for w, a in options}
    bops = {(la.name, (w, a)): float(m * w * a) for la, m in zip(layers, macs, strict=True) for w, a in options}
    problem = Problem(layers, harm, {"bops": Cost(bops, 4.5e9)})
    least = problem.costs["bops"].total(smallest(problem, "bops"))
    assert set(solve(problem, {"bops": least}).values()) == {(2, 2)}


def _best(problem: Problem, name: str) -> list[tuple[float, float]]:
    """The front by brute force, as (cost, harm)."""
    best: list[tuple[float, float]] = []
    for point in sorted((problem.costs[name].total(c), _harm(problem, c)) for c in _allowed(problem)):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


def test_a_front_has_points_that_are_a_byte_apart_in_a_file_of_megabytes():
    options = ((2, None), (4, None), (8, None))
    layers = [Layer("body", "body.weight", None, options), Layer("head", "head.weight", None, options)]
    harm = {("body", p): 4.0 ** -p[0] for p in options} | {("head", p): 1e-2 * 4.0 ** -p[0] for p in options}
    packed = {("body", p): 1e6 * p[0] for p in options} | {("head", p): p[0] // 2 for p in options}
    problem = Problem(layers, harm, {"packed": Cost(packed)})
    found = [problem.costs["packed"].total(c) for c in pareto_choices(problem, "packed", {}, None)]
    assert found == [cost for cost, _ in _best(problem, "packed")] and len(found) == 9


def test_the_front_is_that_of_brute_force():
    problem = _problem(4, (2, 4, 8), (8,), seed=3)
    cost = problem.costs["packed"]
    best = _best(problem, "packed")
    found = [(cost.total(c), _harm(problem, c)) for c in pareto_choices(problem, "packed", {}, None)]
    assert [c for c, _ in found] == [c for c, _ in best]
    assert [h for _, h in found] == pytest.approx([h for _, h in best])
    some = [(cost.total(c), _harm(problem, c)) for c in pareto_choices(problem, "packed", {}, 4)]
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


def test_a_cut_forbids_nothing_that_is_within_the_budget():
    options = [(width, None) for width in (2, 4, 8)]
    excess = {(name, pair): float(cost) for name in "abc" for pair, cost in zip(options, range(3), strict=True)}
    for room in range(6):
        limit = _Limit(excess, room)
        choices = [dict(zip("abc", pairs, strict=True)) for pairs in itertools.product(options, repeat=3)]
        for broken in [choice for choice in choices if limit.over(choice) > 0]:
            items, most = limit.cover(broken)
            assert len(items & broken.items()) > most
            assert all(len(items & choice.items()) <= most for choice in choices if limit.over(choice) <= 0)


def test_what_costs_more_and_does_no_less_harm_is_not_on_the_front():
    pairs = [(2, None), (4, None), (8, None)]
    harm, cost = (
        {("l", pair): value for pair, value in zip(pairs, of, strict=True)} for of in ((1, 1, 0.5), (2, 4, 8))
    )
    problem = Problem([Layer("l", "l.weight", None, tuple(pairs))], harm, {"packed": Cost(cost)})
    kept = _undominated(problem, problem.costs["packed"], [{"l": pair} for pair in pairs])
    assert kept == [{"l": (2, None)}, {"l": (8, None)}]


def test_a_budget_that_cannot_be_met_names_the_smallest_feasible_which_can():
    problem = _problem(5, (2, 4, 8), (4, 8), seed=0)
    with pytest.raises(UserError, match=r"packed=10 B cannot be met: the smallest feasible is (\d+)") as caught:
        solve(problem, {"packed": 10})
    least = int(str(caught.value).rpartition(" is ")[2].partition(" ")[0])
    assert problem.costs["packed"].total(solve(problem, {"packed": least})) == least


def test_the_smallest_feasible_average_can_be_given_back_as_it_is_written():
    problem = _problem(5, (2, 4, 8), (4, 8), seed=0)
    average = Cost(problem.costs["packed"].table, 1 / 3, 1e5 / 7)
    problem = Problem(problem.layers, problem.harm, {"avg_bits": average})
    with pytest.raises(UserError, match="the smallest feasible is") as caught:
        solve(problem, {"avg_bits": 0.1})
    solve(problem, {"avg_bits": float(str(caught.value).rpartition(" is ")[2])})


@pytest.mark.parametrize("of", ["packed", "bops"])
def test_a_front_within_a_budget_that_cannot_be_met_says_what_can(of):
    problem = _problem(5, (2, 4, 8), (4, 8), seed=0)
    with pytest.raises(UserError, match=r"^packed=10 B cannot be met: the smallest feasible is"):
        pareto_choices(problem, of, {"packed": 10}, 4)


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
    assert COSTS[name].amount(text) == pytest.approx(value)


@pytest.mark.parametrize(("name", "text"), [("avg_bits", "4kB"), ("packed", "a lot"), ("bops", "-3"), ("latency", 0)])
def test_other_limits_are_refused(name, text):
    with pytest.raises(UserError, match=f"{name}={text}: must be"):
        COSTS[name].amount(text)
