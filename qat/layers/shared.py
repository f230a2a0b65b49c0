"""One tensor, one grid, one rounding: readers that share a quantizer share what it made of a tensor.

A residual block's input is read by its first convolution and by its addition. Rounding it for each costs a pass over
memory there and another in backward, and a range that follows the data would move twice. So in training it is rounded
once.

What was made is kept while the forward of the owner that the readers belong to runs, until as many have read it as the
plan has readers of that grid. It is not shared across a change of hooks on saved tensors: a checkpointed part is run
again on its own and has to find the same operations. Compilers find common work themselves; they only have to be told
that a range has followed this tensor already.
"""

import threading
from typing import Any

import torch
from torch import Tensor, nn

from qat.layers.hooks import innermost_hooks

Kept = dict[tuple[int, int], tuple[Tensor, tuple[Any, ...], Tensor, int]]
"""By quantizer and tensor: the tensor, its state, what was made of it, and how many readers are left."""

Followed = list[tuple[nn.Module, Tensor]]
"""The quantizers whose range has followed a tensor, where a compiler is at work."""


class _Here(threading.local):
    """Roundings kept for each forward of an owner that runs in this thread, the innermost last."""

    def __init__(self) -> None:
        self.forwards: list[tuple[Kept, Followed]] = []


here = _Here()


def read(quantizer: nn.Module, x: Tensor) -> Tensor:
    """`quantizer(x)`, or what it returned to another reader of the same tensor in this forward.

    Args:
        quantizer: A `Quantizer`, or several in a row.
        x: What it reads.
    """
    forwards = here.forwards
    if not forwards:
        return quantizer(x)
    if isinstance(quantizer, nn.Sequential):
        for one in quantizer:
            x = read(one, x)
        return x
    readers = getattr(quantizer, "readers", 1)  # grids of a converted model do not count theirs
    if readers == 1 or not (quantizer.training and quantizer.on):  # what observes or measures sees every reader
        return quantizer(x)
    kept, followed = forwards[-1]
    if torch.compiler.is_compiling():
        known = any(other is quantizer and tensor is x for other, tensor in followed)
        followed.append((quantizer, x))
        return quantizer(x, follow=not known)
    if x.is_inference():  # it has no version
        return quantizer(x)
    key = id(quantizer), id(x)
    state = x._version, torch.is_grad_enabled(), innermost_hooks()
    known = kept.pop(key, None)
    if known is not None and known[1] == state:
        _, _, y, left = known
    else:
        y, left = quantizer(x), readers
    if left > 1:
        kept[key] = x, state, y, left - 1
    return y
