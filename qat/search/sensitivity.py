"""How much each grid hurts at each width, one at a time, everything else in float.

For a weight or an input `x` and what a grid of b bits makes of it, `fq(x)`, over a few batches:

    loss_increase    loss with this one grid on, less that of the float model
    mse              mean (x - fq(x))^2
    sqnr_db          10 log10(sum x^2 / sum (x - fq(x))^2)
    trace            of the loss's Hessian (see `qat.search.hessian`), once for all widths

Ranges are calibrated on the same batches, by the estimator that the policy names.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qat.calibrate import calibrated
from qat.errors import UserError
from qat.insert import named_quantizers
from qat.layers.chain import last_grid
from qat.measure.stats import Noise
from qat.modes import evaluating
from qat.search.hessian import traces
from qat.search.measured import Measured
from qat.search.space import Space

LARGEST = 1e9
"""Stands for a loss that is not finite: a width that is out of the question."""

Losses = Callable[[nn.Module], Iterator[tuple[Tensor, int]]]
"""Runs a copy of the model over the batches; for each the mean loss and the number of samples."""


def missing(space: Space, measured: Measured, probes: int) -> int:
    """How many measurements `measure` has to make."""
    widths = sum(not measured.has(t, b) for t in space.tensors for b in space.widths(t))
    return widths + _lacks_traces(space, measured, probes)


def _lacks_traces(space: Space, measured: Measured, probes: int) -> bool:
    """Whether one was not estimated yet, or from another number of probes."""
    return probes > 0 and any(measured.of(t).get("probes") != probes for t in space.tensors)


def measure(
    space: Space, measured: Measured, losses: Losses, probes: int = 8, step: Callable[[], Any] = lambda: None
) -> None:
    """Measures what `measured` lacks, saving it as it goes.

    Args:
        space: The layers and their choices; its model stays as it is.
        measured: The cache.
        losses: Runs the model.
        probes: Random vectors per batch for the Hessian's trace, which is estimated anew if it was with another number;
            0 leaves it out.
        step: Called after each measurement (a progress bar).

    Raises:
        UserError: if the float model's loss is not finite, or has no second derivative.
    """
    with evaluating(space.model):
        if measured.loss is None:
            measured.loss = mean_loss(space.model, losses)
            if not math.isfinite(measured.loss):
                raise UserError(f"the float model's loss is {measured.loss}: there is nothing to compare with")
        if _lacks_traces(space, measured, probes):
            for tensor, trace in traces(space.model, space.tensors, losses, probes).items():
                measured.of(tensor).update(trace=trace, probes=probes)
            measured.save()
            step()
        for bits in space.plans:
            wanted = [t for t in space.tensors if bits in space.widths(t) and not measured.has(t, bits)]
            if wanted:
                _measure_width(space, bits, wanted, measured, losses, step)
    measured.save()


@torch.no_grad()
def mean_loss(model: nn.Module, losses: Losses) -> float:
    """The mean over all samples."""
    pairs = [(float(loss), count) for loss, count in losses(model)]
    return sum(loss * count for loss, count in pairs) / sum(count for _, count in pairs)


@torch.no_grad()
def _measure_width(
    space: Space, bits: int, wanted: list[str], measured: Measured, losses: Losses, step: Callable[[], Any]
) -> None:
    model = calibrated(space.model, space.plans[bits], lambda model: mean_loss(model, losses))
    for _, quantizer in named_quantizers(model):
        quantizer.enable(False)
    with evaluating(model):
        for tensor in wanted:
            measured.of(tensor)["bits"][str(bits)] = _measure_one(space, model, tensor, measured.loss or 0.0, losses)
            measured.save(now=False)
            step()


def _measure_one(space: Space, model: nn.Module, tensor: str, float_loss: float, losses: Losses) -> dict[str, Any]:
    layer: Any = model.get_submodule(space.tensors[tensor][0])
    is_weight = tensor.endswith(".weight")
    quantizer, noise = layer.weight_quantizer if is_weight else last_grid(layer.input_quantizer), Noise()
    quantizer.enable()
    watching = None
    if is_weight:
        weight = layer.weight
        noise.compare(weight, quantizer(weight))
    else:
        watching = quantizer.register_forward_hook(lambda _, args, output: noise.compare(args[0], output))
    try:
        loss = mean_loss(model, losses)
    finally:
        if watching is not None:
            watching.remove()
        quantizer.enable(False)
    return {
        "loss_increase": loss - float_loss if math.isfinite(loss) else LARGEST,
        "mse": noise.noise / max(1, noise.total),
        "sqnr_db": noise.decibels,
    }
