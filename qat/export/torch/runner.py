"""Formats that torch itself runs: a module in the place of a runtime."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

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

    def layer_outputs(self, x: np.ndarray, only: str | None = None) -> dict[str, np.ndarray]:
        return outputs_of(self.model, [name for name in self.layers if only in (None, name)], torch.from_numpy(x))


@torch.no_grad()
def outputs_of(model: nn.Module, names: Iterable[str], x: Tensor) -> dict[str, np.ndarray]:
    """What submodules return on one batch, by their names, in the order in which they are called."""
    found: dict[str, np.ndarray] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args, output: found.__setitem__(name, output.detach().numpy())

    with ExitStack() as hooks:
        for name in names:
            hooks.enter_context(model.get_submodule(name).register_forward_hook(keep(name)))
        model(x)
    return found
