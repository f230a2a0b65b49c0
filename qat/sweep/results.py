"""Results of the points of a sweep, read from their folders: finished runs tell all in `report.json`.

A point whose files are damaged is one that failed, with the file named as its error: the others count all the same.
"""

import csv
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qat.errors import UserError
from qat.files import read_object
from qat.measure.cost import average_bits
from qat.run_files import OVERRIDES, REPORT
from qat.stages import final_metric, stage, stages
from qat.sweep.objectives import undominated
from qat.sweep.point import RECORD

DEFINITION, POINTS = "sweep.json", "points"
PARTS = ("number", "params", "state", "error")
"""Keys that a `Result` takes from its `point.json`."""
QUANTIZERS = ("scale/", "sqnr/", "bits/")
"""Columns of a log that say how quantizers do; all others are learning curves."""


def measured(report: Mapping[str, Any]) -> dict[str, float]:
    """Every objective (see `qat.sweep.objectives`) that a run's report has."""
    exported = stage(report, "exported")
    layers = [layer for layer in report.get("layers") or () if layer.get("weight_bits") and layer["params"]]
    found = {
        "metric": final_metric(report),
        "size": exported.get("bytes"),
        "packed": report.get("packed_bytes"),
        "bops": report.get("bops"),
        "latency": exported.get("latency_ms"),
        "avg_bits": average_bits((layer["params"], layer["weight_bits"]) for layer in layers),
    }
    return {name: value for name, value in found.items() if value is not None and math.isfinite(value)}


@dataclass(frozen=True)
class Result:
    """A point and what came of it.

    Attributes:
        number, params, state, error: Entries of its `point.json`; for a run outside a sweep the overrides are the
            params.
        folder: Folder of the run.
        report: Content of `report.json`; empty if the run did not get there.
    """

    number: int
    params: dict[str, str]
    state: str | None
    error: str | None
    folder: Path
    report: dict[str, Any]

    @property
    def values(self) -> dict[str, float]:
        """Every objective that the run measured."""
        return measured(self.report)

    def stage(self, name: str) -> dict[str, Any]:
        """What the run measured at one stage; empty if it did not have it."""
        return stage(self.report, name)

    @property
    def verified(self) -> bool | None:
        """Whether the exported file held what training promised; `None` if nothing was exported."""
        verify = self.report.get("verify")
        return None if verify is None else bool(verify["passed"])


@dataclass(frozen=True)
class SweepResults:
    """A finished or unfinished sweep, or any folder of runs (which may have several metrics: `by_metric`)."""

    folder: Path
    objectives: dict[str, str]
    results: list[Result]

    @property
    def metric(self) -> str:
        """Name of the metric, as the first run says that has one."""
        return next((str(r.report["metric"]) for r in self.results if "metric" in r.report), "metric")

    def by_metric(self) -> list["SweepResults"]:
        """A part for each metric and direction in it, since no order is over several; what left no report is in the
        first."""
        parts: dict[tuple[str, bool], list[Result]] = {}
        for result in self.results:
            if result.report:
                of = result.report.get("metric", "metric"), result.report.get("higher_is_better", True)
                parts.setdefault(of, []).append(result)
        if len(parts) < 2:
            return [self]
        first, *rest = parts.values()
        first = [r for r in self.results if r in first or not r.report]
        return [SweepResults(self.folder, self.objectives | _better(part), part) for part in (first, *rest)]

    @property
    def done(self) -> list[Result]:
        """The points that have every objective."""
        return [r for r in self.results if r.state == "done" and set(self.objectives) <= set(r.values)]

    @property
    def exported(self) -> bool:
        """Whether the metrics are those of exported files, and not, without an export, of the models in training."""
        return any("exported" in stages(r.report) for r in self.results)

    @property
    def shared(self) -> dict[str, str]:
        """The parameters that all points have in common; none of a single one."""
        first, *others = [r.params for r in self.results if r.error is None] or [{}]
        return {key: value for key, value in first.items() if others and all(o.get(key) == value for o in others)}

    @property
    def labels(self) -> dict[int, str]:
        """In what each point differs, as short as tells keys apart: `weight.bits=2 lr=0.1`."""
        shared = self.shared
        own = {r.number: {k: v for k, v in r.params.items() if k not in shared} for r in self.results}
        names = _short({key for params in own.values() for key in params})
        return {n: " ".join(f"{names[key]}={value}" for key, value in params.items()) for n, params in own.items()}

    def front(self, objectives: dict[str, str] | None = None) -> list[Result]:
        """The points that no other beats, over all objectives or those given."""
        chosen = objectives or self.objectives
        done = [r for r in self.done if set(chosen) <= set(r.values)]
        values = [[r.values[name] for name in chosen] for r in done]
        return [done[i] for i in undominated(values, list(chosen.values()))]


def _short(keys: Collection[str]) -> dict[str, str]:
    """Each key's shortest end that is an end of no other key; the key itself if all of it is."""
    ends = {key: [key.split(".", n)[-1] for n in range(key.count("."), -1, -1)] for key in keys}
    taken = Counter(end for each in ends.values() for end in each)
    return {key: next((end for end in each if taken[end] == 1), key) for key, each in ends.items()}


def read_sweep(folder: Path) -> SweepResults:
    """Reads a sweep's folder, or any folder with finished runs below it.

    Raises:
        UserError: if there is neither, or `sweep.json` is damaged.
    """
    if not folder.is_dir():
        raise UserError(f"SWEEP_DIR {folder} is not a directory")
    if (folder / DEFINITION).is_file():
        definition = read_object(folder / DEFINITION, "objectives")
        records = (folder / POINTS).glob(f"*/{RECORD}")
        results = sorted((read_point(path.parent) for path in records), key=lambda r: r.number)
        return SweepResults(folder, definition["objectives"], results)
    runs = sorted(path.parent for path in folder.rglob(REPORT))
    if not runs:
        raise UserError(f"SWEEP_DIR {folder} holds neither a sweep nor a finished run")
    results = [_plain_run(number, run) for number, run in enumerate(runs)]
    return SweepResults(folder, _objectives(results), results)


def _objectives(runs: Sequence[Result]) -> dict[str, str]:
    """Objectives of runs that no sweep made."""
    packed = {"packed": "min"} if any("packed" in result.values for result in runs) else {}
    return _better(runs) | packed


def _better(runs: Sequence[Result]) -> dict[str, str]:
    """The direction of the metric, as the first run says that has one."""
    report = next((r.report for r in runs if r.report), {})
    return {"metric": "max" if report.get("higher_is_better", True) else "min"}


def read_point(folder: Path) -> Result:
    """Reads one point of a sweep."""
    record: dict[str, Any] = {"number": int(folder.name) if folder.name.isdecimal() else -1, "params": {}}
    try:
        record = read_object(folder / RECORD, *PARTS)
        return Result(**{key: record[key] for key in PARTS}, folder=folder, report=_report(folder))
    except UserError as damaged:
        return Result(record["number"], record["params"], "failed", str(damaged), folder, {})


def _plain_run(number: int, folder: Path) -> Result:
    from qat.config.configs import read_yaml

    path, params = folder / OVERRIDES, {}
    try:
        overrides = [str(text) for text in read_yaml(path)] if path.is_file() else []
        params = {key: value for key, _, value in (text.partition("=") for text in overrides) if key != "run_dir"}
        return Result(number, params, "done", None, folder, _report(folder))
    except UserError as damaged:
        return Result(number, params, "failed", str(damaged), folder, {})


def _report(folder: Path) -> dict[str, Any]:
    path = folder / REPORT
    return read_object(path) if path.is_file() else {}


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Learning curves of a run: name -> (step, value), without what the log says of quantizers."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in _rows(folder / "csv" / "metrics.csv"):
        for name, text in row.items():
            if text and name not in ("step", "epoch") and not name.startswith(QUANTIZERS):
                found.setdefault(name, []).append((int(row["step"]), float(text)))
    return found


def by_epoch(folder: Path, name: str) -> dict[int, float]:
    """A logged value after each epoch so far: what pruning looks at."""
    return {
        int(row["epoch"]): float(row[name])
        for row in _rows(folder / "csv" / "metrics.csv")
        if row.get(name) and row.get("epoch")
    }


def _rows(path: Path) -> Iterator[dict[str, str]]:
    """The rows of a log, complete ones only: it may be written to at this moment."""
    if not path.is_file():
        return
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if None not in row and None not in row.values() and row.get("step"):
                yield row
