"""Saving for backward what a quantized tensor was made of, instead of the quantized tensor.

A convolution saves its input and its weight. Quantized, those are copies that exist for nobody else, while what they
were made of is kept anyway: by the quantizer's own backward, and by the layer before. Making them again in backward
costs one pass over memory and brings the memory of a training step back to that of the float model.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from qat.kernels import Made


class sources(saved_tensors_hooks):  # noqa: N801 - used as a context, like torch's
    """Context for an operation on `tensors`: those that a quantizer has made are saved as their recipe.

    What else the operation saves is saved as ever, and so is everything where another hook is in place (activation
    checkpointing, offloading): only the innermost hook sees a tensor.
    """

    def __init__(self, *tensors: Tensor) -> None:
        made: dict[int, Made] = {t.data_ptr(): t.made for t in tensors if hasattr(t, "made")}  # pyright: ignore[reportAttributeAccessIssue]
        # Not a method of this object, which would keep itself, and the activations, alive until Python collects cycles.
        super().__init__(partial(_pack, made), _unpack)

    def __enter__(self) -> None:
        self.idle = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None  # pyright: ignore
        if not self.idle:
            super().__enter__()

    def __exit__(self, *args: object) -> None:
        if not self.idle:
            super().__exit__(*args)


def _pack(made: dict[int, Made], tensor: Tensor) -> Any:
    source = made.get(tensor.data_ptr())
    if source is None or tensor.numel() != source.tensors[0].numel():
        return tensor
    return source, tensor.shape, tensor.stride()


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    made, shape, stride = packed
    with torch.no_grad():
        return made.again().as_strided(shape, stride)
