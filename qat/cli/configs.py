"""Where the YAML files are, and which keys a composed config may have.

A checkout keeps them in `configs/` beside the package; the wheel carries the same folder as `qat/configs`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError

from qat.errors import UserError, nearest


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
            (`???`) that nobody gave, and for an interpolation that leads nowhere.
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
