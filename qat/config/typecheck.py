"""Checking that a value of the config is what its annotation says."""

from typing import Any

from omegaconf import OmegaConf

from qat.annotations import ANYTHING, accepts, in_words, literals
from qat.errors import UserError, nearest


def check_type(key: str, hint: Any, value: Any, wanted: str = "must be") -> None:
    """Raises unless a value, a node of a config or a plain one, fits an annotation. `wanted` comes before the types.

    Raises:
        UserError: with the options of a Literal that are nearest.
    """
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value, resolve=True)
    if not accepts(hint, _known(value)):
        options = [option for option in literals(hint) if isinstance(option, str)]
        close = nearest(value, options) if isinstance(value, str) and options else ""
        raise UserError(f"{key}={value!r}: {wanted} {in_words(hint)}{close}")


def _known(value: Any) -> Any:
    """A plain value without the nodes that are not built yet."""
    if isinstance(value, dict):
        return ANYTHING if "_target_" in value else {name: _known(item) for name, item in value.items()}
    return [_known(item) for item in value] if isinstance(value, list) else value
