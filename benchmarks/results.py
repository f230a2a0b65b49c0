"""Collects finished runs into docs/results.json, and writes the tables of docs/results.md from it.

    python benchmarks/results.py [RUN_DIR ...]

A run is known by its command and seed: the same one again replaces what is there. Without folders, only the tables are
written. They stand between `<!-- NAME -->` and `<!-- end NAME -->`, NAME being a folder of configs/experiment; all else
in docs/results.md is written by hand.
"""

import argparse
import json
import re
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from pages import DOCS, between

LEFT_OUT = ("run_dir", "cache_dir", "seed", "logger", "trainer.enable_progress_bar", "data.cache_dir")
PLACES = {
    "data.root": lambda value: "DIR",
    **dict.fromkeys(("ckpt", "float_ckpt", "data.path", "callbacks.distill.teacher"), lambda v: Path(v).name),
}


def collected(folder: Path) -> dict[str, Any]:
    """What docs/results.json keeps of a run.

    Raises:
        SystemExit: if the folder holds no finished run.
    """
    if not (folder / "report.json").is_file():
        raise SystemExit(f"{folder}: no report.json, so no finished run")
    report = json.loads((folder / "report.json").read_text())
    overrides = [str(text) for text in OmegaConf.load(folder / ".hydra" / "overrides.yaml")]
    cfg: Any = OmegaConf.load(folder / ".hydra" / "config.yaml")
    stages, verify = report["stages"], report.get("verify") or {}
    floats, exported = stages["float"], stages.get("exported", {})
    return {
        "command": command(overrides),
        "seed": cfg.seed,
        "name": report["name"],
        "lower_is_better": not report["higher_is_better"],
        "epochs": cfg.trainer.max_epochs if "qat" in stages else cfg.float_epochs,
        "float": floats["metric"],
        "ptq": stages.get("ptq", {}).get("metric"),
        "qat": stages.get("qat", {}).get("metric"),
        "best": stages.get("qat", {}).get("best"),
        "exported": exported.get("metric"),
        "agreement": exported.get("agreement"),
        "verified": verify.get("passed"),
        "float_bytes": floats.get("bytes"),
        "bytes": exported.get("bytes"),
        "packed_bytes": report.get("packed_bytes"),
        "seconds": report["seconds"].get("qat"),
    }


def command(overrides: Iterable[str]) -> str:
    """The command of a run, without what says only where on a machine things are, and the seed."""
    words = []
    for text in overrides:
        key, _, value = text.partition("=")
        if key not in LEFT_OUT:
            words.append(f"{key}={PLACES[key](value)}" if key in PLACES else text)
    return " ".join(["qat train", *words])


def merged(runs: list[dict[str, Any]], new: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """`runs` with `new` ones added, or in the place of those with the same command and seed."""
    by_key = {(run["command"], run["seed"]): run for run in (*runs, *new)}
    return [by_key[key] for key in sorted(by_key)]


# -- tables ------------------------------------------------------------------------------------------------------------


def folder_of(run: dict[str, Any]) -> str:
    """The folder of the run's experiment."""
    found = re.search(r"experiment=\[?(\w+)/", run["command"])
    return found[1] if found else ""


def label(run: dict[str, Any]) -> str:
    """The recipe, the budgets named behind it, and what else the command changes."""
    found = re.search(r"experiment=\[([\w/,]+)\]", run["command"])
    _, *budgets = found[1].split(",") if found else [""]
    words = [word for word in run["command"].split()[2:] if word.partition("=")[0] not in ("experiment", *PLACES)]
    return ", ".join([f"`{run['name']}`", *(budget.rpartition("/")[2] for budget in budgets), *words])


def shown(values: list[float | None], percent: bool) -> str:
    """Mean and, of values that differ, the range."""
    known = [100 * v if percent else v for v in values if v is not None]
    if not known:
        return "-"
    digits = 2 if percent else 4
    text = f"{statistics.mean(known):.{digits}f}"
    return text if min(known) == max(known) else f"{text} ({min(known):.{digits}f} to {max(known):.{digits}f})"


def size(count: int | None) -> str:
    return "-" if count is None else f"{count / 1000:.0f} kB"


def table(runs: list[dict[str, Any]]) -> str:
    """One row per command. Of metrics where less is better, training the float model as long, from the same seeds, is
    what counts as float, and the share of the loss of calibration that training wins back is shown.
    """
    lower = any(run["lower_is_better"] for run in runs)
    equal = [run for run in runs if lower and run["qat"] is None]
    head = ["recipe", "epochs", "float", "PTQ", "QAT, last epoch", "QAT, best in validation", "exported", "agreement"]
    head += ["file", "packed", "seeds", "QAT takes"] + (["recovered"] if equal else [])
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    commands = []
    for text in dict.fromkeys(run["command"] for run in runs):
        same = [run for run in runs if run["command"] == text]
        first = same[0]

        def mean(key: str, same: list[dict[str, Any]] = same) -> str:
            return shown([run[key] for run in same], percent=not lower)

        row = [label(first), str(first["epochs"]), *map(mean, ("float", "ptq", "qat", "best", "exported"))]
        agreements = [run["agreement"] for run in same if run["agreement"] is not None]
        row.append(f"{100 * min(agreements):.2f}%" if agreements else "-")
        row += [size(first["bytes"]), size(first["packed_bytes"]), str(len(same))]
        seconds = [run["seconds"] for run in same if run["seconds"] is not None]
        row.append(f"{statistics.mean(seconds) / 60:.1f} min" if seconds else "-")
        if equal:
            row.append(recovered(same, equal))
        lines.append("| " + " | ".join(row) + " |")
        commands.append(f"    {text}")
    return "\n".join([*lines, "", "with", "", *commands])


def recovered(runs: list[dict[str, Any]], equal: list[dict[str, Any]]) -> str:
    """(PTQ - QAT) / (PTQ - float trained as long), of the means over the seeds that both were run with."""
    floats = {run["seed"]: run["float"] for run in equal}
    paired = [run for run in runs if run["seed"] in floats and run["ptq"] is not None and run["qat"] is not None]
    if not paired:
        return "-"
    ptq, qat = (statistics.mean(run[key] for run in paired) for key in ("ptq", "qat"))
    return f"{100 * (ptq - qat) / (ptq - statistics.mean(floats[run['seed']] for run in paired)):.0f}%"


def written(page: str, runs: list[dict[str, Any]]) -> str:
    """`page` with its tables replaced.

    Raises:
        SystemExit: if it has no place for an experiment folder.
    """
    for name in sorted({folder_of(run) for run in runs}):
        page = between(page, name, table([run for run in runs if folder_of(run) == name]), "results.md")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", metavar="RUN_DIR", type=Path, help="folder of a finished run")
    folders = parser.parse_args().folders
    data, page = DOCS / "results.json", DOCS / "results.md"
    runs = json.loads(data.read_text()) if data.is_file() else []
    runs = merged(runs, [collected(folder) for folder in folders])
    text = written(page.read_text(), runs)
    data.write_text(json.dumps(runs, indent=1) + "\n")
    page.write_text(text)


if __name__ == "__main__":
    main()
