"""A sweep in one picture: the metric against each cost with the Pareto front, and below it the bits of every layer."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from qat.measure.cost import COSTS
from qat.report.picture import ACT, DPI, INK, LETTER, LINE, MUTED, RULE, WEIGHT, WIDTH, save, style
from qat.sweep.results import Result, SweepResults

PANEL, TOP, GAP = 3.4, 0.9, 0.5
"""Heights in inches: of a plot, and of the room above and between."""
AXES = {"packed": "packed weights", "bops": "BOPs", "latency": "CPU p50 (ms)"}
COLORS = "YlGnBu"
LONGEST = 36
"""Letters of a row's label."""


def save_sweep_plot(sweep: SweepResults, path: Path) -> None:
    """Draws a sweep as a PNG; it appears complete or not at all."""
    done = sorted((r for r in sweep.done if r.report.get("layers")), key=lambda r: -r.values.get("packed", 0))
    body = GAP + LINE * len(done) + 1.0 if done else 0.0
    figure = Figure(figsize=(WIDTH, TOP + PANEL + 0.6 + body), dpi=DPI, facecolor="white")
    height = figure.get_figheight()
    figure.text(0.03, 1 - 0.3 / height, sweep.folder.name, fontsize=14, fontweight="bold", color=INK, parse_math=False)
    measured = [cost for cost in AXES if any(cost in r.values for r in sweep.done)]
    for i, cost in enumerate(measured or AXES):
        place = (0.07 + i * 0.32, 1 - (TOP + PANEL) / height, 0.26, PANEL / height)
        _scatter(figure.add_axes(place), sweep, cost, first=i == 0)
    if done:
        _heat_maps(figure, done, sweep.labels)
    save(figure, path)


def _scatter(axes: Axes, sweep: SweepResults, cost: str, first: bool) -> None:
    """Points, their front over these two objectives, the same points before training (PTQ), and the float metric."""
    shown = [r for r in sweep.done if cost in r.values and "metric" in r.values]
    better = sweep.objectives.get("metric", "max")
    for result in shown:
        ptq = result.stage("ptq").get("metric")
        if ptq is not None and math.isfinite(ptq):
            x, y = result.values[cost], result.values["metric"]
            axes.plot([x, x], [ptq, y], color=RULE, linewidth=1, zorder=1)
            axes.scatter([x], [ptq], 14, facecolors="white", edgecolors=MUTED, linewidths=0.9, zorder=2)
    axes.scatter([r.values[cost] for r in shown], [r.values["metric"] for r in shown], 26, color=WEIGHT, zorder=3)
    front = sorted((r.values[cost], r.values["metric"]) for r in sweep.front({"metric": better, cost: "min"}))
    axes.step([x for x, _ in front], [y for _, y in front], where="post", color=ACT, linewidth=1.6, zorder=2)
    for value in sorted(float_metrics(sweep)):
        axes.axhline(value, color=MUTED, linestyle="--", linewidth=1)
    style(axes, f"{sweep.metric} against {AXES[cost]}", size=9.5, labels=8)
    if COSTS[cost].whole:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: COSTS[cost].shown(x)))
    axes.xaxis.set_major_locator(MaxNLocator(4))
    if first:
        kind = "exported" if sweep.exported else "result"
        handles = [
            axes.plot([], [], style, color=color, markerfacecolor=face, markersize=5, label=label)[0]
            for style, color, face, label in (
                ("o", WEIGHT, WEIGHT, kind), ("o", MUTED, "white", "PTQ"), ("-", ACT, ACT, "front"),
                ("--", MUTED, MUTED, "float"),
            )
        ]  # fmt: skip
        axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1.08), ncols=4, frameon=False, fontsize=8)


def float_metrics(sweep: SweepResults) -> set[float]:
    """The metrics of the float models that the points started from, those that are finite."""
    metrics = [r.stage("float").get("metric", math.nan) for r in sweep.results]
    return {metric for metric in metrics if math.isfinite(metric)}


def layer_names(results: Sequence[Result]) -> list[str]:
    """Names of all layers with a grid, in the order of execution."""
    layers = [layer for r in results for layer in r.report.get("layers") or ()]
    return list(dict.fromkeys(layer["name"] for layer in layers if layer["weight_bits"] or layer["act_bits"]))


def _heat_maps(figure: Figure, done: Sequence[Result], said: Mapping[int, str]) -> None:
    """Bits of weights and of inputs: a row for each point, the largest first; a column for each layer."""
    names, height = layer_names(done), figure.get_figheight()
    labels = [f"{r.number}  {said[r.number]}" for r in done]
    labels = [text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…" for text in labels]
    left = 0.3 + LETTER * max(map(len, labels))
    wide = (WIDTH - left - 0.9) / 2
    tall = LINE * len(done)
    for i, (key, title) in enumerate((("weight_bits", "bits of weights"), ("act_bits", "bits of inputs"))):
        place = ((left + i * (wide + 0.4)) / WIDTH, 1.0 / height, wide / WIDTH, tall / height)
        axes = figure.add_axes(place)
        rows = [{layer["name"]: layer[key] for layer in r.report["layers"]} for r in done]
        grid = np.array([[row.get(name) or np.nan for name in names] for row in rows], dtype=float)
        axes.imshow(grid, cmap=COLORS, vmin=1, vmax=16, aspect="auto", interpolation="nearest")
        if len(names) <= 30:
            for y, x in zip(*np.nonzero(~np.isnan(grid)), strict=True):
                color = INK if grid[y, x] < 9 else "white"
                axes.text(x, y, f"{grid[y, x]:.0f}", ha="center", va="center", fontsize=7, color=color)
        style(axes, title, size=9.5, grid=None)
        shown = [name if len(name) < 16 else f"…{name[-14:]}" for name in names]
        axes.set_xticks(range(len(names)), shown, rotation=60, ha="right", fontsize=6.5, parse_math=False)
        axes.set_yticks(range(len(done)), labels if i == 0 else [], fontsize=7.5, parse_math=False)
