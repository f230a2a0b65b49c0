"""Callbacks that average weights (`WeightAveraging`, `EMAWeightAveraging`, `StochasticWeightAveraging`) keep a second
copy of the module; its quantizers have to follow.

Scales average as weights do. Three things do not:

    structure        the copy may be made before quantizers are inserted; parameters are paired by order, so it would
                     average scales into weights
    first ranges     the copy is made before calibration, and is evaluated before its first update
    integers, flags  the mean of zero points is truncated, and drifts by one with every update; of flags there is none.
                     The copy takes those of the model in training
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import get_swa_multi_avg_fn

from qat.insert import named_quantizers

AVERAGING = (StochasticWeightAveraging, WeightAveraging)


def _averages(trainer: pl.Trainer) -> Iterator[nn.Module]:
    for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(callback, AVERAGING) and callback._average_model is not None:
            yield callback._average_model


def follow_insertion(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Gives a copy that was made of the float module the module's quantizers."""
    for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(callback, StochasticWeightAveraging) and callback._average_model is not None:
            callback._average_model = copy.deepcopy(module)


@torch.no_grad()
def follow_calibration(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Gives every copy the module's ranges."""
    for average in _averages(trainer):
        for mine, theirs in _pairs(module, average):
            theirs.copy_(mine)


def average_floats_alone(trainer: pl.Trainer) -> None:
    """Makes every copy take integers and flags from the model that it averages."""
    for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
        average = callback._average_model if isinstance(callback, WeightAveraging) else None
        if average is not None and average.avg_fn is None:
            average.multi_avg_fn = _many(average.multi_avg_fn or get_swa_multi_avg_fn())
        elif average is not None and average.avg_fn is not None:
            average.avg_fn = _one(average.avg_fn)


def _one(mean: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda average, new, count: mean(average, new, count) if average.is_floating_point() else new


def _many(mean: Callable[..., Any]) -> Callable[..., None]:
    def update(averages: list[Tensor], new: list[Tensor], count: Tensor) -> None:
        if averages[0].is_floating_point():  # torch hands over tensors of one type at a time
            mean(averages, new, count)
        else:
            for average, value in zip(averages, new, strict=True):
                average.copy_(value)

    return update


def _pairs(module: nn.Module, average: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    for (_, mine), (_, theirs) in zip(named_quantizers(module), named_quantizers(average), strict=True):
        yield from zip(mine.state_dict().values(), theirs.state_dict().values(), strict=True)
