"""The quantization settings that `qat train` would compose, without a run."""

from typing import Any

from qat.config.configs import composed, policy_settings
from qat.policies.policy import QuantPolicy


def settings(*overrides: str) -> dict[str, Any]:
    """`quant` of a command line, without what is no part of a policy."""
    return policy_settings(composed(overrides).quant)


def policy(preset: str, *overrides: str) -> QuantPolicy:
    """A preset as `qat train quant=<preset>` reads it."""
    return QuantPolicy.from_dict(settings(f"quant={preset}", *overrides))
