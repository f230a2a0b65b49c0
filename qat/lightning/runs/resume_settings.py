"""Settings that a resumed run has to keep: with others, it would give other numbers from there on."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from qat.config.configs import dotted_items
from qat.errors import UserError

SETTLED = ("seed", "metric", "float_epochs", "float_model", "model", "data")
"""Parts of a config that all stages have in common; how many epochs, and where, is for each run to say."""
INDIFFERENT = {"data.num_workers", "data.on_device"}


def settled(cfg: DictConfig) -> dict[str, Any]:
    """Settings that a resumed run has to keep, by dotted key; not the texts of `data`, which may say where it lies."""
    parts = OmegaConf.to_container(OmegaConf.masked_copy(cfg, list(SETTLED)), resolve=True)
    values = {key: value for key, value in dotted_items(parts) if not isinstance(value, dict)}
    if cfg.get("quant"):  # the rest of it is the policy, which the checkpoint knows
        values["quant.scale_lr"] = cfg.quant.get("scale_lr")
    free = {key for key, value in values.items() if key.startswith("data.") and isinstance(value, str)} | INDIFFERENT
    return {key: value for key, value in values.items() if key not in free}


def check_settled(now: dict[str, Any], before: dict[str, Any], folder: Path) -> None:
    """Compares what two configs of one run say.

    Raises:
        UserError: naming the first key that differs.
    """
    for key in before:
        if key in now and now[key] != before[key]:
            raise UserError(
                f"{key}={now[key]}: the run in {folder} has {key}={before[key]}, which a resumed one keeps; leave it "
                "out, or start another run"
            )
