"""The training half of an image classifier; a subclass adds layers and `forward`.

Nothing here knows of quantization: these models are ordinary LightningModules, as yours is, and are quantized from
outside. Hyperparameters are plain scalars, because a checkpoint that holds anything else does not load with
`weights_only=True`.

Schedule: with T optimizer steps in all and W = floor(warmup * T), the learning rate at step t is

    lr * (t + 1) / W                                 for t < W
    lr * (1 + cos(pi * (t - W) / (T - W))) / 2       afterwards     (Loshchilov and Hutter, SGDR, eq. 5, no restarts)

It moves every step, not every epoch, so that a fine-tuning of one or two epochs also ends at zero.
"""

import math
from functools import partial
from typing import TypedDict

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

from qat.errors import UserError, nearest, require

OPTIMIZERS = ("sgd", "adamw")

Batch = tuple[Tensor, Tensor]  # x: [N, C, H, W] float, y: [N] int64


class Training(TypedDict, total=False):
    """The hyperparameters that every subclass passes on to `Classifier`, which documents them."""

    optimizer: str
    lr: float
    weight_decay: float
    momentum: float
    warmup: float


class Classifier(pl.LightningModule):
    """Cross entropy, accuracy, and SGD or AdamW under a cosine schedule.

    Args:
        num_classes: width of the logits.
        optimizer: "sgd" (Nesterov, when `momentum` is positive) or "adamw".
        lr: peak learning rate.
        weight_decay: L2 penalty for "sgd", decoupled decay for "adamw"; on all parameters.
        momentum: momentum of "sgd", beta1 of "adamw".
        warmup: fraction of all optimizer steps during which the learning rate rises linearly.

    Raises:
        UserError: a hyperparameter is out of its range.

    Logs per epoch `train/loss`, `val/loss`, `val/acc`, `test/loss`, `test/acc`.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        optimizer: str = "sgd",
        lr: float = 0.1,
        weight_decay: float = 1e-4,
        momentum: float = 0.9,
        warmup: float = 0.0,
    ) -> None:
        super().__init__()
        if optimizer not in OPTIMIZERS:
            raise UserError(f"optimizer={optimizer!r} is unknown" + nearest(optimizer, OPTIMIZERS))
        require("num_classes", num_classes, num_classes >= 2, "at least 2")
        require("lr", lr, 0 < lr < math.inf, "a positive number")
        require("weight_decay", weight_decay, 0 <= weight_decay < math.inf, "zero or more")
        require("momentum", momentum, 0 <= momentum < 1, "a number in [0, 1)")
        require("warmup", warmup, 0 <= warmup < 1, "a fraction in [0, 1)")
        self.save_hyperparameters()  # also collects the subclass's arguments
        self.val_acc = MulticlassAccuracy(num_classes, average="micro")
        self.test_acc = MulticlassAccuracy(num_classes, average="micro")

    def check_input(self, x: Tensor) -> None:
        """Called by every step: a subclass raises a UserError where x [N, C, H, W] does not fit its first layer."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Returns the mean cross entropy of the batch, in nats."""
        loss, _, y = self._step(batch)
        self.log("train/loss", loss, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(y))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Logs `val/loss` and `val/acc`."""
        loss, logits, y = self._step(batch)
        self.val_acc(logits, y)
        self.log("val/loss", loss, sync_dist=True, batch_size=len(y))
        self.log("val/acc", self.val_acc, prog_bar=True, batch_size=len(y))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Logs `test/loss` and `test/acc`."""
        loss, logits, y = self._step(batch)
        self.test_acc(logits, y)
        self.log("test/loss", loss, sync_dist=True, batch_size=len(y))
        self.log("test/acc", self.test_acc, batch_size=len(y))

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Returns the logits [N, num_classes]."""
        x, _ = batch
        self.check_input(x)
        return self(x)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The optimizer over all parameters, and the per-step cosine schedule."""
        hp, steps = self.hparams, self.trainer.estimated_stepping_batches
        if math.isinf(steps):
            raise UserError("the cosine schedule needs an end: set trainer.max_epochs or trainer.max_steps")
        if hp["optimizer"] == "sgd":
            optimizer: torch.optim.Optimizer = torch.optim.SGD(
                self.parameters(),
                lr=hp["lr"],
                weight_decay=hp["weight_decay"],
                momentum=hp["momentum"],
                nesterov=hp["momentum"] > 0,
            )
        else:
            optimizer = torch.optim.AdamW(
                self.parameters(), lr=hp["lr"], weight_decay=hp["weight_decay"], betas=(hp["momentum"], 0.999)
            )
        # A LambdaLR, not a SequentialLR: parameter groups can still be added to its optimizer after it was built.
        factor = partial(cosine_factor, total=int(steps), warmup=int(hp["warmup"] * steps))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _step(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        x, y = batch
        self.check_input(x)
        if not self.training and int(y.max()) >= self.hparams["num_classes"]:  # the metrics look at the labels, too
            raise UserError(
                f"model.num_classes={self.hparams['num_classes']}, but the data has the label {int(y.max())}"
            )
        logits = self(x)
        return F.cross_entropy(logits, y), logits, y


def cosine_factor(step: int, *, total: int, warmup: int) -> float:
    """Multiplier of the learning rate at `step` of `total`, of which the first `warmup` rise linearly."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return (1 + math.cos(math.pi * progress)) / 2


def check_channels(x: Tensor, in_channels: int) -> None:
    """Raises a UserError unless x is a batch of images [N, in_channels, H, W]."""
    if x.dim() != 4:
        raise UserError(f"expected a batch of images [N, C, H, W], got the shape {list(x.shape)}")
    if x.shape[1] != in_channels:
        raise UserError(
            f"model.in_channels={in_channels}, but the data's images have {x.shape[1]}; "
            f"set model.in_channels={x.shape[1]}"
        )
