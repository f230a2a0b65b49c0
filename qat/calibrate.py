"""Calibration: one look at data gives every quantizer its first range.

All activation quantizers observe the float model at once (they pass values through while observing), weights are read where they lie.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from qat.errors import UserError
from qat.insert import named_quantizers
from qat.layers import QuantizedLayer
from qat.modes import evaluating


def needs_calibration(model: nn.Module) -> bool:
    return any(not q.initialised for _, q in named_quantizers(model))


@torch.no_grad()
def calibrate(model: nn.Module, run: Callable[[], Any]) -> None:
    """Sets every range from the weights and from what `run()` lets pass.

    Args:
        model: A model with quantizers.
        run: Calls the model on calibration batches.

    Raises:
        UserError: naming the quantizer that saw nothing, or saw NaN or infinity.
    """
    found = list(named_quantizers(model))
    for _, quantizer in found:
        quantizer.observe()
    try:
        with evaluating(model):
            run()
        done: set[nn.Module] = set()
        for layer in model.modules():
            if (
                isinstance(layer, QuantizedLayer)
                and layer.weight_quantizer is not None
                and layer.weight_quantizer not in done
            ):
                layer.weight_quantizer.calibrate(layer.weight)
                done.add(layer.weight_quantizer)
        for name, quantizer in found:
            if quantizer not in done:
                _finish(name, quantizer)
    finally:
        for _, quantizer in found:
            quantizer.observe(False)


def _finish(name: str, quantizer: Any) -> None:
    try:
        quantizer.calibrate()
    except UserError as error:
        raise UserError(f"calibrating '{name}': {error}") from None
