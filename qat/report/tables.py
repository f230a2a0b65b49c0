"""Tables for the terminal (rich). Numbers never wrap; in a narrow terminal names and reasons fold first."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from qat.measure.cost import COSTS
from qat.numbers import NONE, count
from qat.planning.audit import AuditRow
from qat.report.format import stage_table, verdict_in_words
from qat.sweep.results import measured


def audit_table(rows: Sequence[AuditRow], coverage: tuple[float, float]) -> Table:
    """The audit as a table: what is integer, what is float and why; `coverage` (of `qat.planning.audit`) is the line
    below.
    """
    share_macs, share_params = coverage
    caption = f"integer: {share_macs:.1%} of counted MACs, {share_params:.1%} of parameters"
    table = Table(
        box=box.SIMPLE_HEAD, caption=caption, caption_justify="left", caption_style="bold", padding=(0, 1, 0, 0)
    )
    table.add_column("layer", overflow="fold", ratio=None)
    table.add_column("type", overflow="fold")
    table.add_column("weight x input", overflow="fold")
    table.add_column("MACs", justify="right", no_wrap=True)
    table.add_column("params", justify="right", no_wrap=True)
    for row in rows:
        style = "dim" if row.folds else "yellow" if row.reason else None
        numbers = (count(row.macs) if row.macs else NONE, count(row.params) if row.params else NONE)
        table.add_row(escape(row.name or "(model)"), escape(row.type), escape(_grids(row)), *numbers, style=style)
    return table


def _grids(row: AuditRow) -> str:
    grids = " x ".join(label for label in (row.weight, row.act) if label)
    return "; ".join(part for part in (grids, row.reason) if part)


def report_table(report: Mapping[str, Any]) -> RenderableType:
    """One row per stage of a run, and below it whether the exported file was verified."""
    headers, rows = stage_table(report)
    table = Table(
        box=box.SIMPLE_HEAD, title=escape(str(report.get("name") or "")), title_justify="left", title_style="bold"
    )
    for i, header in enumerate(headers):
        table.add_column(escape(header), justify="left" if i == 0 else "right", no_wrap=True)
    better = 1 if report.get("higher_is_better", True) else -1
    for row in rows:
        delta = row[2]
        style = "" if delta == NONE else "green" if float(delta) * better >= 0 else "red"
        table.add_row(*row[:2], Text(delta, style=style), *row[3:])
    outcome = verdict_in_words(report)
    lines = [Text(line) for line in _predictions(report)]
    if outcome is None:
        return Group(table, *lines) if lines else table
    lines.append(Text(outcome.text, style="bold green" if outcome.passed else "bold red"))
    return Group(table, *lines, *(Text(f"  {failure}", style="red") for failure in outcome.failures))


def _predictions(report: Mapping[str, Any]) -> list[str]:
    """Costs that a search predicted, beside those of the run."""
    actual = {name: value for name, value in measured(report).items() if name in COSTS}
    pairs = [(COSTS[n], value, actual[n]) for n, value in (report.get("predicted") or {}).items() if n in actual]
    parts = [f"{kind.name} {kind.shown(now)} (predicted {kind.shown(before)})" for kind, before, now in pairs]
    return [", ".join(parts), ""] if parts else []
