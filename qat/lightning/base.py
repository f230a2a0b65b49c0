"""Base class of the callbacks that do something to a quantized module while it trains, and how callbacks find each
other.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from torch import nn

from qat.errors import UserError
from qat.insert import named_quantizers
from qat.layers import original_class
from qat.quantizers import Quantizer

C = TypeVar("C", bound=Callback)


class QuantizationCallback(Callback):
    """Checks before it trains, and leaves the module as it would be without it, however training ends. Over several
    fits it remembers one module.
    """

    _module: pl.LightningModule | None = None

    def forget(self) -> None:
        """Drops everything that is of one module."""

    def check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finds what cannot be: called when training starts and, by `qat train`, before float training.

        Args:
            trainer: With the callbacks, limits and data that training will have.
            pl_module: The module, or a copy of it, with quantizers that may not be calibrated.

        Raises:
            UserError: a `mistake`, beginning with the argument.
        """

    def release(self) -> None:
        """Takes away what is on the module for training alone."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and self._module is not pl_module:  # a checkpoint's state is restored later
            self.forget()
            self._module = pl_module

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.check(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.release()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.release()

    def mistake(self, text: str) -> UserError:
        """An error in the name of this callback."""
        return UserError(text, by=type(self).__name__)

    @contextmanager
    def own_mistakes(self) -> Iterator[None]:
        """What helpers complain of meanwhile is this callback's."""
        try:
            yield
        except UserError as error:
            raise self.mistake(error.text) from None

    def quantizers(self, model: nn.Module) -> dict[str, Quantizer]:
        """All quantizers by name.

        Raises:
            UserError: if there are none.
        """
        found = dict(named_quantizers(model))
        if not found:
            raise self.mistake(
                f"{original_class(model).__name__} has no quantizers; "
                "QATCallback, which inserts them, must be among the callbacks"
            )
        return found


def callbacks_of(trainer: pl.Trainer, *kinds: type[C]) -> list[C]:
    """The trainer's callbacks of these kinds, in its order."""
    return [c for c in trainer.callbacks if isinstance(c, kinds)]  # pyright: ignore[reportAttributeAccessIssue]
