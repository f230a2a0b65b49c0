"""The twin of a sequence that holds a ReLU between two layers: in training it has the grid behind the ReLU round in the
same pass over memory (`qat.kernels.rectified`), and does not call the ReLU.

In a sequence nobody but the next layer reads what a ReLU returns. Where somebody looks after all (a hook on one of the
three, or on saved tensors), where compilers are at work, and where kernels are not compiled, modules are called in turn
as ever.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qat.kernels.dispatch import compiled
from qat.kernels.launch import PLAIN
from qat.kernels.recipes import mark
from qat.kernels.rectified import behind, is_rectifier
from qat.layers.hooks import innermost_hooks, looked_at
from qat.layers.modules import QuantConv1d, QuantConv2d, QuantConv3d, QuantLinear
from qat.layers.rounded import is_plain
from qat.layers.sites import SiteOwner, others_see
from qat.layers.twin import Inserted, original_class, ours
from qat.quantizers import Quantizer

READERS = (QuantLinear, QuantConv1d, QuantConv2d, QuantConv3d)
PRODUCERS = {
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm),
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
}
"""They return a tensor of its own that nobody else holds."""
CALLS = nn.Sequential.forward, nn.Module.__call__, nn.Module._call_impl
"""Functions that calling a sequence comes down to."""
OWN = {"forward", "fake_quantize", "grid", "transform"}
"""Methods that somebody may have replaced in an instance."""


class QuantSequential(Inserted):
    """See the module's docstring."""

    training: bool

    def forward(self, input: Any) -> Any:
        if not self._rounds():
            return super().forward(input)  # pyright: ignore[reportAttributeAccessIssue]
        this: Any = self
        steps = list(_flat(this))
        for before, module, after in zip([None, *steps], steps, [*steps[1:], None], strict=False):
            grid = _grid(before, module, after, input)
            input = module(input) if grid is None else _rounded(module, grid, input)
        return input

    def _rounds(self) -> bool:
        if not (self.training and torch.is_grad_enabled()) or torch.compiler.is_dynamo_compiling():
            return False
        return innermost_hooks() is None and not torch._C._are_functorch_transforms_active() and not others_see()


def rounds_within(module: nn.Module) -> bool:
    """Whether it is a sequence with a ReLU between two layers, the second of which has a grid."""
    if not _is_sequence(module) or isinstance(module, SiteOwner):
        return False
    steps = list(_flat(module))
    return any(_is_place(*three) for three in zip(steps, steps[1:], steps[2:], strict=False))


def _is_sequence(module: nn.Module) -> bool:
    if not isinstance(module, nn.Sequential):
        return False
    own = original_class(module)
    return (own.forward, own.__call__, own._call_impl) == CALLS


def _flat(sequence: Any) -> Iterator[Any]:
    """The steps of a sequence, those of sequences in it in their place."""
    for module in sequence:
        if _is_sequence(module) and not isinstance(module, SiteOwner) and _is_untouched(module):
            yield from _flat(module)
        else:
            yield module


def _is_place(before: nn.Module | None, module: nn.Module, after: nn.Module | None) -> bool:
    if not is_rectifier(module) or before is None or not isinstance(after, READERS):
        return False
    return original_class(before) in PRODUCERS and isinstance(after.input_quantizer, Quantizer)


def _grid(before: nn.Module | None, module: nn.Module, after: Any, x: Any) -> Quantizer | None:
    """The grid that `x` is put on instead of calling `module`, if that is a ReLU and the grid does nothing else."""
    if not _is_place(before, module, after) or type(x) not in PLAIN or not (x.requires_grad and compiled(x)):
        return None
    grid = after.input_quantizer
    plain = is_plain(type(grid)) and not (grid.follows or grid.dithers or grid.reshapes)
    alone = grid.readers == 1 and all(map(_is_untouched, (before, module, after, grid)))  # pyright: ignore[reportArgumentType]
    return grid if grid.on and plain and alone else None


def _is_untouched(module: nn.Module) -> bool:
    """Whether calling it does what its class says and nobody looks."""
    return not (looked_at(module) or OWN & module.__dict__.keys() or module._compiled_call_impl)


def _rounded(rectifier: nn.Module, quantizer: Any, x: Tensor) -> Tensor:
    """`quantizer(rectifier(x))`, which the quantizer will let pass."""
    with ours():
        y = quantizer.fake_quantize(x, *quantizer.grid(x), behind(type(rectifier), quantizer.gradient))
        mark(y, quantizer)
    return y
