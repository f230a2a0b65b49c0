"""One picture of a run: the table of stages, and below it each layer's bits and how well its grids fit (SQNR).

Layers run down the page, so that their names read horizontally; the page grows with them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from qat.report.format import stage_table, verdict_in_words
from qat.report.picture import ACT, DPI, INK, LETTER, LINE, MUTED, RULE, WEIGHT, WIDTH, save, style

MARGIN, GAP = 0.35, 0.45
"""Room around the panels and between them."""
LEGEND, TICKS = 0.75, 0.55
"""Room above the panels and below them."""
PASSED, FAILED = "#2f855a", "#c53030"


def save_plot(report: Mapping[str, Any], path: Path) -> None:
    """Draws a report (see `qat.report.tables.report_table` for its stages) as a PNG.

    Args:
        report: Plain containers; without `layers` there is only the table.
        path: The file; it appears complete or not at all.
    """
    headers, rows = stage_table(report)
    layers = list(report.get("layers") or [])
    outcome = verdict_in_words(report)
    head = MARGIN + LINE * (len(rows) + 3 + (1 + len(outcome.failures) if outcome else 0))
    body = LEGEND + TICKS + LINE * len(layers) if layers else 0.0
    figure = Figure(figsize=(WIDTH, head + body), dpi=DPI, facecolor="white")
    _draw_head(figure, report, headers, rows)
    if layers:
        _draw_layers(figure, layers)
    save(figure, path)


def _draw_head(figure: Figure, report: Mapping[str, Any], headers: list[str], rows: list[list[str]]) -> None:
    """Title, table and verdict, set line by line from the top."""
    height = figure.get_figheight()
    y = height - MARGIN - 0.1

    def write(x: float, line: float, text: str, **style: Any) -> None:
        style = {"color": INK, "fontsize": 10.5, "va": "center", "parse_math": False} | style
        figure.text(x / WIDTH, (y - line * LINE) / height, text, **style)

    rights = [4.2, 5.8, 7.4, 9.0, WIDTH - MARGIN]
    write(MARGIN, 0, str(report.get("name") or "report"), fontsize=15, fontweight="bold")
    for cells, line in [(headers, 1.7), *((row, 2.8 + i) for i, row in enumerate(rows))]:
        style = {"color": MUTED, "fontsize": 9.5} if cells is headers else {}
        write(MARGIN, line, cells[0], **style)
        for x, cell in zip(rights, cells[1:], strict=True):
            write(x, line, cell, ha="right", **style)
    rule = (y - 2.2 * LINE) / height
    ends = MARGIN / WIDTH, 1 - MARGIN / WIDTH
    figure.add_artist(Line2D(ends, (rule, rule), color=RULE, linewidth=1.2, transform=figure.transFigure))
    outcome = verdict_in_words(report)
    if outcome is not None:
        line = 3.1 + len(rows)
        write(MARGIN, line, outcome.text, color=PASSED if outcome.passed else FAILED, fontweight="bold", fontsize=10)
        for i, failure in enumerate(outcome.failures):
            shown = failure if len(failure) <= 125 else f"{failure[:122]}..."
            write(MARGIN + 0.15, line + 1 + i, shown, color=FAILED, fontsize=9.5)


def _draw_layers(figure: Figure, layers: Sequence[Mapping[str, Any]]) -> None:
    height, names = figure.get_figheight(), [_shorten(str(layer["name"] or "(model)")) for layer in layers]
    left = MARGIN + 0.1 + LETTER * max(map(len, names))
    panel = (WIDTH - left - GAP - MARGIN) / 2
    bottom, tall = TICKS / height, LINE * len(layers) / height
    bits = figure.add_axes((left / WIDTH, bottom, panel / WIDTH, tall))
    sqnr = figure.add_axes(((left + panel + GAP) / WIDTH, bottom, panel / WIDTH, tall), sharey=bits)
    for axes, title in ((bits, "bits"), (sqnr, "SQNR (dB)")):
        style(axes, title, pad=9, grid="x")
        axes.set_ylim(len(layers) - 0.5, -0.5)
    bits.set_yticks(range(len(layers)), names, fontsize=8.5, parse_math=False)
    sqnr.tick_params(labelleft=False)
    _draw_bits(bits, layers)
    _draw_sqnr(sqnr, layers)


def _draw_bits(axes: Axes, layers: Sequence[Mapping[str, Any]]) -> None:
    for key, color, offset, label in (("weight_bits", WEIGHT, -0.19, "weight"), ("act_bits", ACT, 0.19, "input")):
        # A bar that has no partner, nor the word for one, lies in the middle.
        paired = [(layer.get("weight_bits") and layer.get("act_bits")) or _float_part(layer) for layer in layers]
        places = [(i + (offset if paired[i] else 0), layer[key]) for i, layer in enumerate(layers) if layer.get(key)]
        axes.barh([y for y, _ in places], [b for _, b in places], 0.32, color=color, label=label)
        for y, width in places:
            axes.text(width + 0.12, y, str(width), va="center", fontsize=6.5, color=MUTED)
    for i, layer in enumerate(layers):
        if text := _float_part(layer):
            y = i - 0.24 if layer.get("act_bits") else i + 0.24 if layer.get("weight_bits") else i
            axes.text(0.1, y, text, va="center_baseline", fontsize=6.8, color=FAILED)
    axes.set_xlim(0, 8.8)
    axes.set_xticks(range(0, 9, 2))
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, fontsize=8.5, borderaxespad=0.4)


def _float_part(layer: Mapping[str, Any]) -> str | None:
    """Which part stays float, if any; sums and pools have no weight, and lookups have no input to put on a grid."""
    weight, act = layer.get("weight_bits"), layer.get("act_bits")
    if weight is None and act is None:
        return "float"
    if weight is None and layer.get("params"):
        return "float weight"
    return "float input" if act is None and layer.get("macs") else None


def _draw_sqnr(axes: Axes, layers: Sequence[Mapping[str, Any]]) -> None:
    for i, layer in enumerate(layers):
        weight, act = layer.get("weight_sqnr_db"), layer.get("act_sqnr_db")
        if weight is not None and act is not None:
            axes.plot([weight, act], [i, i], color="#cbd2d9", linewidth=1.6, zorder=1)
    for key, color, marker, label in (("weight_sqnr_db", WEIGHT, "o", "weight"), ("act_sqnr_db", ACT, "D", "input")):
        places = [(layer[key], i) for i, layer in enumerate(layers) if layer.get(key) is not None]
        size = 34 if marker == "o" else 24
        axes.scatter(
            [x for x, _ in places], [y for _, y in places], size, color=color, marker=marker, label=label, zorder=2
        )
    values = [v for layer in layers for k in ("weight_sqnr_db", "act_sqnr_db") if (v := layer.get(k)) is not None]
    axes.set_xlim(min([0.0, *values]) - 1, max([40.0, *values]) * 1.05)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, fontsize=8.5, borderaxespad=0.4)


def _shorten(name: str, longest: int = 32) -> str:
    """Keeps the end of a long path, which tells layers apart."""
    return name if len(name) <= longest else f"...{name[-(longest - 3) :]}"
