"""Trying a `training_step` that optimizes by hand: everything runs but the optimization.

Such a step fetches its optimizers, steps them and calls `manual_backward`; here the optimizers stand still.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import pytorch_lightning as pl
from pytorch_lightning.core.optimizer import _configure_optimizers

from qat.errors import UserError


class Idle:
    """An optimizer (or scheduler) that shows its settings and does nothing."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        pass

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        return closure() if callable(closure) else None

    def toggle_model(self, *args: Any, **kwargs: Any) -> Any:
        return nullcontext()


def dry_run(module: pl.LightningModule, step: Callable[[], Any]) -> None:
    """Runs `step()`, a call of the module's `training_step`, without effect on parameters or optimizers.

    Raises:
        UserError: if it needs gradients all the same.
    """
    configured: Any = module.configure_optimizers()
    optimizers, schedulers, _ = _configure_optimizers(configured)
    stand_ins: dict[str, Any] = {
        "optimizers": lambda use_pl_optimizer=True: _one_or_all([Idle(o) for o in optimizers]),
        "lr_schedulers": lambda: _one_or_all([Idle(s["scheduler"]) for s in schedulers]) if schedulers else None,
    }
    for name in ("manual_backward", "toggle_optimizer", "untoggle_optimizer", "clip_gradients", "log"):
        stand_ins[name] = lambda *args, **kwargs: None
    with patch.dict(module.__dict__, stand_ins):
        try:
            step()
        except RuntimeError as error:
            if "does not require grad" not in str(error):
                raise
            raise UserError(
                f"{type(module).__name__}.training_step optimizes by hand and needs gradients ({error}), so it cannot "
                "be tried out to find what runs; give the module a validation_step that calls its networks"
            ) from error


def _one_or_all(items: list[Any]) -> Any:
    return items[0] if len(items) == 1 else items
