"""Callbacks that average weights (`WeightAveraging`, `EMAWeightAveraging`, `StochasticWeightAveraging`) keep a second
copy of the module; its quantizers have to follow.

Scales average as weights do. Four things do not:

    widths           where they change during training (`AnnealBits`, `LearnBits`), so do the units of scales and the
                     ends of the grid, of which there is no mean: the grids of the copies change with the module's
    structure        the copy may be made before quantizers are inserted; parameters are paired by order, so it would
                     average scales into weights
    first ranges     the copy is made before calibration, and is evaluated before its first update
    integers, flags  the mean of zero points is truncated, and drifts by one with every update; of flags there is none.
                     The copy takes those of the model in training
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_swa_multi_avg_fn

from qat.copies import copied
from qat.insert import named_quantizers
from qat.lightning.base import callbacks_of
from qat.quantizers import Quantizer

AVERAGING = (StochasticWeightAveraging, WeightAveraging)


def averages(trainer: pl.Trainer) -> Iterator[nn.Module]:
    """The copies of the module that averages are taken in, each like the module."""
    for callback in callbacks_of(trainer, *AVERAGING):
        if (made := callback._average_model) is not None:
            yield made.module if isinstance(made, AveragedModel) else made


def follow_insertion(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Gives a copy that was made of the float module the module's quantizers."""
    for callback in callbacks_of(trainer, StochasticWeightAveraging):
        if callback._average_model is not None:
            callback._average_model = copied(module)


@torch.no_grad()
def follow_calibration(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Gives every copy the module's ranges."""
    for average in averages(trainer):
        for mine, theirs in _pairs(module, average):
            for value, other in zip(mine.state_dict().values(), theirs.state_dict().values(), strict=True):
                other.copy_(value)


def follow_widths(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Gives every copy the module's widths, where a checkpoint has brought scales of such."""
    for average in averages(trainer):
        for mine, theirs in _pairs(module, average):
            if theirs.spec != mine.spec:
                theirs.change_spec(mine.spec, theirs.scale)


def average_floats_alone(trainer: pl.Trainer) -> None:
    """Makes every copy take integers and flags from the model that it averages."""
    for callback in callbacks_of(trainer, WeightAveraging):
        average = callback._average_model
        if average is not None and average.avg_fn is None:
            average.multi_avg_fn = _many(average.multi_avg_fn or get_swa_multi_avg_fn())
        elif average is not None and average.avg_fn is not None:
            average.avg_fn = _one(average.avg_fn)


def _one(mean: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def update(average: Tensor, new: Tensor, count: Tensor) -> Tensor:
        if not average.is_floating_point():
            return new
        found = mean(average, new, count)
        # The ends of a grid: of two equal numbers, 0.9 a + 0.1 a may be a third one.
        return torch.where(average == new, new, found) if average.numel() == 1 else found

    return update


def _many(mean: Callable[..., Any]) -> Callable[..., None]:
    def update(averages: list[Tensor], new: list[Tensor], count: Tensor) -> None:
        if averages[0].is_floating_point():  # torch hands over tensors of one type at a time
            mean(averages, new, count)
        else:
            for average, value in zip(averages, new, strict=True):
                average.copy_(value)

    return update


def _pairs(module: nn.Module, average: nn.Module) -> Iterator[tuple[Quantizer, Quantizer]]:
    for (_, mine), (_, theirs) in zip(named_quantizers(module), named_quantizers(average), strict=True):
        yield mine, theirs
