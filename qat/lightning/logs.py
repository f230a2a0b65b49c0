"""Logging: scales and fit of quantizers while they train, and what W&B keeps of a finished run."""

import re
import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import WandbLogger

from qat.errors import UserError
from qat.insert import named_quantizers
from qat.measure.stats import weight_stats


class LogQuantizers(Callback):
    """Logs each grid's mean scale (`scale/<quantizer>`) and each weight's SQNR in decibels (`sqnr/<layer>`).

    Args:
        every_n_epochs: How often, counted in training epochs.
    """

    def __init__(self, every_n_epochs: int = 1) -> None:
        if every_n_epochs < 1:
            raise UserError(f"every_n_epochs={every_n_epochs}: must be at least 1")
        self.every_n_epochs = every_n_epochs

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if (trainer.current_epoch + 1) % self.every_n_epochs or not trainer.loggers or not trainer.is_global_zero:
            return
        values = {f"scale/{name}": q.scale.detach().mean().item() for name, q in named_quantizers(pl_module)}
        values |= {f"sqnr/{s.layer}": s.sqnr_db for s in weight_stats(pl_module) if s.sqnr_db is not None}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step - 1)  # as Lightning counts at an epoch's end


def log_results(loggers: list[Any], report: dict[str, Any], files: list[Path]) -> None:
    """Puts the final table and the layers into every W&B logger, and the exported files as an artifact."""
    for logger in loggers:
        if not isinstance(logger, WandbLogger):
            continue
        stages = report["stages"]
        columns = ["stage", *dict.fromkeys(key for values in stages.values() for key in values)]
        logger.log_table(
            "results", columns, [[name, *(values.get(c) for c in columns[1:])] for name, values in stages.items()]
        )
        if layers := report.get("layers"):
            columns = list(layers[0])
            logger.log_table("layers", columns, [[layer.get(c) for c in columns] for layer in layers])
        import wandb

        name = re.sub(r"[^\w.-]+", "-", report["name"])  # all that W&B allows
        artifact = wandb.Artifact(f"{name}-export", type="model", metadata={"metric": stages})
        for path in files:
            artifact.add_file(str(path))
        logger.experiment.log_artifact(artifact)


def close_wandb() -> None:
    """Closes the W&B run, if there is one, so that the next run of this process does not continue it."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.run.finish()
