"""The page of a sweep: one HTML file that needs no network and no server.

The data is embedded as JSON, the code (`page.js`) and style (`page.css`) beside it; plots are SVG, drawn by the page.
"""

import html
import json
import math
import os
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from qat.config.configs import dotted_items, read_yaml
from qat.errors import UserError
from qat.files import atomic
from qat.run_files import CONFIG
from qat.sweep.objectives import OBJECTIVES
from qat.sweep.results import Result, SweepResults, curves

LAYER = ("name", "type", "weight_bits", "act_bits", "weight_sqnr_db", "act_sqnr_db", "macs", "params")
UNTOLD = ("run_dir", "cache_dir", "sweep", "ckpt")
"""Parts of a config that say where a point ran, not what it is."""


def save_page(sweep: SweepResults, path: Path) -> None:
    """Writes the page; it appears complete or not at all."""
    parts = {name: files("qat.report").joinpath(name).read_text() for name in ("page.html", "page.css", "page.js")}
    # "</" would end the script element, wherever it stands.
    data = json.dumps(_finite(page_data(sweep, path.parent)), allow_nan=False).replace("</", "<\\/")
    page = parts["page.html"].replace("{{title}}", html.escape(sweep.folder.name))
    page = page.replace("{{style}}", parts["page.css"]).replace("{{code}}", parts["page.js"])
    with atomic(path) as temporary:
        temporary.write_text(page.replace("{{data}}", data))


def _finite(content: Any) -> Any:
    """The content with `null` for every number that JSON does not know: NaN and infinities."""
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def page_data(sweep: SweepResults, beside: Path) -> dict[str, Any]:
    """All that the page shows, as plain containers; links to runs are relative to the folder `beside`."""
    labels = sweep.labels
    return {
        "name": sweep.folder.name,
        "metric": sweep.metric,
        "objectives": sweep.objectives,
        "meanings": OBJECTIVES,
        "front": [result.number for result in sweep.front()],
        "exported": sweep.exported,
        "points": [_point(result, beside) | {"label": labels[result.number]} for result in sweep.results],
    }


def _point(result: Result, beside: Path) -> dict[str, Any]:
    layers = [{key: layer.get(key) for key in LAYER} for layer in result.report.get("layers") or ()]
    return {
        "number": result.number,
        "params": result.params,
        "state": result.state or "unfinished",
        "error": result.error,
        "verified": result.verified,
        "values": result.values,
        "float": result.stage("float").get("metric"),
        "ptq": result.stage("ptq").get("metric"),
        "layers": layers,
        "curves": curves(result.folder),
        "config": config_of(result.folder),
        "folder": Path(os.path.relpath(result.folder, beside)).as_posix(),
    }


def config_of(folder: Path) -> dict[str, str]:
    """A run's config, flat: dotted key -> value as text, without what depends on where it ran; empty if there is none
    to be read."""
    path = folder / CONFIG
    if not path.is_file():
        return {}
    try:
        config = OmegaConf.to_container(read_yaml(path), resolve=False)
    except UserError:
        return {}
    assert isinstance(config, dict)
    told = {key: value for key, value in config.items() if key not in UNTOLD}
    return {key: json.dumps(value) for key, value in dotted_items(told) if not (isinstance(value, dict) and value)}
