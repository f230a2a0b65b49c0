"""Seeing a tensor of any shape as one that compiled kernels know: few axes, in the order it lies in memory."""

from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Shows kernels a tensor with as few axes as its scales allow, whatever its shape, in the order it lies in memory:
    `[N]` for one scale, `[rows, N]` for one of each row, `[N, rows, M]` where scales lie across it, as those of a
    transposed convolution's outputs do.

    So a kernel is compiled once for all shapes, channels_last costs no copy, and per-channel runs like per-tensor.

    Attributes:
        shape, strides: Shape and strides of the tensor; the strides are dense.
        view: The shape that kernels see. Axes with scales and axes without take turns.
        scaled: Which of its axes have a scale for each entry.
    """

    shape: torch.Size
    strides: tuple[int, ...]
    view: tuple[int, ...]
    scaled: tuple[bool, ...]

    @property
    def steps(self) -> tuple[int, ...]:
        """The strides of `view`."""
        return tuple(prod(self.view[axis + 1 :]) for axis in range(len(self.view)))

    def rows(self, x: Tensor) -> Tensor:
        """A tensor of this shape as kernels see it."""
        if x.stride() != self.strides:
            x = torch.empty_strided(self.shape, self.strides, dtype=x.dtype, device=x.device).copy_(x)
        return x.as_strided(self.view, self.steps)

    def per_row(self, parameter: Tensor) -> Tensor:
        """A parameter as kernels see it: numbers, or one for each scale, which broadcast against `view`."""
        each = [size if scaled else 1 for size, scaled in zip(self.view, self.scaled, strict=True)]
        return parameter.reshape(each if any(self.scaled) and parameter.numel() > 1 else -1).contiguous()


@lru_cache(4096)
def layout_of(shape: torch.Size, strides: tuple[int, ...], scale: torch.Size) -> Layout | None:
    """The layout of a tensor of this shape whose scale has the shape `scale`; `None` if each of its values has a scale
    of its own, or memory has scales in another order than theirs.
    """
    strides = _dense_strides(shape, strides)
    if scale.numel() == 1:
        return Layout(shape, strides, (shape.numel(),), (False,))
    if len(scale) != len(shape):
        return None
    axes = sorted((axis for axis, size in enumerate(shape) if size > 1), key=lambda axis: strides[axis], reverse=True)
    with_scales = [axis for axis in axes if scale[axis] != 1]
    if with_scales == axes or with_scales != sorted(with_scales):
        return None
    view: list[int] = []
    scaled: list[bool] = []
    for axis in axes:
        if scaled and scaled[-1] == (axis in with_scales):
            view[-1] *= shape[axis]
        else:
            view.append(shape[axis])
            scaled.append(axis in with_scales)
    return Layout(shape, strides, tuple(view), tuple(scaled))


def dense(x: Tensor) -> bool:
    """Whether `x` fills memory without gaps or overlaps."""
    return _dense_strides(x.shape, x.stride()) == x.stride()


@lru_cache(4096)
def _dense_strides(shape: torch.Size, strides: tuple[int, ...]) -> tuple[int, ...]:
    """`strides` if they fill memory without gaps or overlaps, else contiguous ones."""
    expected = 1
    for size, stride in sorted(zip(shape, strides, strict=True), key=lambda pair: (pair[1], pair[0])):
        if size > 1 and stride != expected:
            return torch.empty(shape, device="meta").stride()
        expected *= size
    return strides
