"""qat: from a float LightningModule and one YAML file to a verified integer model.

Importing the package costs nothing: the public names below are loaded when first used (PEP 562), so that `qat --help`
and a misspelled option answer before torch has been found on the disk.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qat.adapters import merge_adapters
    from qat.errors import UserError
    from qat.grid.spec import QuantSpec
    from qat.insert import remove
    from qat.lightning.callback import QATCallback
    from qat.lightning.module import load_from_checkpoint
    from qat.lightning.weights import load_weights
    from qat.policies.policy import QuantPolicy
    from qat.quantizers.base import Quantizer

__version__ = "0.1.0"

# Public name -> the module that defines it; the TYPE_CHECKING block above tells editors and pyright the same.
_HOME = {
    "QATCallback": "qat.lightning.callback",
    "QuantPolicy": "qat.policies.policy",
    "QuantSpec": "qat.grid.spec",
    "Quantizer": "qat.quantizers.base",
    "UserError": "qat.errors",
    "load_from_checkpoint": "qat.lightning.module",
    "load_weights": "qat.lightning.weights",
    "merge_adapters": "qat.adapters",
    "remove": "qat.insert",
}

__all__ = [
    "QATCallback",
    "QuantPolicy",
    "QuantSpec",
    "Quantizer",
    "UserError",
    "__version__",
    "load_from_checkpoint",
    "load_weights",
    "merge_adapters",
    "remove",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'qat' has no attribute '{name}'")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value  # the next use finds it without this call
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
