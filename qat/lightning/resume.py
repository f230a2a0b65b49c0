"""Resuming to the same numbers: an epoch's randomness depends on the seed and the epoch alone, not on what ran before
it.

Lightning restores weights, optimizers and loops, but not the state of random number generators. So every epoch starts
from a seed of its own, and a run that was killed and resumed from an epoch's end draws the same order of samples,
augmentation and dropout as one that was not. (A checkpoint from the middle of an epoch continues with other samples:
a plain dataloader cannot be wound forward.)
"""

import csv
import random
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import CSVLogger

PRIME = 1_000_003
"""Keeps the epochs' seeds of neighbouring runs (seed=0, seed=1, ...) apart."""


class SeedEpochs(Callback):
    """Seeds all generators at the start of every training epoch, each process of a distributed run with its own number.

    Args:
        seed: The run's seed.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._first = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._first = True

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Not pl.seed_everything: it would also change the seed that distributed samplers take from the environment.
        seed = (self.seed + PRIME * (trainer.current_epoch + 1) + trainer.global_rank) % 2**32
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        fetcher = trainer.fit_loop._data_fetcher
        # Lightning makes the first iterator of a run before this hook, and every later one after it.
        if self._first and fetcher is not None:
            iter(fetcher)
        self._first = False


def continue_csv(logger: CSVLogger, step: int) -> None:
    """Keeps what an interrupted run logged, where Lightning's logger would begin its file anew.

    Args:
        logger: A logger of the resumed run, before it logs anything.
        step: The global step to resume from. Rows from there on are dropped: they will be logged again.
    """
    path = Path(logger.log_dir) / "metrics.csv"
    if not path.is_file():
        return
    with path.open(newline="") as file:
        rows = [{key: text for key, text in row.items() if text} for row in csv.DictReader(file)]
    for row in rows:
        at = int(row.pop("step"))
        if at < step:
            logger.log_metrics(row, at)  # pyright: ignore[reportArgumentType] - text as it was, to the last digit
    logger.save()
