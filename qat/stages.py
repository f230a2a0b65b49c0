"""What the report of a run (`report.json`) says of its stages: `float`, `ptq`, `qat` and `exported`, in this order."""

from collections.abc import Mapping
from typing import Any


def stages(report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What was measured at each stage that the run had."""
    return report.get("stages") or {}


def stage(report: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What was measured at one stage; empty if the run did not have it."""
    return stages(report).get(name) or {}


def final_metric(report: Mapping[str, Any]) -> float | None:
    """The metric of the last stage that measured one; it may be NaN or infinite."""
    metrics = [each["metric"] for each in stages(report).values() if "metric" in each]
    return metrics[-1] if metrics else None
