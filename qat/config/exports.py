"""Export targets by name (`target=onnx`) and by file (`model.onnx`): every YAML in `configs/export` that builds one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from qat.config.configs import configs_dir
from qat.config.instantiate import instantiate
from qat.errors import UserError, first_line, nearest
from qat.export.manifest import made_by


def _configs() -> dict[str, Any]:
    found = {path.stem: OmegaConf.load(path) for path in sorted((configs_dir() / "export").glob("*.yaml"))}
    return {name: cfg for name, cfg in found.items() if "_target_" in cfg}


def split(arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """Separates paths, which may have a `=` in their names if they exist, from `key=value` settings."""
    paths = [text for text in arguments if "=" not in text or Path(text).exists()]
    return paths, dict(text.split("=", 1) for text in arguments if text not in paths)


def parsed(settings: Mapping[str, str]) -> DictConfig:
    """Settings with dots in their keys as a config, their values read as on a command line.

    Raises:
        UserError: if a value is no YAML.
    """
    cfg = OmegaConf.create()
    for key, value in settings.items():
        try:
            cfg.merge_with_dotlist([f"{key}={value}"])
        except YAMLError:
            raise UserError(f"{key}={value}: this is no value; quotes make any text one") from None
    return cfg


def target_named(name: str, settings: dict[str, str]) -> Any:
    """The target of `configs/export/NAME.yaml`, with settings of its own changed.

    Raises:
        UserError: for an unknown name or setting, or a package that is not installed.
    """
    configs = _configs()
    if name not in configs:
        raise UserError(f"target={name}: there is no such target{nearest(name, configs)}")
    cfg = configs[name]
    for key in settings:
        if key not in cfg or key.startswith("_"):
            raise UserError(f"target={name} has no setting '{key}'{nearest(key, [str(k) for k in cfg if k[0] != '_'])}")
    try:
        changed = OmegaConf.merge(cfg, parsed(settings))
    except OmegaConfBaseException as error:
        raise UserError(f"target={name}: {first_line(error)}") from None
    return instantiate(changed)


def of_file(path: Path, settings: dict[str, str]) -> Any:
    """The target that writes files like `path`; where several do, the one that its manifest names.

    Raises:
        UserError: if none does, and see `target_named`.
    """
    classes = {name: get_class(cfg["_target_"]) for name, cfg in _configs().items()}
    owners = [name for name, cls in classes.items() if cls.owns(path)]  # pyright: ignore[reportAttributeAccessIssue]
    if owners:
        maker = made_by(path)
        return target_named(next((name for name in owners if classes[name].__name__ == maker), owners[0]), settings)
    known = ", ".join(dict.fromkeys(cls.file for cls in classes.values()))  # pyright: ignore[reportAttributeAccessIssue]
    raise UserError(f"{path}: no target writes such a file (they write {known})")


def moved(path: str) -> str:
    """Where the class of a target is now, whose module may have been another when `path` was written down. It keeps its
    name, by which manifests have it, too.
    """
    now = {written.rpartition(".")[2]: written for written in (cfg["_target_"] for cfg in _configs().values())}
    return now.get(path.rpartition(".")[2], path) if path.startswith("qat.") else path
