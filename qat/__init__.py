"""qat: from a float LightningModule and one YAML file to a verified integer model.

Importing the package costs nothing: the public names below are loaded when first used (PEP 562), so that `qat --help`
and a misspelled option answer before torch has been found on the disk.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qat.errors import UserError, nearest

__version__ = "0.1.0"

# Public name -> the module that defines it; the TYPE_CHECKING block above tells editors and pyright the same.
_HOME = {
    "UserError": "qat.errors",
    "nearest": "qat.errors",
}

__all__ = ["__version__", "UserError", "nearest"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'qat' has no attribute '{name}'")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value  # the next use finds it without this call
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
