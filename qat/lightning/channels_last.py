"""Channels last: the memory format that convolutions are fastest in, on CPUs with matrix instructions and on GPUs with
tensor cores.

Only the order in memory changes, not shapes, keys or results. Weights are enough: a convolution answers in the format
of its weight, and what follows, quantizers included, keeps the format of what it is given.
"""

import pytorch_lightning as pl
import torch

from qat.lightning.base import QuantizationCallback


class ChannelsLast(QuantizationCallback):
    """Puts the module's four-dimensional parameters and buffers in channels-last order when fit starts.

    Raises:
        UserError: (when fit starts) if there is none.
    """

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.check(trainer, pl_module)
        pl_module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not any(parameter.ndim == 4 for parameter in pl_module.parameters()):
            raise self.mistake(
                f"{type(pl_module).__name__} has no parameter of four dimensions (a two-dimensional "
                "convolution's weight), so the memory format would change nothing; leave the callback out"
            )
