"""When a schedule acts: after a share of training (a float: `0.5`) or after so many epochs (an int: `3`).

Both are computed from Lightning's own counters, which checkpoints carry, so a resumed run acts at the same batch.
"""

import math

import pytorch_lightning as pl

from qat.errors import UserError
from qat.lightning.base import QuantizationCallback


def check_moment(name: str, at: float) -> None:
    """Raises a `UserError` if `at` is neither a share of training nor a number of epochs."""
    if isinstance(at, bool) or not (0 <= at < 1 if isinstance(at, float) else at >= 0):
        raise UserError(
            f"{name}={at}: must be a share of training from 0.0 up to, not including, 1.0, or a whole number of epochs"
        )


def check_reached(trainer: pl.Trainer, who: QuantizationCallback, name: str, at: float) -> None:
    """Raises a `UserError` if training ends before `at`, or has no end that a share could be taken of."""
    if isinstance(at, int):
        if trainer.max_epochs is not None and 0 <= trainer.max_epochs <= at:
            raise who.mistake(
                f"{name}={at}: training ends before, after max_epochs={trainer.max_epochs}; give an earlier epoch, or "
                "a share of training such as 0.5"
            )
    elif at > 0:
        check_ends(trainer, who, f"{name}={at}: is a share of training; give a whole number of epochs instead")


def check_ends(trainer: pl.Trainer, who: QuantizationCallback, instead: str) -> None:
    """Raises a `UserError` that says what to do `instead` if training goes on for ever."""
    if (trainer.max_epochs or -1) < 0 and trainer.max_steps < 0:
        raise who.mistake(f"{instead}, or set max_epochs: this trainer's training has no end")


def progress(trainer: pl.Trainer) -> float:
    """Share of training that is done, from 0 to 1; to be called while a batch is being processed."""
    shares = [0.0]
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        # 0 where nobody knows how many batches there will be.
        within = trainer.fit_loop.epoch_loop.batch_idx / trainer.num_training_batches
        shares.append((trainer.current_epoch + within) / trainer.max_epochs)
    if trainer.max_steps > 0:
        shares.append(trainer.global_step / trainer.max_steps)
    return min(max(shares), 1.0)


def reached(trainer: pl.Trainer, at: float) -> bool:
    """Whether training is as far as `at`; to be called while a batch is being processed."""
    return trainer.current_epoch >= at if isinstance(at, int) else progress(trainer) >= at


def cosine(start: float, end: float, share: float) -> float:
    """From `start` to `end` along half a cosine, as `share` goes from 0 to 1."""
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2
