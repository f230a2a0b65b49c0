"""Strategies that train in processes which end with fit (`ddp_spawn`, `ddp_fork`, `ddp_notebook`).

What a callback does to the module happens in those processes. Lightning gives the calling one their weights, by name,
and no callback is asked there: its module has none of the quantizers, and their scales find no place.
"""

import pytorch_lightning as pl
from pytorch_lightning.strategies.launchers import _MultiProcessingLauncher
from pytorch_lightning.utilities import rank_zero_warn

from qat.insert import remembered
from qat.layers.twin import original_class
from qat.planning.plan import Plan


def is_spawning(trainer: pl.Trainer) -> bool:
    """Whether a trainer trains in processes that end with fit."""
    return isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)


def tell_left_behind(trainer: pl.Trainer, module: pl.LightningModule, before: Plan | None) -> None:
    """At the end of fit: says where the trained model is, unless the calling process's module has its quantizers.

    Args:
        trainer: In the process that trained.
        module: What it trained.
        before: The plan that the module had when it came from the calling process.
    """
    if not is_spawning(trainer) or remembered(module) == before:
        return
    name, file = original_class(module).__name__, getattr(trainer.checkpoint_callback, "best_model_path", "")
    rank_zero_warn(
        f"{name} was quantized in a process that ends with fit; the one that called fit gets its weights without "
        "scales, and would calibrate them anew: go on there with "
        f"qat.load_from_checkpoint({name}, {repr(file) if file else 'a checkpoint of this training'})"
    )
