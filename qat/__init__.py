"""qat: from a float LightningModule and one YAML file to a verified integer model.

Importing the package costs nothing: the public names below are loaded when first used (PEP 562), so that `qat --help`
and a misspelled option answer before torch has been found on the disk.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qat.adapters import merge_adapters
    from qat.by_hand import export_model, quantize, to_integers
    from qat.errors import UserError
    from qat.grid.spec import QuantSpec
    from qat.insert import plan_of, remove
    from qat.lightning.callback import QATCallback
    from qat.lightning.module import load_from_checkpoint
    from qat.lightning.scale_groups import own_groups
    from qat.lightning.weights import load_weights
    from qat.measure.stats import quantizer_stats
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
    "export_model": "qat.by_hand",
    "load_from_checkpoint": "qat.lightning.module",
    "load_weights": "qat.lightning.weights",
    "merge_adapters": "qat.adapters",
    "own_groups": "qat.lightning.scale_groups",
    "plan_of": "qat.insert",
    "quantize": "qat.by_hand",
    "quantizer_stats": "qat.measure.stats",
    "remove": "qat.insert",
    "to_integers": "qat.by_hand",
}

__all__ = [
    "QATCallback",
    "QuantPolicy",
    "QuantSpec",
    "Quantizer",
    "UserError",
    "__version__",
    "export_model",
    "load_from_checkpoint",
    "load_weights",
    "merge_adapters",
    "own_groups",
    "plan_of",
    "quantize",
    "quantizer_stats",
    "remove",
    "to_integers",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'qat' has no attribute '{name}'")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value  # the next use finds it without this call
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
