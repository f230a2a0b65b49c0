"""From a module to a program of `torch.export`, whatever its forward's signature is, and its submodules are."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.proxy_tensor import _ModuleStackTracer

from qat.errors import UserError, first_line


class OneInput(nn.Module):
    """Gives every model the same signature (a quantized twin's forward takes `*args`)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input: Tensor) -> Tensor:
        return self.model(input)


@contextmanager
def own_modules() -> Iterator[None]:
    """While it lasts, torch.export shows a forward its own submodules.

    Of a model in which a module has two paths, as a grid with two readers has, torch shows proxies instead, made anew
    at each access, so that the graph has the path by which each call came. `layer is self.layers[0]` is false of them,
    and the forward takes another way than it does in torch.
    """
    never = property(lambda self: False, lambda self, value: None)
    with patch.object(_ModuleStackTracer, "enable_attr_proxy", never, create=True):
        yield


def traced(model: nn.Module, example: Tensor, max_batch: int | None = None) -> ExportedProgram:
    """The program of a model for batches of every size.

    Args:
        model: The model, whose forward takes one tensor `[N, ...]`; as `OneInput.model` in the program.
        example: An input of at least two samples.
        max_batch: The largest batch; any, if `None`.

    Raises:
        UserError: if it cannot be traced, with torch's reason.
    """
    shapes = ({0: Dim("batch", max=max_batch)},)
    with own_modules(), torch.no_grad():
        try:
            return torch.export.export(OneInput(model), (example,), dynamic_shapes=shapes)
        except Exception as error:  # whatever stops a tracer, its first line says it best
            reason = first_line(error.__cause__ or error)
            raise UserError(f"{type(model).__name__} cannot be traced: {reason}") from error
