"""The report of a sweep: a table in the terminal, a page (`report.html`), a picture (`report.png`), and W&B's copy."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qat.measure.cost import COSTS
from qat.numbers import NONE, metric
from qat.report.page import save_page
from qat.report.sweep_plot import float_metrics, save_sweep_plot
from qat.run_files import REPORT
from qat.stages import final_metric, stages
from qat.sweep.results import Result, SweepResults

PAGE, PICTURE = "report.html", "report.png"
HEADERS = {"size": "file", "packed": "packed", "bops": "BOPs", "latency": "CPU p50", "avg_bits": "bits"}
"""How the table heads each cost."""


def write_reports(sweep: SweepResults, console: Console) -> None:
    """`write_report` of a folder whose runs may have several metrics: for each of them, and files that are named after
    it."""
    parts = sweep.by_metric()
    for part in parts:
        of = re.sub(r"\W+", "-", f"-{part.metric}-{part.objectives['metric']}") if len(parts) > 1 else ""
        write_report(part, console, of)


def write_report(sweep: SweepResults, console: Console, of: str = "") -> None:
    """Prints the table, and writes page and picture into the sweep's folder (beside the report of a single run).

    Args:
        sweep: The sweep, compared by one metric.
        console: The console to print to.
        of: End of the files' names.
    """
    console.print(sweep_table(sweep))
    name = ("sweep" if (sweep.folder / REPORT).is_file() else "report") + of
    page, picture = sweep.folder / f"{name}.html", sweep.folder / f"{name}.png"
    save_page(sweep, page)
    save_sweep_plot(sweep, picture)
    console.print(f"{page}\n{picture}", highlight=False, soft_wrap=True)


def tell_bad(sweep: SweepResults, console: Console) -> bool:
    """One line for each point that failed, measured no finite metric or did not verify; whether there is one."""
    bad = [r for r in sweep.results if r.state == "failed" or r.verified is False or _unmeasured(r)]
    for result in bad:
        lacking = f"{sweep.metric} is not finite: training diverged" if _unmeasured(result) else None
        said = result.error or lacking or "the exported file falls short of the trained model"
        line = f"[red]point {result.number}: {escape(said)}[/] ({escape(str(result.folder))})"
        console.print(line, highlight=False, soft_wrap=True)
    return bool(bad)


def _unmeasured(result: Result) -> bool:
    return result.state == "done" and bool(stages(result.report)) and "metric" not in result.values


def sweep_table(sweep: SweepResults) -> Table:
    """A row for each point, the best metric first; `*` marks the front over all objectives. What all points have in
    common is in the title."""
    headers, rows = sweep_rows(sweep)
    over = ", ".join(f"{name} {direction}" for name, direction in sweep.objectives.items())
    floats = ", ".join(map(metric, sorted(float_metrics(sweep))))
    title = " ".join([sweep.folder.name, *_label(sweep.shared)])
    table = Table(
        box=box.SIMPLE_HEAD, title=escape(title), title_justify="left", title_style="bold",
        caption=f"* on the Pareto front ({over}); float: {floats or NONE}", caption_justify="left",
        padding=(0, 1, 0, 0),
    )  # fmt: skip
    for i, header in enumerate(headers):
        table.add_column(escape(header), justify="left" if i == 1 else "right", overflow="fold", no_wrap=i != 1)
    for result, row in zip(_ordered(sweep), rows, strict=True):
        style = "bold" if row[0].startswith("*") else "dim" if result.state != "done" else None
        table.add_row(*map(escape, row), style=style)
    return table


def sweep_rows(sweep: SweepResults) -> tuple[list[str], list[list[str]]]:
    """Headers and cells of the table as plain text; the costs are those that are objectives, and the usual ones."""
    costs = [cost for cost in HEADERS if cost != "size" or cost in sweep.objectives]
    shared = sweep.shared
    front = {result.number for result in sweep.front()}
    rows = []
    for result in _ordered(sweep):
        label = " ".join(_label({key: value for key, value in result.params.items() if key not in shared}))
        ptq = metric(result.stage("ptq").get("metric"))
        score = metric(final_metric(result.report)) if result.state == "done" else result.state or "unfinished"
        score += " NOT VERIFIED" if result.verified is False else ""
        values = result.values if result.state == "done" else {}
        cells = [_cell(cost, values[cost]) if cost in values else NONE for cost in costs]
        rows.append([f"{'*' if result.number in front else ''}{result.number}", label, ptq, score, *cells])
    return ["", "parameters", "PTQ", sweep.metric, *(HEADERS[cost] for cost in costs)], rows


def _cell(cost: str, value: float) -> str:
    return f"{value:.2f}" if cost == "avg_bits" else COSTS[cost].shown(value)  # without the unit, which is its header


def _label(params: Mapping[str, str]) -> list[str]:
    return [f"{key.removeprefix('quant.')}={value}" for key, value in params.items()]


def _ordered(sweep: SweepResults) -> Sequence[Result]:
    sign = -1 if sweep.objectives.get("metric", "max") == "max" else 1

    def place(r: Result) -> tuple[bool, bool, float, int]:
        return r.state != "done", "metric" not in r.values, sign * r.values.get("metric", 0.0), r.number

    return sorted(sweep.results, key=place)


def log_sweep(sweep: SweepResults, where: dict[str, Any]) -> None:
    """Puts table, picture and page into a W&B run of their own, in the group of the sweep's runs.

    Args:
        sweep: The sweep.
        where: `project`, `group`, and whether `offline`.
    """
    import wandb

    run = wandb.init(
        project=where["project"], group=where["group"], job_type="sweep", name=where["group"], dir=str(sweep.folder),
        mode="offline" if where["offline"] else "online",
    )  # fmt: skip
    try:
        names = list(dict.fromkeys(name for r in sweep.done for name in r.values))
        table = wandb.Table(columns=["point", "parameters", *names])
        for r in sweep.done:
            table.add_data(r.number, " ".join(f"{k}={v}" for k, v in r.params.items()), *map(r.values.get, names))
        cost = next((name for name in sweep.objectives if name != "metric"), "size")
        run.log({
            "points": table,
            "pareto": wandb.plot.scatter(table, cost, "metric", title=f"metric against {cost}"),
            "picture": wandb.Image(str(Path(sweep.folder) / PICTURE)),
            "page": wandb.Html((sweep.folder / PAGE).read_text()),
        })  # fmt: skip
    finally:
        run.finish()
