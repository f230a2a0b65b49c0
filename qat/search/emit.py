"""The chosen bits as a YAML of named rules: a whole `quant` config that trains as it is."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from qat.config.overrides import quoted
from qat.errors import UserError
from qat.files import atomic
from qat.policies.networks import Policy
from qat.search.space import Pair, with_bit_rules


def outputs(output: str, points: int | None, key: str = "search.output") -> list[Path]:
    """The files that will be written: the one named, or for a front of so many points `NAME_1.yaml` and so on.

    Args:
        output: The file.
        points: How many, `None` for one allocation.
        key: Key of the setting, for messages.

    Raises:
        UserError: if one exists, or lies where `quant=...` would not find it.
    """
    path = Path(output)
    if path.suffix != ".yaml" or path.absolute().parent.name != "quant":
        raise UserError(
            f"{key}={output}: must be a .yaml in a folder named quant (configs/quant/mine.yaml), "
            "where --config-dir configs quant=mine finds it"
        )
    paths = [path] if points is None else [path.with_name(f"{path.stem}_{i + 1}.yaml") for i in range(points)]
    for each in paths:
        if each.exists():
            raise UserError(f"{key}={output}: {each} exists; choose another name, or delete it first")
    return paths


def trained_by(path: Path, overrides: Sequence[str] = (), config_dir: str | None = None) -> str:
    """The command that trains what such a file says, as one types it into a shell.

    Args:
        path: The file.
        overrides: What else the run is given: model, data, ...
        config_dir: The folder of other configs that they name, if any.
    """
    folder = path.parent.parent if path.parent.name == "quant" else path.absolute().parents[1]
    beside = []
    if config_dir is not None and Path(config_dir).absolute() != folder.absolute():  # there is one such option
        beside = [f"hydra.searchpath=[{quoted(f'file://{folder.absolute()}')}]"]
        folder = Path(config_dir)
    return shlex.join(["qat", "train", "--config-dir", str(folder), *overrides, f"quant={path.stem}", *beside])


def write(
    path: Path,
    policy: Policy,
    choice: Mapping[str, Pair],
    predicted: Mapping[str, float],
    other: Mapping[str, Any],
    command: str,
    training: str | None = None,
) -> None:
    """Writes one allocation.

    Args:
        path: The file.
        policy: The policy that the search started from; its rules come first.
        choice: The pair of each layer.
        predicted: Costs, which the report of a training run shows beside the actual ones.
        other: Further keys of the `quant` config that it started from.
        command: The command that made it, for the comment at the top.
        training: The command that trains it, `None` if it is that of the run which goes on.
    """
    content = {
        **with_bit_rules(policy.settings, choice),
        **other,
        "predicted": {k: _short(v) for k, v in predicted.items()},
    }
    training = training or f"{trained_by(path)} ..."
    head = f"# {command}\n# Train it with {training}; a rule of your own after these changes a layer.\n"
    with atomic(path) as temporary:
        text = yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True)
        temporary.write_text(head + text)


def _short(value: float) -> float | int:
    return int(value) if float(value).is_integer() else float(f"{value:.6g}")
