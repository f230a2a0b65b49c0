"""Saving for backward what a quantized tensor was made of, instead of the quantized tensor.

A convolution saves its input and its weight. Quantized, those are copies that exist for nobody else, while what they
were made of is kept anyway: by the quantizer's own backward, and by the layer before. Making them again in backward
costs one pass over memory and brings the memory of a training step back to that of the float model.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qat.kernels.recipes import Recipe, check_version
from qat.layers.hooks import innermost_hooks

_hooks: Any = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]
"""torch's stack of hooks on saved tensors, without the objects that `torch.autograd.graph` puts around it."""


def from_sources(tensors: Iterable[Tensor], function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """`function(*args, **kwargs)`, an operation on `tensors`: those that a quantizer has made are saved as their
    recipe.

    What else the operation saves is saved as ever, and so is everything where another hook is in place (activation
    checkpointing, offloading): only the innermost hook sees a tensor.
    """
    if innermost_hooks() is not None:
        return function(*args, **kwargs)
    made: dict[int, Recipe] = {}
    for tensor in tensors:
        if hasattr(tensor, "made") and tensor.made.own == tensor._version:  # pyright: ignore[reportAttributeAccessIssue]
            made[tensor.data_ptr()] = tensor.made  # pyright: ignore[reportAttributeAccessIssue]
    _hooks._push_saved_tensors_default_hooks(partial(_pack, made), _unpack)
    try:
        return function(*args, **kwargs)
    finally:
        _hooks._pop_saved_tensors_default_hooks()


def _pack(made: dict[int, Recipe], tensor: Tensor) -> Any:
    source = made.get(tensor.data_ptr())
    if source is None or tensor.numel() != source.tensors[0].numel():
        return tensor, tensor._version  # which torch does not check where a hook has seen the tensor
    return source, tensor.shape, tensor.stride()


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed[0], Tensor):
        check_version(*packed)
        return packed[0]
    made, shape, stride = packed
    with torch.no_grad():
        return made.again().as_strided(shape, stride)
