"""Settings of a policy that have had another name: plans and configs written before hold it still, and are read."""

from collections.abc import Mapping
from typing import Any

FORMERLY = {"target": "engine"}
"""The old name of each; a target is a file format by now."""


def renamed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A policy's settings, or a plan's values, under the names of today; those of networks (`modules`), too."""
    now = {FORMERLY.get(key, key): value for key, value in settings.items()}
    if isinstance(networks := now.get("modules"), Mapping):
        now["modules"] = {path: renamed(own) for path, own in networks.items()}
    return now


def renamed_override(text: str) -> str:
    """An override (`quant.target=ort`) under the name of today."""
    key, equals, value = text.partition("=")
    group, _, name = key.rpartition(".")
    return f"{group}.{FORMERLY[name]}{equals}{value}" if group == "quant" and name in FORMERLY else text
