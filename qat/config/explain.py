"""Turns Hydra's composition errors into one line with the nearest right key or option.

Hydra 1.3 answers a misspelled key with "to append to your config use +typo=1", which adds a key that nothing reads,
and an unknown option with the whole search path. What it knows (the key, the options) is in its exceptions; what it
does not say (the keys that exist) is found by composing the config once more without the offending override.
"""

import difflib
import re
import shlex
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from qat.config.configs import composed, configs_dir, dotted_items
from qat.config.instantiate import RESERVED, locate
from qat.config.overrides import key_of, quoted, value_of, written
from qat.config.signature import Signature
from qat.errors import UserError, nearest
from qat.policies.renamed import FORMERLY

COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, YAMLError)
_INTERNAL = ("full_key:", "object_type=", "reference_type=")


def explain(error: Exception, overrides: list[str], config_dir: str | None) -> UserError:
    """The one-line equivalent of an error that Hydra, OmegaConf or the YAML parser raised while composing.

    Args:
        error: what was raised.
        overrides: the `key=value` arguments of the command line.
        config_dir: the user's own folder of YAML files (`--config-dir`), if any.
    """
    text = " ".join(str(error).split())
    if isinstance(error, MarkedYAMLError) and (mark := error.problem_mark) is not None:
        what = ": ".join(said for said in (error.context, error.problem) if said)
        return UserError(f"{mark.name}, line {mark.line + 1}, column {mark.column + 1}: is no YAML: {what}")
    if isinstance(error, OverrideParseException):
        return UserError(f"cannot read the override '{error.override}': {_readable(error.override)}")
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        if group:
            return UserError(f"{group}={option}: there is no such option{nearest(option, error.options or [])}")
        return UserError(f"no config file '{option}'{nearest(option, error.options or [])}")
    if found := re.match(r"Could not (?:override|delete from config\.) '(?P<key>[^']+)'", text):
        key = found["key"]
        keys = _existing(key, overrides, config_dir)
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
        text = next((each for each in overrides if key_of(each) == key), key)
        return UserError(f"unknown config key '{key}'{_untold(text, keys) or _suggest(key, keys)}")
    found = re.match(r"Error merging override (?P<key>[^ =]+)=", text)
    if found and "Cannot merge DictConfig with ListConfig" in str(error.__cause__):
        return UserError(
            f"config key '{found['key']}' is a list, which no mapping can replace: write {found['key']}=[...]"
        )
    if found := re.match(r"(?:Ambiguous value for argument|Sweep parameters) '(?P<text>[^']+)'", text):
        key, _, value = found["text"].partition("=")
        return UserError(
            f"'{found['text']}' has several values: add -m to run each of them, or write {key}=[{value}] (a list) or "
            f"{_as_text(key, value)} (a text)"
        )
    return _in_one_line(error)


def _readable(override: str) -> str:
    """How to write what Hydra cannot read: a text with quotes of its own, if the key is right and that is all."""
    key, equals, value = override.partition("=")
    if equals and not value.startswith(("[", "{", "'", '"')) and value_of(f"{key}={quoted(value)}") == value:
        return f"its value needs quotes within those of the shell: {_as_text(key, value)}"
    return "write it as key=value, key=[a,b] or 'key={a: 1}'"


def _as_text(key: str, value: str) -> str:
    return shlex.quote(written(key, value))


def _in_one_line(error: BaseException) -> UserError:
    """Hydra's words and those of OmegaConf below it, without the lines on internal types; the key first where known."""
    key = getattr(error, "full_key", None)
    parts = [f"config key '{key}'"] if key else []
    for each in (error, error.__cause__):
        lines = [line.strip() for line in str(each or "").splitlines()]
        parts.append(" ".join(line for line in lines if line and not line.startswith(_INTERNAL)))
    return UserError(": ".join(part for part in parts if part))


def _choices(key: str, keys: Collection[str]) -> list[str]:
    """Choices that turn on the part which a key is a setting of: `distill=self` for `callbacks.distill.alpha`."""
    kind, _, rest = key.partition(".")
    name, dot, _ = rest.partition(".")
    if not dot or f"{kind}.{name}" in keys:
        return []
    folders = {"callbacks": ("callbacks", "distill"), "start": ("start",)}.get(kind, ())
    paths = [path for folder in folders for path in sorted((configs_dir() / folder).glob("*.yaml"))]
    return [f"{path.parent.name}={path.stem}" for path in paths if name in OmegaConf.load(path)]


def _untold(override: str, config: Mapping[str, Any]) -> str:
    """The hint for a setting that the class takes and its YAML leaves out; "" if there is a key like it, without a look
    at the class, which takes seconds to import.
    """
    parent, _, last = key_of(override).rpartition(".")
    beside = [name for name in _below(parent, config) if name not in RESERVED]
    if f"{parent}._target_" not in config or difflib.get_close_matches(last, beside, n=1, cutoff=0.6):
        return ""
    try:
        target = locate(config[f"{parent}._target_"], f"{parent}._target_")
    except UserError:
        return ""
    takes = Signature.of(target).takes
    if last in takes and not override.startswith("~"):
        return f"; {target.__name__} takes it and the YAML does not set it: +{override}"
    close = difflib.get_close_matches(last, takes, n=1, cutoff=0.6)
    return f"; did you mean '+{parent}.{close[0]}'?" if close else nearest(last, [*beside, *takes])


def _below(parent: str, keys: Iterable[str]) -> list[str]:
    """Names that stand directly under a key."""
    prefix = f"{parent}." if parent else ""
    return [name for key in keys if key.startswith(prefix) and "." not in (name := key.removeprefix(prefix))]


def _suggest(key: str, keys: Collection[str]) -> str:
    parent, _, last = key.rpartition(".")
    if parent == "quant":
        last = FORMERLY.get(last, last)
    if same := [other for other in keys if other.rpartition(".")[2] == last]:
        return "; did you mean " + " or ".join(f"'{other}'" for other in same[:2]) + "?"
    beside = _below(parent, keys)
    if not beside:  # the parent is misspelled, too
        return nearest(key, keys)
    prefix = f"{parent}." if parent else ""
    close = difflib.get_close_matches(last, beside, n=2, cutoff=0.6)
    return nearest(key, [prefix + name for name in close]) if close else nearest(last, beside)


def _existing(key: str, overrides: list[str], config_dir: str | None) -> dict[str, Any]:
    """The keys of the config without an override, and what they hold; further mistakes on the same command line are
    left out, one after the other.
    """
    roots = [configs_dir(), *([Path(config_dir)] if config_dir else [])]
    groups = [path.name for root in roots if root.is_dir() for path in sorted(root.iterdir()) if path.is_dir()]
    left = [text for text in overrides if key_of(text) != key]
    while True:
        try:
            cfg = composed(left, config_dir, with_hydra=key.startswith("hydra."))
        except COMPOSITION_ERRORS as error:
            if not left:
                return {}
            named = set(re.findall(r"(?<=')[^']+(?=')|(?<=override )[^ =]+", str(error)))
            fine = [text for text in left if key_of(text) not in named]
            choices = [text for text in left if key_of(text).partition("/")[0].partition("@")[0] in groups]
            left = next((fewer for fewer in (fine, choices) if len(fewer) < len(left)), [])
        else:
            found = dict(dotted_items(OmegaConf.to_container(cfg, resolve=False)))
            return found | {name: None for name in groups if name not in found}
