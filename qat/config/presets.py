"""Policies by the names that `quant=NAME` has on the command line."""

from typing import Any

from hydra import compose, initialize_config_dir

from qat.config.configs import configs_dir, policy_settings
from qat.config.instantiate import VERSION
from qat.errors import UserError, nearest


def preset(name: str) -> dict[str, Any]:
    """The settings of the policy in `configs/quant/NAME.yaml`, with what that builds on.

    Raises:
        UserError: if there is none.
    """
    known = [path.stem for path in sorted((configs_dir() / "quant").glob("*.yaml"))]
    if name not in known:
        raise UserError(f"quant={name}: there is no such preset{nearest(name, known)}")
    with initialize_config_dir(str(configs_dir()), **VERSION):
        return policy_settings(compose("train", overrides=[f"quant={name}"]).quant)
