"""Costs of every option of every layer, in the numbers that audit and sweep show.

`packed` and `size` are those of files: what does not depend on the choice (scales, biases, float parts, graph, header)
is weighed once, in files made of the float model at the narrowest and at the widest grids, the larger of which counts.
So a file may come out a little smaller than the sum, by as much as headers differ, and not larger.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qat.grid.spec import QuantSpec
from qat.measure.cost import bit_operations, code_bytes
from qat.measure.storage import engine_bits, layer_bytes
from qat.search.allocate import Cost, Problem, Table
from qat.search.measured import Measure, Measured
from qat.search.space import Layer, Pair, Space


@dataclass
class Files:
    """Sizes of real files of the model, by the width that all chosen grids have in them.

    Attributes:
        packed: Bytes of the packed integers.
        size: Bytes of the exported file.
    """

    packed: dict[int, int] = field(default_factory=dict)
    size: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Latencies:
    """Milliseconds on the runtime: `table` by layer and pair, `rest` for what belongs to no layer."""

    table: Table
    rest: float


def make_problem(
    space: Space, measured: Measured, by: Measure, files: Files, latencies: Latencies | None = None
) -> Problem:
    """Puts harms and costs together; a cost that nothing was measured of is left out."""
    harms = make_harms(space, lambda tensor, bits: measured.harm(tensor, bits, by))
    return Problem(space.layers, harms, make_costs(space, files, latencies), space.tied)


def make_costs(space: Space, files: Files, latencies: Latencies | None = None) -> dict[str, Cost]:
    """Every cost that is known."""
    costs = {"avg_bits": _average(space), "bops": _bops(space)}
    for name, found, of in (("packed", files.packed, _packed), ("size", files.size, _exported)):
        if found:
            table = {(layer.name, pair): of(space, layer, pair) for layer in space.layers for pair in layer.options}
            whole = {width: sum(of(space, layer, (width, None)) for layer in space.layers) for width in found}
            costs[name] = Cost(table, max(found[width] - whole[width] for width in found))
    if latencies is not None:
        costs["latency"] = Cost(latencies.table, latencies.rest)
    return costs


def make_harms(space: Space, of: Callable[[str, int], float]) -> dict[tuple[str, Pair], float]:
    """The harm of each pair from those of (grid, width); a grid counts once, with the first layer that has it."""
    first: dict[str, str] = {}
    harms: dict[tuple[str, Pair], float] = {}
    for layer in space.layers:
        for weight, act in layer.options:
            harm = 0.0
            if first.setdefault(layer.weight, layer.name) == layer.name:
                harm += of(layer.weight, weight)
            if layer.act is not None and act is not None and first.setdefault(layer.act, layer.name) == layer.name:
                harm += of(layer.act, act)
            harms[layer.name, (weight, act)] = harm
    return harms


def _spec(space: Space, layer: Layer, bits: int) -> QuantSpec:
    plan = space.plans[bits]
    owner = plan.layers[layer.name].weight
    assert owner is not None  # only layers whose weight has a grid are in a space
    return plan.weights[owner]


def _packed(space: Space, layer: Layer, pair: Pair) -> int:
    return layer_bytes(space.model, space.plans[pair[0]], layer.name, _spec(space, layer, pair[0]))


def _exported(space: Space, layer: Layer, pair: Pair) -> int:
    """Bytes of codes in an ONNX file, which has integers of 2, 4, 8 and 16 bits."""
    plan, spec = space.plans[pair[0]], _spec(space, layer, pair[0])
    if plan.layers[layer.name].weight != layer.name:
        return 0
    bits = engine_bits(space.model, plan, layer.name, spec)
    size = next(size for size in (2, 4, 8, 16) if bits <= size)
    module: Any = space.model.get_submodule(layer.name)
    return code_bytes(module.weight.numel(), size)


def _average(space: Space) -> Cost:
    names = {layer.name for layer in space.layers}
    rows = [row for row in space.rows.values() if row.weight_bits and row.params]
    table = {(la.name, pair): space.rows[la.name].params * pair[0] for la in space.layers for pair in la.options}
    fixed = sum(row.params * (row.weight_bits or 0) for row in rows if row.name not in names)
    return Cost(table, fixed, sum(row.params for row in rows))


def _bops(space: Space) -> Cost:
    names = {layer.name for layer in space.layers}
    table: dict[tuple[str, Pair], float] = {}
    for layer in space.layers:
        row = space.rows[layer.name]
        for weight, act in layer.options:
            table[layer.name, (weight, act)] = bit_operations(row.macs, weight, row.act_bits if act is None else act)
    return Cost(table, sum(r.bops for r in space.rows.values() if r.name not in names and not r.folds))


def predict(problem: Problem, choice: Mapping[str, Pair]) -> dict[str, float]:
    """Every cost of an allocation."""
    return {name: cost.total(choice) for name, cost in problem.costs.items()}
