"""Re-estimating BatchNorm statistics after training.

Running statistics average over the last steps of training, in which a few oscillating weights change the output of
their channel from step to step. Averaged anew with the final weights they fit what is evaluated and exported (Nagel et
al., "Overcoming Oscillations in Quantization-Aware Training", ICML 2022, section 3.2).
"""

from itertools import islice
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn

from qat.errors import UserError
from qat.lightning.base import QuantizationCallback
from qat.lightning.schedules.freeze import batch_norms
from qat.lightning.steps import batches, no_trace, precision, step_of, to_module, trainer_source


class ReestimateBatchNorm(QuantizationCallback):
    """At the end of fit, replaces running statistics by the mean over training batches, of all processes, all else in
    evaluation mode.

    BatchNorms that the last training step met in evaluation mode (`FreezeBatchNorm`, or frozen by the user) keep their
    statistics, which the weights were trained against; a line says how many.

    Checkpoints written during training keep the statistics they were written with.

    Args:
        batches: How many training batches (all, if there are fewer).

    Raises:
        UserError: (when fit starts) if there is no BatchNorm with running statistics.
    """

    def __init__(self, batches: int = 50) -> None:
        if batches < 1:
            raise UserError(f"batches={batches}: must be at least 1")
        self.batches = batches
        self.forget()

    def forget(self) -> None:
        self._frozen: list[int] = []

    def state_dict(self) -> dict[str, Any]:
        return {"frozen": self._frozen}  # for a fit that resumes where no step is left

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._frozen = list(state_dict["frozen"])

    def check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        batch_norms(pl_module, self)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._norms = batch_norms(pl_module, self)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._frozen = [i for i, norm in enumerate(self._norms) if not norm.training]  # later, anybody may call train()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        norms = [norm for i, norm in enumerate(self._norms) if i not in self._frozen]
        if not norms:
            rank_zero_warn("ReestimateBatchNorm: every BatchNorm was frozen, so none was re-estimated; leave it out")
            return
        if self._frozen:
            rank_zero_info(f"ReestimateBatchNorm: left out {len(self._frozen)} BatchNorms that were frozen")
        momenta = [norm.momentum for norm in norms]
        step = step_of(pl_module)
        with no_trace(pl_module, moving=norms), precision(pl_module):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # the plain mean over all batches
                norm.train()
            for batch in islice(batches(trainer_source(trainer), 2**62), self.batches):
                step(to_module(pl_module, batch))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            for statistic in (norm.running_mean, norm.running_var):  # a user's sampler gives each process other batches
                assert statistic is not None
                statistic.copy_(trainer.strategy.reduce(statistic.clone(), reduce_op="mean"))
