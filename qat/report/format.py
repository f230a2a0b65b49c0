"""The report's table and verdict as plain strings: terminal and picture show the same."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from qat.numbers import NONE, metric, size
from qat.stages import stage, stages

STAGES = {"float": "float", "ptq": "PTQ", "qat": "QAT", "exported": "exported"}


class VerdictInWords(NamedTuple):
    """Result of verification in words: whether it passed, in one line, and the checks that failed, one line each."""

    passed: bool
    text: str
    failures: list[str]


def stage_table(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of the table of stages; absent stages have no row, absent fields a dash."""
    base: float | None = stage(report, "float").get("metric")
    headers = ["stage", report.get("metric") or "metric", "vs float", "file", "CPU p50", "agreement"]
    rows = []
    for key, label in STAGES.items():
        measured = stages(report).get(key)
        if measured is None:
            continue
        value, latency, agreement = measured.get("metric"), measured.get("latency_ms"), measured.get("agreement")
        delta = value - base if key != "float" and value is not None and base is not None else None
        rows.append([
            label,
            metric(value),
            metric(delta, signed=True),
            size(measured.get("bytes")),
            NONE if latency is None else f"{latency:.3g} ms",
            NONE if agreement is None else f"{100 * agreement:.2f}%",
        ])  # fmt: skip
    return headers, rows


def verdict_in_words(report: Mapping[str, Any]) -> VerdictInWords | None:
    """The verdict of `report["verify"]` in words; `None` if nothing was verified."""
    verify = report.get("verify")
    if not verify:
        return None
    facts = []
    if (same := verify.get("codes_identical")) is not None:
        facts.append("weight codes identical" if same else "weight codes differ")
    if (agreement := verify.get("agreement")) is not None:
        what = "predictions equal" if verify.get("classes", True) else "samples within a step of 8 bits"
        facts.append(f"{agreement:.2%} of {what}")
    if (steps := verify.get("max_deviation_steps")) is not None:
        facts.append(f"outputs within {steps:.3g} step{'' if steps == 1 else 's'}")
    nodes, expected = verify.get("integer_nodes"), verify.get("expected_integer_nodes")
    if nodes is not None and (nodes or expected != 0):  # of a file that runs elsewhere, none is counted
        of, why = "" if expected is None else f" of {expected}", verify.get("no_integer_kernel")
        lacking = f" ({expected - nodes} without an integer kernel: {why})" if expected and why else ""
        facts.append(f"{nodes}{of} layers run on integers{lacking}")
    failures = [f"{c['name']}: {c.get('detail', '')}" for c in verify.get("checks") or () if not c.get("passed")]
    passed = bool(verify.get("passed"))
    headline = "verified" if passed else "NOT VERIFIED"
    return VerdictInWords(passed, f"{headline}: {', '.join(facts)}" if facts else headline, failures)
