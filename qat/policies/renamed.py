"""Settings of a policy that have had another name: plans and configs written before hold it still, and are read."""

import re
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
    sign, name = re.fullmatch(r"([+~]*)(.*)", key).groups()  # pyright: ignore[reportOptionalMemberAccess]
    old = next((old for old in FORMERLY if name == f"quant.{old}"), None)
    return text if old is None else f"{sign}quant.{FORMERLY[old]}{equals}{value}"
