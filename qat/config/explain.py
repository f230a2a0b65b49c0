"""Turns Hydra's composition errors into one line with the nearest right key or option.

Hydra 1.3 answers a misspelled key with "to append to your config use +typo=1", which adds a key that nothing reads,
and an unknown option with the whole search path. What it knows (the key, the options) is in its exceptions; what it
does not say (the keys that exist) is found by composing the config once more without the offending override.
"""

import difflib
import re
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from qat.config.configs import configs_dir, dotted_items
from qat.errors import UserError, nearest

COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, YAMLError)
_INTERNAL = ("full_key:", "object_type=", "reference_type=")


def explain(error: Exception, overrides: list[str], config_dir: str | None, version: dict[str, str]) -> UserError:
    """The one-line equivalent of an error that Hydra, OmegaConf or the YAML parser raised while composing.

    Args:
        error: what was raised.
        overrides: the `key=value` arguments of the command line.
        config_dir: the user's own folder of YAML files (`--config-dir`), if any.
        version: the `version_base` argument that this Hydra wants.
    """
    text = " ".join(str(error).split())
    if isinstance(error, MarkedYAMLError) and (mark := error.problem_mark) is not None:
        what = ": ".join(said for said in (error.context, error.problem) if said)
        return UserError(f"{mark.name}, line {mark.line + 1}, column {mark.column + 1}: is no YAML: {what}")
    if isinstance(error, OverrideParseException):
        return UserError(
            f"cannot read the override '{error.override}': write it as key=value, key=[a,b] or 'key={{a: 1}}'"
        )
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        if group:
            return UserError(f"{group}={option}: there is no such option{nearest(option, error.options or [])}")
        return UserError(f"no config file '{option}'{nearest(option, error.options or [])}")
    if found := re.match(r"Could not (?:override|delete from config\.) '(?P<key>[^']+)'", text):
        key = found["key"]
        keys = _existing_keys(key, overrides, config_dir, version)
        if text.startswith("Could not delete") and key in keys:
            return UserError(f"config key '{key}' is null already, and stays: there is nothing to delete")
        if any(other == key or other.startswith(f"{key}.") for other in keys):
            return UserError(
                f"config key '{key}': from here, a mapping changes values that are there and adds none; to replace it "
                f"as a whole, write '~{key}' '+{key}={{...}}'"
            )
        if choices := _choices(key, keys):
            kind, name, *_ = key.split(".")
            return UserError(f"{key}: no {kind.removesuffix('s')} '{name}' is on: {' or '.join(choices)}")
        return UserError(f"unknown config key '{key}'{_suggest(key, keys)}")
    found = re.match(r"Error merging override (?P<key>[^ =]+)=", text)
    if found and "Cannot merge DictConfig with ListConfig" in str(error.__cause__):
        return UserError(
            f"config key '{found['key']}' is a list, which no mapping can replace: write {found['key']}=[...]"
        )
    if found := re.match(r"(?:Ambiguous value for argument|Sweep parameters) '(?P<text>[^']+)'", text):
        key, _, value = found["text"].partition("=")
        return UserError(f"'{found['text']}' has several values: add -m to run each of them, or write {key}=[{value}]")
    return _in_one_line(error)


def _in_one_line(error: BaseException) -> UserError:
    """Hydra's words and those of OmegaConf below it, without the lines on internal types; the key first where known."""
    key = getattr(error, "full_key", None)
    parts = [f"config key '{key}'"] if key else []
    for each in (error, error.__cause__):
        lines = [line.strip() for line in str(each or "").splitlines()]
        parts.append(" ".join(line for line in lines if line and not line.startswith(_INTERNAL)))
    return UserError(": ".join(part for part in parts if part))


def _choices(key: str, keys: list[str]) -> list[str]:
    """Choices that turn on the part which a key is a setting of: `distill=self` for `callbacks.distill.alpha`."""
    kind, _, rest = key.partition(".")
    name, dot, _ = rest.partition(".")
    if not dot or f"{kind}.{name}" in keys:
        return []
    folders = {"callbacks": ("callbacks", "distill"), "start": ("start",)}.get(kind, ())
    paths = [path for folder in folders for path in sorted((configs_dir() / folder).glob("*.yaml"))]
    return [f"{path.parent.name}={path.stem}" for path in paths if name in OmegaConf.load(path)]


def _suggest(key: str, keys: list[str]) -> str:
    parent, _, last = key.rpartition(".")
    if same := [other for other in keys if other.rpartition(".")[2] == last]:
        return "; did you mean " + " or ".join(f"'{other}'" for other in same[:2]) + "?"
    prefix = f"{parent}." if parent else ""
    beside = [name for k in keys if k.startswith(prefix) and "." not in (name := k.removeprefix(prefix))]
    if not beside:  # the parent is misspelled, too
        return nearest(key, keys)
    close = difflib.get_close_matches(last, beside, n=2, cutoff=0.6)
    return nearest(key, [prefix + name for name in close]) if close else nearest(last, beside)


def _existing_keys(key: str, overrides: list[str], config_dir: str | None, version: dict[str, str]) -> list[str]:
    rest = [text for text in overrides if text.lstrip("+~").partition("=")[0] != key]
    search = [f"hydra.searchpath=[file://{Path(config_dir).absolute()}]"] if config_dir else []
    for attempt in (rest + search, search):
        GlobalHydra.instance().clear()
        try:
            with initialize_config_dir(str(configs_dir()), **version):
                cfg = compose("train", overrides=attempt, return_hydra_config=key.startswith("hydra."))
        except COMPOSITION_ERRORS:
            continue  # another mistake on the same command line; without overrides all is well
        groups = [path.name for path in configs_dir().iterdir() if path.is_dir()]
        return list(dict.fromkeys([*dict(dotted_items(OmegaConf.to_container(cfg, resolve=False))), *groups]))
    return []
