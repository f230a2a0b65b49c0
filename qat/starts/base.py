"""Base class of starts: what one may do and when, and what starts share."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from qat.insert import named_quantizers
from qat.planning.plan import Plan

Run = Callable[[], Any]
"""Calls the model on calibration batches, in evaluation mode."""


class Start:
    """Overrides one of the two."""

    def prepare(self, model: nn.Module, run: Run) -> None:
        """Changes the float model before quantizers are inserted; `run` passes one batch."""

    def refine(self, model: nn.Module, run: Run, plan: Plan) -> None:
        """Changes the quantized model after calibration; `run` passes all calibration batches."""


@contextmanager
def in_float(model: nn.Module) -> Iterator[None]:
    """All quantizers are off meanwhile."""
    were_on = [q for _, q in named_quantizers(model) if q.enabled]
    for quantizer in were_on:
        quantizer.enable(False)
    try:
        yield
    finally:
        for quantizer in were_on:
            quantizer.enable()


def replay(model: nn.Module, run: Run) -> Run:
    """A function that passes the same batches every time, even where the loader draws others.

    It calls the model as `run` does now; if `run` calls only parts of it, it is `run` itself.
    """
    calls: list[tuple[Any, Any]] = []
    with model.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True):
        run()

    def again() -> None:
        for args, kwargs in calls:
            model(*args, **kwargs)

    return again if calls else run
