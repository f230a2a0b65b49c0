"""Policies by the names that `quant=NAME` has on the command line."""

from typing import Any

from qat.config.configs import composed, configs_dir, policy_settings
from qat.errors import UserError, nearest


def preset(name: str) -> dict[str, Any]:
    """The settings of the policy in `configs/quant/NAME.yaml`, with what that builds on.

    Raises:
        UserError: if there is none.
    """
    known = [path.stem for path in sorted((configs_dir() / "quant").glob("*.yaml"))]
    if name not in known:
        raise UserError(f"quant={name}: there is no such preset{nearest(name, known)}")
    return policy_settings(composed([f"quant={name}"]).quant)
