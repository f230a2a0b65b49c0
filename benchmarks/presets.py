"""The quantization settings that `qat train` would compose, without a run."""

from typing import Any

from hydra import compose, initialize_config_dir

from qat.config.configs import configs_dir, policy_settings
from qat.config.instantiate import VERSION
from qat.policies.policy import QuantPolicy


def settings(*overrides: str) -> dict[str, Any]:
    """`quant` of a command line, without what is no part of a policy."""
    with initialize_config_dir(str(configs_dir()), **VERSION):
        cfg = compose("train", overrides=list(overrides))
    return policy_settings(cfg.quant)


def policy(preset: str, *overrides: str) -> QuantPolicy:
    """A preset as `qat train quant=<preset>` reads it."""
    return QuantPolicy.from_dict(settings(f"quant={preset}", *overrides))
