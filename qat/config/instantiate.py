"""From a config node with `_target_` to an object, with every mistake in the node found before anything is called.

Hydra calls the target with whatever keys the node has; a typo then surfaces as a TypeError from the depths, or, where
the target takes `**kwargs`, never. Here the node is first held against the target's signature: unknown keys, missing
ones and values of the wrong simple type are reported under the key that the user wrote. A config also names code to
run, so only packages in `allowed_roots` may be named (Hydra 1.4 asks for such a list; 1.3 has none).
"""

import os
import pkgutil
import re
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType
from typing import Any, TypeVar

import hydra
from hydra.errors import InstantiationException
from omegaconf import DictConfig, ListConfig, OmegaConf

from qat.config.signature import Signature
from qat.config.typecheck import check_type
from qat.errors import UserError, nearest

HYDRA_1_4 = tuple(int(part) for part in hydra.__version__.split(".")[:2]) >= (1, 4)
VERSION: dict[str, Any] = {} if HYDRA_1_4 else {"version_base": "1.3"}
"""Arguments for composing: Hydra 1.3 warns without `version_base`, 1.4 warns with it."""
ROOTS = ("qat", "torch", "torchmetrics", "pytorch_lightning", "optuna")
# Where names of the packages above may really live: Lightning re-exports from these two.
HOMES = ("lightning_fabric", "lightning_utilities")
T = TypeVar("T")
_FULL_KEY = "\nfull_key: "
RESERVED = ("_target_", "_partial_", "_args_", "_convert_", "_recursive_")


def allowed_roots() -> tuple[str, ...]:
    """The top-level packages that a `_target_` may name: `ROOTS`, and those in $QAT_TARGETS (separated by commas)."""
    own = (name.strip() for name in os.environ.get("QAT_TARGETS", "").split(","))
    return (*ROOTS, *(name for name in own if name))


def allowed_patterns() -> tuple[str, ...]:
    """`allowed_roots` in the form of Hydra 1.4's execution white list."""
    return tuple(f"{root}.*" for root in allowed_roots())


def instantiate(node: Any, **kwargs: Any) -> Any:
    """Builds the object that a config node describes, nested nodes included; containers become plain dicts and lists.

    Args:
        node: a DictConfig, ListConfig, dict or list ; without `_target_`, it comes back as a plain container.
        **kwargs: arguments from code, which take precedence over the node's keys.

    Raises:
        UserError: a `_target_` outside `allowed_roots` or not importable; a key that the target does not take or lacks;
            a value of another simple type than the annotation; a ValueError (a UserError is one), a missing package,
            Lightning's MisconfigurationException or a TypeError of its own classes from the constructor itself. Each
            begins with the full config key.
    """
    if not OmegaConf.is_config(node):
        node = OmegaConf.create(node)
    key = node._get_full_key(None)
    _check(node, key, kwargs)
    trust = {"_execution_whitelist_": allowed_patterns()} if HYDRA_1_4 else {}
    try:
        return hydra.utils.instantiate(node, _convert_="all", **kwargs, **trust)
    except Exception as error:
        # Hydra 1.3 wraps what the target raised; 1.4 lets it pass. Both add the node's key as the message's last line.
        cause = error.__cause__ if isinstance(error, InstantiationException) else error
        where = str(error).rpartition(_FULL_KEY)[2] if _FULL_KEY in str(error) else key
        at = OmegaConf.select(node, where.removeprefix(key).lstrip("."))
        if not _users(cause, at):
            raise
        said = str(cause).partition(_FULL_KEY)[0]
        raise UserError(under(where, said if isinstance(cause, UserError) else " ".join(said.split()), at)) from error


def build(cfg: Any, key: str, kind: type[T], **kwargs: Any) -> T:
    """`instantiate` of the node under a key, which must describe an object of one kind.

    Raises:
        UserError: if it has no `_target_`, if what it builds is something else, and see `instantiate`.
    """
    node = OmegaConf.select(cfg, key)
    if not isinstance(node, DictConfig) or "_target_" not in node:
        what = ", ".join(map(str, node)) if isinstance(node, DictConfig) else node
        raise UserError(f"{key}: has no _target_, so there is no {kind.__name__} for its {what}")
    made = instantiate(node, **kwargs)
    if not isinstance(made, kind):
        raise UserError(f"{key}._target_: '{node['_target_']}' makes no {kind.__name__}")
    return made


def _users(cause: BaseException | None, node: Any) -> bool:
    """Whether what a constructor raised is about its arguments."""
    if isinstance(cause, TypeError) and isinstance(node, DictConfig):
        return str(node.get("_target_")).startswith("pytorch_lightning.")  # it says so of values, too
    by_name = type(cause).__name__ == "MisconfigurationException"  # importing Lightning is not our business
    return by_name or isinstance(cause, (ValueError, ModuleNotFoundError))


def under(where: str, said: str, node: Any) -> str:
    """A constructor's message under the key that was written: `alpha=2: ...` as `callbacks.distill.alpha=2: ...`.

    Args:
        where: The key of the object's node.
        said: The message, perhaps beginning with one of its arguments.
        node: The config node.
    """
    if where and said.startswith((f"{where}.", f"{where}:")):
        return said
    name = re.match(r"(\w+)[.=:\[]", said)
    known = name is not None and isinstance(node, DictConfig) and name[1] in node
    return _join(where, said) if known or not where else f"{where}: {said}"


def _check(node: Any, key: str, kwargs: dict[str, Any]) -> None:
    for name, child in _children(node, key):
        _check(child, name, {})
    if isinstance(node, DictConfig) and not node._is_none() and "_target_" in node:
        _check_call(node, key, kwargs)


def _children(node: Any, key: str) -> Iterator[tuple[str, Any]]:
    """The child containers that Hydra would instantiate as well, each with its full key."""
    if isinstance(node, ListConfig) and not node._is_none():
        yield from ((f"{key}[{i}]", child) for i, child in enumerate(node))
    elif isinstance(node, DictConfig) and not node._is_none() and node.get("_recursive_", True):
        yield from ((_join(key, str(name)), node[name]) for name in node if not OmegaConf.is_missing(node, name))


def _check_call(node: DictConfig, key: str, kwargs: dict[str, Any]) -> None:
    target = locate(node["_target_"], _join(key, "_target_"))
    signature = Signature.of(target)
    given = [str(name) for name in node if name not in RESERVED]
    for name in () if signature.any_other else (*given, *kwargs):
        if name not in signature.takes:
            hint = nearest(name, signature.takes)
            raise UserError(f"{_join(key, name)}: {_name(target)} has no parameter '{name}'{hint}")
    positional = signature.order[: len(node.get("_args_", ()))]
    for name in () if node.get("_partial_", False) else signature.required:
        if name not in (*given, *kwargs, *positional):
            raise UserError(f"{_join(key, name)}: missing; {_name(target)} cannot do without '{name}'")
    for name in given:
        if name in kwargs:
            continue
        full = _join(key, name)
        if OmegaConf.is_missing(node, name):
            raise UserError(f"{full}: needs a value: {full}=...")
        check_type(full, signature.hints.get(name, Any), node[name], f"{_name(target)} wants")


def locate(path: Any, key: str) -> Any:
    """The class or function that a `_target_` names.

    Args:
        path: the dotted name, `package.module.Name`.
        key: the config key it stands under, for messages.

    Raises:
        UserError: the package is not allowed, or the name does not exist (with the nearest one in its module).
    """
    if not isinstance(path, str) or not all(path.split(".")):
        raise UserError(f"{key}={path!r}: must be the dotted name of a class or function, package.module.Name")
    root, *rest = path.split(".")
    if root not in allowed_roots():
        raise UserError(
            f"{key}: '{path}' is outside the packages that a config may name ({', '.join(allowed_roots())}); "
            f"to trust it, set QAT_TARGETS={root}"
        )
    found = _import(root, key)
    if found is None:
        raise UserError(f"{key}: there is no package '{root}'; is it installed, in this folder or on PYTHONPATH?")
    done = root
    for part in rest:
        module, done = found, f"{done}.{part}"
        found = getattr(module, part, None)
        if found is None and isinstance(module, ModuleType):
            found = _import(done, key)
        if found is None:
            raise UserError(
                f"{key}: '{path}' does not exist: no '{part}' in {_name(module)}{nearest(part, _names(module))}"
            )
    home = getattr(found, "__module__", None) or root
    if not callable(found) or home.partition(".")[0] not in (*allowed_roots(), *HOMES):
        raise UserError(f"{key}: '{path}' is not a class or function of {', '.join(allowed_roots())}")
    return found


def _import(name: str, key: str) -> ModuleType | None:
    """The module, or None where there is none of that name."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            return None
        raise UserError(f"{key}: importing {name} needs the package '{error.name}', which is not installed") from error


def _names(module: Any) -> list[str]:
    below = [info.name for info in pkgutil.iter_modules(getattr(module, "__path__", []))]
    return [name for name in [*dir(module), *below] if not name.startswith("_")]


def _name(target: Any) -> str:
    return getattr(target, "__qualname__", None) or getattr(target, "__name__", None) or str(target)


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name
