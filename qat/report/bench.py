"""`qat bench` as people read it: a table, warnings, and a bar chart of latencies."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from qat.export.bench import Measured, float_of, slower
from qat.numbers import count, size
from qat.report.picture import ACT, DPI, INK, MUTED, WEIGHT, WIDTH, save, style

OTHERS = (WEIGHT, ACT, "#2f855a", "#805ad5", "#c53030", "#319795")


def bench_table(measured: Sequence[Measured]) -> RenderableType:
    """What each file takes, and below it what it gives at each batch size and number of threads; relative to the float
    file, if that is there."""
    reference = float_of(measured)
    takes = _table("file", "size", "peak memory", *(["of float"] if reference else []))
    gives = _table("file", "threads", "batch", "p50 ms", "p99 ms", "samples/s", *(["speed"] if reference else []))
    for each in measured:
        name, share = escape(Path(each.name).name), [f"{each.bytes / reference.bytes:.2f}x"] if reference else []
        takes.add_row(name, size(each.bytes), size(each.peak_memory), *share)
    for i in range(len(measured[0].timings)):
        for each in measured:
            t, speed = each.timings[i], [_speed(each, reference, i)] if reference else []
            numbers = (f"{t.p50:.3g}", f"{t.p99:.3g}", count(round(t.throughput)), *speed)
            gives.add_row(escape(Path(each.name).name), str(t.threads), str(t.batch), *numbers)
        gives.add_section()
    return Group(takes, gives)


def _speed(measured: Measured, reference: Measured, i: int) -> str:
    return f"{reference.timings[i].p50 / measured.timings[i].p50:.2f}x"


def _table(*headers: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, header in enumerate(headers):
        table.add_column(header, justify="right" if i else "left", no_wrap=i > 0, overflow="fold")
    return table


def warnings(measured: Sequence[Measured]) -> list[str]:
    """Warnings about quantized files that are slower than the float one, with what they compute in float."""
    reference, lines = float_of(measured), []
    if reference is None:
        return lines
    for each in measured[1:]:
        late = slower(each, reference)
        if not late:
            continue
        worst, factor = max(late, key=lambda pair: pair[1])
        if each.float_nodes is None:
            why = "its runtime does not say which layers are float"
        elif each.float_nodes:
            why = f"in float: {', '.join(each.float_nodes)}"
        else:
            why = "no layer is in float; layers this small gain nothing from integers"
        where = f"batch {worst.batch}, {worst.threads} thread{'s' * (worst.threads > 1)}"
        lines.append(f"warning: {each.name} is {factor:.2f}x slower than float ({where}); {why}")
    return lines


def save_bench_plot(measured: Sequence[Measured], path: Path) -> None:
    """Draws median latencies as bars, up to p99 as a line, one panel per batch size and number of threads.

    Args:
        measured: The float file first, if it is there.
        path: The picture, in the format of its suffix; it appears complete or not at all.
    """
    settings = [(t.batch, t.threads) for t in measured[0].timings]
    rows, reference = len(measured), float_of(measured)
    figure = Figure(figsize=(WIDTH, (0.9 + 0.32 * rows) * len(settings) + 0.4), dpi=DPI, facecolor="white")
    for i, (batch, threads) in enumerate(settings):
        axes = figure.add_subplot(len(settings), 1, i + 1)
        timings = [each.timings[i] for each in measured]
        colors = [MUTED] * (reference is not None) + [OTHERS[k % len(OTHERS)] for k in range(rows)]
        axes.barh(range(rows), [t.p50 for t in timings], color=colors[:rows], height=0.62)
        for row, (each, t) in enumerate(zip(measured, timings, strict=True)):
            axes.plot([t.p50, t.p99], [row, row], color=INK, linewidth=1)
            speed = "" if reference is None or each is reference else f"  {_speed(each, reference, i)}"
            axes.annotate(
                f"{t.p50:.3g} ms{speed}", (t.p99, row), (5, 0), textcoords="offset points", va="center",
                fontsize=8.5, color=INK,
            )  # fmt: skip
        style(axes, grid="x")
        axes.set_yticks(range(rows), [Path(each.name).name for each in measured], fontsize=9, color=INK)
        axes.invert_yaxis()
        axes.set_xscale("log")  # formats differ by orders of magnitude
        axes.set_xlim(min(t.p50 for t in timings) / 3, max(t.p99 for t in timings) * 4)
        title = f"batch {batch}, {threads} thread{'s' * (threads > 1)}"
        axes.set_title(title, loc="left", fontsize=10, color=INK)
        axes.tick_params(which="both", colors=MUTED, labelsize=8, length=0)  # minor ones have labels on short axes
        axes.tick_params(axis="y", colors=INK, labelsize=9)
    figure.supxlabel("ms per batch, log scale: bar = median, line = up to the 99th percentile", fontsize=9, color=MUTED)
    figure.tight_layout()
    save(figure, path)
