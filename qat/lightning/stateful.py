"""Callbacks that remember something of the module: given another one, they start anew."""

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback


class Stateful(Callback):
    """Remembers for one module, over several fits; a checkpoint's state is of the module that it is loaded into."""

    _module: pl.LightningModule | None = None

    def forget(self) -> None:
        """Drops everything that is of one module."""
        raise NotImplementedError

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and self._module is not pl_module:  # a checkpoint's state is restored later
            self.forget()
            self._module = pl_module
