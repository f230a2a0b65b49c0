"""Calibration: one look at data gives every quantizer its first range.

All activation quantizers observe the float model at once (they pass values through while observing), weights are read
where they lie.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import UserError
from qat.insert import named_quantizers
from qat.layers import QuantizedLayer, Site
from qat.modes import evaluating
from qat.quantizers import Quantizer


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
        with evaluating(model), _naming(found):
            run()
        readers = [m for m in model.modules() if isinstance(m, QuantizedLayer | Site)]
        weights = {m.weight_quantizer: _whole(m.weight) for m in readers if m.weight_quantizer is not None}
        for name, quantizer in found:
            with _named(name):
                quantizer.calibrate(weights.get(quantizer))
    finally:
        for _, quantizer in found:
            quantizer.observe(False)


def _whole(weight: Tensor) -> Tensor:
    """All of a weight of which this process may hold a shard (FSDP2's DTensor)."""
    return getattr(weight, "full_tensor", lambda: weight)()


@contextmanager
def _naming(found: list[tuple[str, Quantizer]]) -> Iterator[None]:
    """Puts the name of the quantizer in front of what it complains about meanwhile."""
    running: list[str] = []
    handles = []
    for name, quantizer in found:
        handles.append(quantizer.register_forward_pre_hook(lambda *_, name=name: running.append(name)))
        handles.append(quantizer.register_forward_hook(lambda *_: running.clear()))
    try:
        yield
    except UserError as error:
        raise UserError(f"calibrating '{running[-1]}': {error}" if running else str(error)) from None
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"calibrating '{name}': {error}") from None
