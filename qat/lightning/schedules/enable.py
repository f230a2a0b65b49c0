"""Quantizing weights and activations one after the other.

With few bits the first gradients of a model that is quantized all at once say little. Training with quantized weights
alone first, and activations after, gives each a network that works to start from (Zhuang et al., "Towards Effective
Low-bitwidth Convolutional Neural Networks", CVPR 2018, section 3.2).
"""

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_warn

from qat.lightning.base import QuantizationCallback
from qat.lightning.schedules.moments import check_moment, check_reached, reached


class GradualEnable(QuantizationCallback):
    """Switches quantizers on late: until then tensors pass as they are. Ranges are those calibrated at the start.

    Scales of quantizers that are off get no gradient; under DDP that needs `strategy=ddp_find_unused_parameters_true`.

    Args:
        weights_at: When weights start: after a share of training (a float below 1) or a number of epochs (an int).
        activations_at: The same for activations.

    Raises:
        UserError: (when training starts) if there are no quantizers, or if training ends before.
    """

    def __init__(self, weights_at: float = 0, activations_at: float = 0.25) -> None:
        check_moment("weights_at", weights_at)
        check_moment("activations_at", activations_at)
        self.weights_at, self.activations_at = weights_at, activations_at

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._quantizers = self.quantizers(pl_module).values()

    def check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        check_reached(trainer, self, "weights_at", self.weights_at)
        check_reached(trainer, self, "activations_at", self.activations_at)
        self.quantizers(pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        weights, activations = reached(trainer, self.weights_at), reached(trainer, self.activations_at)
        for quantizer in self._quantizers:
            wanted = weights if quantizer.is_weight else activations
            if quantizer.on != wanted:
                quantizer.enable(wanted)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if late := sum(not q.on for q in self._quantizers):
            rank_zero_warn(
                f"GradualEnable: training ended early, with {late} quantizers still off; those tensors stay float"
            )
