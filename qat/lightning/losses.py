"""The training loss of a module on batches that are kept, for looking at it again and again."""

from collections.abc import Iterator, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor, nn

from qat.errors import UserError
from qat.lightning.steps import CALIBRATION_SEED, Source, batch_size, batches, no_trace, precision, step_of, to_module

NEEDED = (
    "its training_step must return the loss (a tensor of one number, or a dict with one under 'loss'), to see how much "
    "quantization changes it"
)


class BatchLosses:
    """Runs a module's own `training_step` on the same batches each time it is called.

    Args:
        source: Makes the training dataloader.
        samples: How many samples to keep, in whole batches.
    """

    def __init__(self, source: Source, samples: int) -> None:
        with isolate_rng():
            torch.manual_seed(CALIBRATION_SEED)
            self.batches = list(batches(source, samples))

    def __call__(self, module: nn.Module) -> Iterator[tuple[Tensor, int]]:
        """The mean loss of each batch, with gradients if they are on, and its number of samples.

        Raises:
            UserError: if the step returns no loss, or optimizes by hand.
        """
        assert isinstance(module, pl.LightningModule)
        if not module.automatic_optimization:
            raise UserError(f"{type(module).__name__}: {NEEDED}; it optimizes by hand instead")
        for batch in self.batches:
            gradients = torch.is_grad_enabled()
            with no_trace(module), precision(module), torch.set_grad_enabled(gradients):
                loss = _loss(module, step_of(module, "training_step")(to_module(module, batch)))
            yield loss, batch_size(batch)


def _loss(module: pl.LightningModule, output: Any) -> Tensor:
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise UserError(f"{type(module).__name__}: {NEEDED}; it returned {type(output).__name__}")
    return loss
