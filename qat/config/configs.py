"""Where the YAML files are, and which keys a composed config may have.

A checkout keeps them in `configs/` beside the package; the wheel carries the same folder as `qat/configs`.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.initialize import get_gh_backup, restore_gh_from_backup
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException
from yaml import YAMLError

from qat.config.instantiate import VERSION
from qat.config.typecheck import check_type
from qat.errors import UserError, first_line, nearest
from qat.policies.renamed import renamed

# Keys that no `_target_` takes, and so no signature describes.
TYPES: dict[str, Any] = {
    "name": str,
    "seed": int,
    "ckpt": str | None,
    "float_ckpt": str | None,
    "cache_dir": str | None,
    "metric": str,
    "val_metric": str,
    "mode": Literal["max", "min"],
    "float_epochs": int,
    "float_model": dict | None,
    "quant.calibration_samples": int,
    "quant.scale_lr": float | None,
    "quant.predicted": dict[str, float] | None,
    "quant.module": str | None,
}
DIVISORS = ("accumulate_grad_batches", "check_val_every_n_epoch", "val_check_interval")
"""Settings that Lightning's trainer divides by without a check."""
REQUIRED = ("data", "model", "quant", "trainer")
"""Groups without which there is no run."""
REFERRED = ("val_metric",)
"""Keys that others take their value from, so that the config of a run is whole without: those of before lack them."""
OTHER_KEYS = tuple(key.removeprefix("quant.") for key in TYPES if key.startswith("quant."))
"""Keys of `quant` that are no settings of the policy."""


def configs_dir() -> Path:
    """The absolute folder of the shipped YAML files, in a wheel or in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside, beside = package / "configs", package.parent / "configs"
    return inside if inside.is_dir() else beside


def known_keys() -> list[str]:
    """The top-level keys that something reads: those written in train.yaml and its config groups."""
    return list(dict.fromkeys([*(key for key in _main() if key != "defaults"), *_groups()]))


def _groups() -> list[str]:
    """The config groups of a run; hydra's own settings are none."""
    return [name for entry in _main()["defaults"] if isinstance(entry, dict) for name in entry if name != "hydra"]


def _main() -> dict[str, Any]:
    main = OmegaConf.to_container(OmegaConf.load(configs_dir() / "train.yaml"), resolve=False)
    assert isinstance(main, dict)
    return {str(key): value for key, value in main.items()}


def composed(overrides: Sequence[str], config_dir: str | None = None, with_hydra: bool = False) -> DictConfig:
    """The config of a command line as Hydra composes it, interpolations and all; `finalize_config` makes it final.

    Args:
        overrides: the `key=value` arguments of the command line.
        config_dir: the user's own folder of YAML files (`--config-dir`), if any.
        with_hydra: whether Hydra's own settings are in it, too.
    """
    path = [f"hydra.searchpath=[file://{Path(config_dir).absolute()}]"] if config_dir else []
    overrides = [*group_overrides(overrides, config_dir), *path]
    outside = get_gh_backup()  # a program's own Hydra, in which `qat.quantize` may be called
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(configs_dir()), **VERSION):
            return compose("train", overrides=overrides, return_hydra_config=with_hydra)
    finally:
        restore_gh_from_backup(outside)


def group_overrides(overrides: Sequence[str], config_dir: str | None) -> list[str]:
    """Overrides as Hydra takes them: `group=null` leaves a group out, which Hydra itself knows as `group=[]`.

    Args:
        overrides: the `key=value` arguments of the command line.
        config_dir: the user's own folder of YAML files (`--config-dir`), if any.

    Raises:
        UserError: for a group that is set to a number or the like, which no option's name is.
    """
    roots = [configs_dir(), *([Path(config_dir)] if config_dir else [])]
    return [_group_override(text, roots) for text in overrides]


def _group_override(text: str, roots: list[Path]) -> str:
    key, _, value = text.partition("=")
    if text in ("~hydra", "hydra=null", "hydra=[]"):
        raise UserError(f"{text}: without it, run_dir would be read by nothing; hydra=default")
    group = key.lstrip("+").partition("@")[0]
    folders = [root / group for root in roots if (root / group).is_dir()]
    if key.startswith("~") or not folders:
        return text
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException:
        return text  # Hydra is about to say so itself
    if override.is_sweep_override() or isinstance(override.value(), (str, list, dict)):
        return text
    if override.value() is None:
        return f"{key.lstrip('+')}=[]"
    raise UserError(f"{text}: there is no such option{nearest(value, _options(folders))}")


def _options(folders: Sequence[Path]) -> list[str]:
    """The names that a group's folders offer."""
    return [path.stem for folder in folders for path in sorted(folder.glob("*.yaml"))]


def dotted_items(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All keys of a nested dict as they are written on the command line (`trainer`, `trainer.max_epochs`, ...), and
    what they hold.
    """
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield f"{prefix}{key}", value
            yield from dotted_items(value, f"{prefix}{key}.")


def policy_settings(quant: DictConfig) -> dict[str, Any]:
    """Settings of the policy in `quant`, without those of calibration and training."""
    settings = OmegaConf.to_container(quant, resolve=True)
    assert isinstance(settings, dict)
    return {str(key): value for key, value in settings.items() if key not in OTHER_KEYS}


def finalize_config(cfg: DictConfig, run_dir: Path) -> None:
    """Makes a composed config final, in place: `run_dir` is filled in, every interpolation is resolved, and groups that
    were left out are null.

    Raises:
        UserError: for a top-level key that nothing reads (`+key=...` adds what it is told), for a group that no run can
            do without, for a mandatory value (`???`) that nobody gave, for an interpolation that leads nowhere, and for
            a value of the wrong type.
    """
    known = known_keys()
    for key in cfg:
        if key not in known:
            raise UserError(f"config key '{key}' is read by nothing{nearest(str(key), known)}")
    for group in _groups():
        if cfg.get(group) is None:
            _leave_out(cfg, group)
    cfg.run_dir = str(run_dir)
    for key, _ in dotted_items(OmegaConf.to_container(cfg, resolve=False)):  # OmegaConf.resolve would not tell which
        try:
            OmegaConf.select(cfg, key)
        except InterpolationResolutionError as error:
            raise UserError(f"config key '{key}': {first_line(error)}") from error
    OmegaConf.resolve(cfg)
    if missing := sorted(OmegaConf.missing_keys(cfg)):
        raise UserError(f"config key '{missing[0]}' needs a value: {missing[0]}=...")
    for key, hint in TYPES.items():
        check_type(key, hint, OmegaConf.select(cfg, key))
    _check_direction(cfg)
    scale_lr = cfg.quant.get("scale_lr")
    for key, fits, expected in (
        ("seed", 0 <= cfg.seed < 2**32, f"between 0 and {2**32 - 1}"),
        ("float_epochs", cfg.float_epochs >= 1, "at least 1"),
        ("quant.calibration_samples", cfg.quant.calibration_samples >= 1, "at least 1"),
        ("quant.scale_lr", 0 <= (scale_lr or 0) < math.inf, "0 or more, or null to let the optimizer decide"),
        *((f"trainer.{key}", _divides(cfg.trainer.get(key)), "above 0") for key in DIVISORS),
    ):  # fmt: skip
        if not fits:
            raise UserError(f"{key}={OmegaConf.select(cfg, key)}: must be {expected}")


def trains(cfg: DictConfig) -> bool:
    """Whether a run has any quantization-aware training; else it is PTQ alone."""
    return 0 not in [cfg.trainer.get(key) for key in ("max_epochs", "max_steps", "limit_train_batches")]


def _check_direction(cfg: DictConfig) -> None:
    """Raises where `mode` was turned round for the metric alone: the worst checkpoint would pass for the best."""
    if not trains(cfg) or not any(cfg.quant.get(key) for key in ("weight", "act", "rules", "modules")):
        return  # nothing is chosen in validation
    default = _main()
    readers = [node for node in [*(cfg.callbacks or {}).values(), cfg.sweep] if isinstance(node, DictConfig)]
    read = any(node.get("monitor") == cfg.val_metric and node.get("mode", cfg.mode) == cfg.mode for node in readers)
    if read and cfg.mode != default["mode"] and cfg.val_metric == default["val_metric"]:
        raise UserError(
            f"val_metric={cfg.val_metric}: mode={cfg.mode} is said of it, too; name what the module logs in validation "
            f"for metric={cfg.metric}, such as val_metric=val/{cfg.metric.rpartition('/')[2]}"
        )


def _divides(value: Any) -> bool:
    return not isinstance(value, (int, float)) or value > 0


def read_yaml(path: Path) -> Any:
    """The containers in a file that Hydra wrote.

    Raises:
        UserError: if it is damaged.
    """
    try:
        return OmegaConf.create(path.read_text())
    except (ValueError, AssertionError, YAMLError, OmegaConfBaseException):  # no UTF-8, a lone number, no YAML
        raise UserError(f"{path}: is damaged: no YAML of a config") from None


def read_config(path: Path) -> DictConfig:
    """The `.hydra/config.yaml` of a run; as after `finalize_config`, groups that were left out are null; keys of
    `quant` have the names of today.

    Raises:
        UserError: if it is damaged: no YAML, or without a key that every run has.
    """
    cfg, groups = read_yaml(path), _groups()
    for key in known_keys():
        whole = isinstance(cfg, DictConfig) and (key in groups or key in REFERRED or key in cfg)
        if not whole or (key in REQUIRED and not isinstance(cfg.get(key), DictConfig)):
            raise UserError(f"{path}: is damaged: lacks '{key}'")
    for group in groups:
        if cfg.get(group) is None:
            _leave_out(cfg, group)
    cfg.quant = renamed(OmegaConf.to_container(cfg.quant, resolve=False))  # pyright: ignore[reportArgumentType]
    return cfg


def _leave_out(cfg: DictConfig, group: str) -> None:
    if group in REQUIRED:
        off = " (quant=off leaves everything float)" if group == "quant" else ""
        raise UserError(
            f"config group '{group}' is left out, and there is no run without it{off}"
            f"{nearest('', _options([configs_dir() / group]))}"
        )
    OmegaConf.update(cfg, group, None, force_add=True)
