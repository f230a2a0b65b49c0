"""Freezing what still moves late in training, so that the weights can settle on grids and statistics that stay.

Ranges that follow the data jitter with every batch, and so do BatchNorm's batch statistics, which evaluation and export
replace by the running ones. Both are customarily frozen for the last part of training (Krishnamoorthi, arXiv
1806.08342, section 3.2; Jacob et al., CVPR 2018, section 3).
"""

from typing import Any

import pytorch_lightning as pl
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from qat.layers import original_class
from qat.lightning.base import QuantizationCallback
from qat.lightning.schedules.moments import check_moment, check_reached, reached
from qat.quantizers.minmax import MinMax


def batch_norms(model: nn.Module, who: QuantizationCallback) -> list[_BatchNorm]:
    """The BatchNorms that keep running statistics.

    Raises:
        UserError: if there are none, in the name of the callback `who`.
    """
    found = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not found:
        raise who.mistake(
            f"{original_class(model).__name__} has no BatchNorm with running statistics; leave the callback out"
        )
    return found


class FreezeRanges(QuantizationCallback):
    """Stops the ranges that follow the data (`minmax`) and, if asked, the learned scales, until training ends: another
    one of the module begins with ranges that move.

    Args:
        at: When: a share of training (a float below 1) or a number of epochs (an int).
        scales: Whether learned scales (and offsets) stop, too: optimizers then skip them, momentum and weight decay
            included.

    Raises:
        UserError: (when training starts) if there is nothing to stop, or if training ends before.
    """

    def __init__(self, at: float = 0.5, scales: bool = False) -> None:
        check_moment("at", at)
        self.at, self.scales = at, scales
        self._frozen: list[MinMax] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        found = self.quantizers(pl_module).values()
        self._trackers = [q for q in found if isinstance(q, MinMax)]
        self._learned = [p for q in found for p in q.parameters()] if self.scales else []

    def check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        check_reached(trainer, self, "at", self.at)
        found = self.quantizers(pl_module).values()
        if not any(isinstance(q, MinMax) or (self.scales and list(q.parameters())) for q in found):
            hint = "" if self.scales else "; scales: true stops those that are learned"
            raise self.mistake(f"no quantizer's range follows the data, so there is nothing to stop{hint}")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._trackers and reached(trainer, self.at):
            for quantizer in self._trackers:
                quantizer.tracking.fill_(False)
            self._frozen, self._trackers = self._trackers, []

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self._learned and reached(trainer, self.at):
            for parameter in self._learned:
                parameter.grad = None  # requires_grad=False would let DDP wait for its gradient

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Too early: averages may still put the buffers of their copy in the place of the module's."""

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.release()

    def release(self) -> None:
        for quantizer in self._frozen:
            quantizer.tracking.fill_(True)
        self._frozen = []


class FreezeBatchNorm(QuantizationCallback):
    """Keeps BatchNorms in evaluation mode until training ends: they normalize by their running statistics, which no
    longer change; gamma and beta still learn.

    Those that fold into the layer before them then also add the rounding error of the folded bias, as they do in
    evaluation (`qat.layers.accumulator`).

    Freeze them when the learning rate is already low: by their running statistics they no longer cancel the size of the
    weights before them, and a step that was safe until then can make training diverge, in float as well.

    Args:
        at: When: a share of training (a float below 1) or a number of epochs (an int).

    Raises:
        UserError: (when training starts) if there is no BatchNorm, or if training ends before.
    """

    def __init__(self, at: float = 0.8) -> None:
        check_moment("at", at)
        self.at = at
        self._frozen: set[_BatchNorm] = set()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._norms = batch_norms(pl_module, self)

    def check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        check_reached(trainer, self, "at", self.at)
        batch_norms(pl_module, self)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if reached(trainer, self.at):
            self._frozen.update(norm for norm in self._norms if norm.training)  # not those that the user has frozen
            for norm in self._norms:  # at every batch, because anybody may call train() in between
                norm.eval()

    def release(self) -> None:
        for norm in self._frozen:
            norm.train()
        self._frozen = set()
