"""Resuming to the same numbers: an epoch's randomness depends on the seed and the epoch alone, not on what ran before it.

Lightning restores weights, optimizers and loops, but not the state of random number generators. So every epoch starts from a seed of its own, and a run that was killed
and resumed at an epoch's end draws the same order of samples, augmentation and dropout as one that was not.
"""

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback


class SeedEpochs(Callback):
    """Seeds all generators at the start of every training epoch.

    Args:
        seed: The run's seed.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pl.seed_everything(self.seed + 1_000_003 * (trainer.current_epoch + 1) % 2**32, workers=False, verbose=False)
        loop = trainer.fit_loop
        # The first iterator of a run is made before this hook, and has drawn its seed already; the later ones are made after it.
        if (trainer.current_epoch == 0 or loop.epoch_loop.restarting) and loop._data_fetcher is not None:
            iter(loop._data_fetcher)
