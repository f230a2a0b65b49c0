"""Where the YAML files are, and which keys a composed config may have.

A checkout keeps them in `configs/` beside the package; the wheel carries the same folder as `qat/configs`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError

from qat.cli.typecheck import accepts, in_words, literals
from qat.errors import UserError, nearest

# Keys that no `_target_` takes, and so no signature describes.
TYPES: dict[str, Any] = {
    "name": str,
    "seed": int,
    "ckpt": str | None,
    "float_ckpt": str | None,
    "cache_dir": str | None,
    "metric": str,
    "mode": Literal["max", "min"],
    "float_epochs": int,
    "float_model": dict | None,
    "quant.calibration_samples": int,
    "quant.scale_lr": float | None,
    "quant.predicted": dict[str, float] | None,
    "quant.module": str | None,
}


def configs_dir() -> Path:
    """The absolute folder of the shipped YAML files, in a wheel or in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside, beside = package / "configs", package.parent / "configs"
    return inside if inside.is_dir() else beside


def known_keys() -> list[str]:
    """The top-level keys that something reads: those written in train.yaml and its config groups."""
    main = OmegaConf.to_container(OmegaConf.load(configs_dir() / "train.yaml"), resolve=False)
    assert isinstance(main, dict)
    groups = [name for entry in main.pop("defaults") if isinstance(entry, dict) for name in entry]
    return [str(key) for key in dict.fromkeys([*main, *groups]) if key != "hydra"]


def dotted_keys(tree: Any, prefix: str = "") -> Iterator[str]:
    """All keys of a nested dict as they are written on the command line: `trainer`, `trainer.max_epochs`, ..."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield f"{prefix}{key}"
            yield from dotted_keys(value, f"{prefix}{key}.")


def finish(cfg: DictConfig, run_dir: Path) -> None:
    """Makes a composed config final, in place: `run_dir` is filled in, every interpolation is resolved.

    Raises:
        UserError: for a top-level key that nothing reads (`+key=...` adds what it is told), for a mandatory value
            (`???`) that nobody gave, for an interpolation that leads nowhere, and for a value of the wrong type.
    """
    known = known_keys()
    for key in cfg:
        if key not in known:
            raise UserError(f"config key '{key}' is read by nothing{nearest(str(key), known)}")
    cfg.run_dir = str(run_dir)
    for key in dotted_keys(OmegaConf.to_container(cfg, resolve=False)):  # OmegaConf.resolve would not tell which
        try:
            OmegaConf.select(cfg, key)
        except InterpolationResolutionError as error:
            raise UserError(f"config key '{key}': {str(error).splitlines()[0]}") from error
    OmegaConf.resolve(cfg)
    if missing := sorted(OmegaConf.missing_keys(cfg)):
        raise UserError(f"config key '{missing[0]}' needs a value: {missing[0]}=...")
    for key, hint in TYPES.items():
        _check_type(key, hint, OmegaConf.select(cfg, key))
    if not 0 <= cfg.seed < 2**32:
        raise UserError(f"seed={cfg.seed}: must be between 0 and {2**32 - 1}")
    if cfg.float_epochs < 1:
        raise UserError(f"float_epochs={cfg.float_epochs}: must be at least 1")


def _check_type(key: str, hint: Any, value: Any) -> None:
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value)
    if not accepts(hint, value):
        options = [option for option in literals(hint) if isinstance(option, str)]
        close = nearest(value, options) if isinstance(value, str) and options else ""
        raise UserError(f"{key}={value!r}: must be {in_words(hint)}{close}")
