"""Sensitivities and allocations, for the terminal and as pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure
from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from qat.measure.cost import COSTS
from qat.numbers import NONE, count
from qat.report.picture import ACT, DPI, INK, LINE, MUTED, WEIGHT, WIDTH, save, style
from qat.search.allocate import Problem
from qat.search.measured import Measured
from qat.search.space import Pair, Space

GRID = 6
"""Letters of a grid's name that stay in one line of the table."""
SMALLEST = 1e-6
"""Where the logarithmic axis of the loss begins: less is noise."""


def sensitivity_table(space: Space, measured: Measured, terminal: int) -> Table:
    """One row per grid: the loss increase at each width, and the SQNR at the narrowest.

    Args:
        space: The grids and their widths.
        measured: What was measured of them.
        terminal: Width of the terminal. Where names cannot fold as far as that the table is wider, to be printed with
            `crop=False`: rich would cut numbers, which then look like others.
    """
    widths = sorted({bits for tensor in space.tensors for bits in space.widths(tensor)})
    caption = f"Increase of the loss ({measured.loss:.4f} in float) with that grid alone; SQNR in dB at its fewest bits"
    table = Table(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left", padding=(0, 1, 0, 0))
    rows: list[list[str]] = []
    for tensor in space.tensors:
        entry = measured.tensors[tensor]
        at = [entry["bits"].get(str(bits)) for bits in widths]
        noise = next((a["sqnr_db"] for a in at if a is not None), None)
        trace = f"{entry['trace']:.3g}" if "trace" in entry else NONE
        increases = [NONE if a is None else f"{round(a['loss_increase'], 4) + 0.0:.4f}" for a in at]
        rows.append([escape(tensor), *increases, NONE if noise is None else f"{noise:.1f}", trace])
    table.add_column("grid", overflow="fold", min_width=GRID)
    titles = [*(f"{bits} bit" for bits in widths), "SQNR", "trace"]
    longest = [max(map(len, column)) for column in zip(titles, *(row[1:] for row in rows), strict=True)]
    for title, width in zip(titles, longest, strict=True):
        table.add_column(title, justify="right", no_wrap=True, min_width=width)
    for row in rows:
        table.add_row(*row)
    needed = 1 + sum(width + 2 for width in (GRID, *longest))  # an edge, and behind each column a space and a divider
    table.width = needed if needed > terminal else None
    return table


def save_sensitivity(space: Space, measured: Measured, path: Path) -> None:
    """Bars of the loss increase, weights on the left and inputs on the right, one bar for each width."""
    layers = [layer.name for layer in space.layers]
    panels = (("weights", "weight", WEIGHT), ("inputs", "act", ACT))
    widths = sorted({bits for tensor in space.tensors for bits in space.widths(tensor)})
    row = LINE * max(1.0, 0.42 * len(widths))
    height = row * len(layers) + 1.5
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white", layout="constrained")
    figure.suptitle(
        "Loss increase with one grid on (no bar: none)", x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK
    )
    left, right = figure.subplots(1, 2, sharey=True, sharex=True)
    for axes, (title, part, _) in zip((left, right), panels, strict=True):
        for rank, bits in enumerate(widths):
            values = [_increase(measured, getattr(layer, part), bits) for layer in space.layers]
            places = [i - 0.4 + 0.8 * (rank + 0.5) / len(widths) for i in range(len(layers))]
            found = [(y, v) for y, v in zip(places, values, strict=True) if v is not None]
            color = colormaps["viridis"](0.92 * rank / max(1, len(widths) - 1))
            bars = [max(v, SMALLEST) - SMALLEST for _, v in found]
            axes.barh([y for y, _ in found], bars, 0.8 / len(widths), SMALLEST, color=color, label=f"{bits} bit")
        style(axes, title, grid="x")
        axes.set_xscale("log")
        axes.set_ylim(len(layers) - 0.5, -0.5)
        axes.set_xlim(left=SMALLEST)
    left.set_yticks(range(len(layers)), [name or "(model)" for name in layers], fontsize=8.5, parse_math=False)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(widths), frameon=False, fontsize=8.5)
    save(figure, path)


def _increase(measured: Measured, tensor: str | None, bits: int) -> float | None:
    entry = measured.tensors[tensor]["bits"].get(str(bits)) if tensor is not None else None
    return None if entry is None else entry["loss_increase"]


def search_table(space: Space, problem: Problem, choice: Mapping[str, Pair], budget: Mapping[str, float]) -> Group:
    """The bits of every layer, and below them what they come to."""
    costs = {name: cost.total(choice) for name, cost in problem.costs.items()}
    parts = [
        f"{name} {kind.shown(costs[name])}" + (f" of {kind.shown(budget[name])}" if name in budget else "")
        for name, kind in COSTS.items()
        if name in costs
    ]
    predicted = f"predicted: {', '.join(parts)}; harm {problem.total_harm(choice):.4g}"
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("layer", overflow="fold")
    for title in ("weight", "input", "MACs", "params"):
        table.add_column(title, justify="right", no_wrap=True)
    for layer in space.layers:
        weight, act = choice[layer.name]
        row = space.rows[layer.name]
        bits = row.act_bits if act is None else act
        table.add_row(escape(layer.name or "(model)"), str(weight), "float" if bits is None else str(bits),
                      count(row.macs), count(row.params))  # fmt: skip
    return Group(table, Text(predicted, style="bold"))


def front_table(problem: Problem, choices: Sequence[Mapping[str, Pair]]) -> Table:
    """One row per allocation: its costs, its harm, and the mean width of the layers' weights and inputs."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    names = [name for name in COSTS if name in problem.costs]
    for title in ("", *names, "harm", "bits of the layers' weights"):
        table.add_column(title, justify="right", no_wrap=title != "bits of the layers' weights")
    for i, choice in enumerate(choices):
        costs = [COSTS[name].shown(problem.costs[name].total(choice)) for name in names]
        bits = " ".join(str(choice[layer.name][0]) for layer in problem.layers)
        table.add_row(str(i + 1), *costs, f"{problem.total_harm(choice):.4g}", bits)
    return table


def save_front(problem: Problem, choices: Sequence[Mapping[str, Pair]], name: str, by: str, path: Path) -> None:
    """Harm against one cost."""
    figure = Figure(figsize=(7, 4.2), dpi=DPI, facecolor="white", layout="constrained")
    axes = figure.subplots()
    costs = [problem.costs[name].total(choice) for choice in choices]
    harms = [problem.total_harm(choice) for choice in choices]
    axes.plot(costs, harms, color=WEIGHT, marker="o", linewidth=1.2, markersize=4)
    for i, (x, y) in enumerate(zip(costs, harms, strict=True)):
        axes.annotate(str(i + 1), (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7.5, color=MUTED)
    if min(harms, default=0) > 0:
        axes.set_yscale("log")
    axes.set_xlabel(COSTS[name].what + COSTS[name].note, color=INK, fontsize=9)
    axes.set_ylabel({"loss": "loss increase", "hessian": "estimated loss increase", "sqnr": "noise to signal"}[by],
                    color=INK, fontsize=9)  # fmt: skip
    style(axes)
    save(figure, path)
