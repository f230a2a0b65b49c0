"""Base class of callbacks that check their settings before training."""

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from qat.lightning.steps import Source


class Early(Callback):
    """Looks at the quantized module and the trainer's settings before anything is trained: `qat train` asks it to
    before float training, and whoever derives from it asks itself when training starts.
    """

    def check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, source: Source) -> None:
        """Finds what cannot be.

        Args:
            trainer: With the callbacks and limits that training will have.
            pl_module: The module, or a copy of it, with quantizers that may not be calibrated.
            source: The training data.

        Raises:
            UserError: beginning with the class's name, and then the argument.
        """
        raise NotImplementedError
