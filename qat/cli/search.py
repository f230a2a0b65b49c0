"""`qat search packed=60kB [key=value ...]`: bits for every layer within a budget, from the config that training has.

Budgets are written like keys (`packed=60kB`, `avg_bits=4`); all other settings are those of `qat train`, and of
`search.*` (configs/search/default.yaml).
"""

import shlex
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from qat.cli.train import parse, quieten
from qat.config.configs import composed, configs_dir, finalize_config, known_keys
from qat.config.explain import COMPOSITION_ERRORS, explain
from qat.config.overrides import group_of, key_of
from qat.errors import UserError, nearest
from qat.measure.cost import COSTS

GROUP = "search"
USAGE = """usage: qat {command} {budget}[key=value ...]

{what}

{costs}settings (search.KEY=VALUE; all keys of `qat train` as well):

{settings}"""


def main(argv: list[str], command: str = "search") -> int:
    """Runs `qat search`, or `qat sensitivity`, which stops before choosing."""
    args = parse(argv)
    if args.help:
        print(_help(command))
        return 0
    overrides, budgets = [], []
    for text in args.overrides:
        (budgets if key_of(text) in COSTS else overrides).append(text)
    if budgets and command != "search":
        raise UserError(f"{budgets[0]}: `qat {command}` only measures; budgets are for `qat search`")
    overrides += [f"++search.budget.{text}" for text in budgets]
    _check_names(overrides)
    cfg = _compose(overrides, args.config_dir)
    finalize_config(cfg, Path("search"))
    if not (cfg.search and "_target_" in cfg.search):
        raise UserError(
            f"config group 'search' is left out, and there is no `qat {command}` without it: search=default"
        )
    from qat.lightning.runs.search import folder_of, search  # imports torch

    folder = folder_of(cfg)
    OmegaConf.update(cfg, "run_dir", str(folder))
    if args.cfg:
        print(OmegaConf.to_yaml(cfg))
        return 0
    for logger in ("pytorch_lightning", "lightning_fabric", "lightning"):  # their own handlers: Hydra makes none here
        quieten(logger)
    typed = shlex.join(["qat", command, *argv])
    search(cfg, folder, typed, _of_training(overrides), args.config_dir, only_measure=command != "search")
    return 0


def _of_training(overrides: list[str]) -> list[str]:
    """What a search and the training after it are both given: not its own settings, nor the `quant` that it writes."""
    return [text for text in overrides if group_of(text) not in (GROUP, "quant", "run_dir")]


def _check_names(overrides: list[str]) -> None:
    """A word that is neither a cost nor a key was probably meant as a cost."""
    keys = known_keys()
    for text in overrides:
        if group_of(text) not in (*keys, "hydra"):
            key = key_of(text)
            raise UserError(f"'{key}' is neither a cost nor a config key{nearest(key, [*COSTS, *keys])} "
                            f"(costs: {', '.join(COSTS)})")  # fmt: skip


def _compose(overrides: list[str], config_dir: str | None) -> DictConfig:
    chosen = [] if any(key_of(text) == GROUP for text in overrides) else [f"{GROUP}=default"]
    try:
        return composed([*chosen, *overrides], config_dir)
    except COMPOSITION_ERRORS as error:
        raise explain(error, overrides, config_dir) from error


def _help(command: str) -> str:
    costs = "".join(f"  {name:<10}{kind.what}{kind.note}\n" for name, kind in COSTS.items())
    settings = (configs_dir() / GROUP / "default.yaml").read_text().splitlines()
    what = "How much each width of each weight and each layer's input hurts: a table, sensitivity.json and a picture."
    if command == "search":
        what = (__doc__ or "").partition("\n\n")[0]
    return USAGE.format(
        command=command, budget="COST=LIMIT " if command == "search" else "", what=what,
        costs=f"costs:\n\n{costs}\n" if command == "search" else "",
        settings="\n".join(f"  {line}" for line in settings if not line.startswith(("#", "_target_"))),
    )  # fmt: skip
