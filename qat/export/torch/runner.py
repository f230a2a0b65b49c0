"""Formats that torch itself runs: a module in the place of a runtime."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from qat.errors import first_line
from qat.export.target import unrunnable


class TorchRunner:
    """A module that was loaded from a file.

    Args:
        model: The module, in evaluation mode.
        path: The file that it came from.
        layers: The layers whose weights are quantized.
    """

    def __init__(self, model: nn.Module, path: Path, layers: Sequence[str]) -> None:
        self.model, self.path, self.layers = model, path, layers

    @torch.no_grad()
    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Runs one batch.

        Raises:
            UserError: if the file does not take such a batch.
        """
        try:
            return self.model(torch.from_numpy(x)).numpy()
        except (RuntimeError, ValueError, IndexError, AssertionError) as error:
            raise unrunnable(self.path, x, first_line(error)) from None

    @torch.no_grad()
    def answer(self, *args: Any, **kwargs: Any) -> Any:
        """The module's outputs, for one that takes or returns more than one tensor."""
        return self.model(*args, **kwargs)

    def float_layers(self) -> list[str] | None:
        """All of them: torch computes in float what the codes stand for."""
        return list(self.layers)

    @torch.no_grad()
    def layer_outputs(self, x: np.ndarray, only: str | None = None) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}

        def keep(name: str) -> Callable[..., None]:
            return lambda module, args, output: found.__setitem__(name, output.numpy())

        handles = [
            self.model.get_submodule(name).register_forward_hook(keep(name))
            for name in self.layers
            if only in (None, name)
        ]
        try:
            self.model(torch.from_numpy(x))
        finally:
            for handle in handles:
                handle.remove()
        return found
