"""Seeing a tensor of any shape as one that compiled kernels know.

torch compiles for the number of axes, for strides and for what a view is of; kernels that always see `[N]` or
`[rows, N]` are compiled once.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Shows kernels a tensor as `[N]` (one scale) or `[rows, N]` (a scale for each), whatever its shape, in the order
    it lies in memory.

    So a kernel is compiled once for all shapes, channels_last costs no copy, and per-channel runs like per-tensor.
    Scales along other axes broadcast as they are.

    Attributes:
        shape, strides: Of the tensor; the strides are dense.
        view: The shape that kernels see, `None` for that of the tensor itself.
    """

    shape: torch.Size
    strides: tuple[int, ...]
    view: tuple[int, ...] | None

    def rows(self, x: Tensor) -> Tensor:
        if self.view is None:
            return x
        if x.stride() != self.strides:
            x = torch.empty_strided(self.shape, self.strides, dtype=x.dtype, device=x.device).copy_(x)
        return _alias(x, self.view, (self.view[1], 1) if len(self.view) == 2 else (1,))

    def per_row(self, parameter: Tensor) -> Tensor:
        count = parameter.numel()
        if self.view is None or (count == 1 and parameter.ndim == 1 and not parameter.requires_grad):
            return parameter
        rows = len(self.view) == 2 and count > 1
        return _alias(parameter.contiguous(), (count, 1) if rows else (count,), (1, 1) if rows else (1,))

    def all(self, tensors: tuple[Tensor, ...]) -> list[Tensor]:
        """`x, scale, low, high, *extra` as kernels see them."""
        return [self.rows(tensors[0]), *map(self.per_row, tensors[1:])]

    def restore(self, x: Tensor) -> Tensor:
        return x if self.view is None else _alias(x, self.shape, self.strides)


@lru_cache(4096)
def layout_of(shape: torch.Size, strides: tuple[int, ...], scale: torch.Size) -> Layout:
    """The layout of a tensor of this shape whose scale has the shape `scale`."""
    strides, count = _dense_strides(shape, strides), shape.numel()
    leading = next((d for d in range(len(scale), 0, -1) if scale[d - 1] != 1), 0)
    if leading == 0:
        view = (count,)
    elif len(scale) == len(shape) and shape[:leading] == scale[:leading] and _outermost(shape, strides, leading):
        rows = scale.numel()
        view = (rows, count // rows)
    else:
        view = None
    return Layout(shape, strides, view)


def _alias(x: Tensor, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """The memory of `x` as another tensor, which is no view: compiled code is guarded by what a view is of, and in-
    place operations refuse views made here.
    """
    return x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(), shape, strides)  # pyright: ignore


def _dense_strides(shape: torch.Size, strides: tuple[int, ...]) -> tuple[int, ...]:
    """`strides` if they fill memory without gaps or overlaps, else contiguous ones."""
    expected = 1
    for size, stride in sorted(zip(shape, strides, strict=True), key=lambda pair: (pair[1], pair[0])):
        if size > 1 and stride != expected:
            return torch.empty(shape, device="meta").stride()
        expected *= size
    return strides


def _outermost(shape: torch.Size, strides: tuple[int, ...], leading: int) -> bool:
    """Whether the first `leading` axes lie outside all others in memory, in order."""
    inner = shape[leading:].numel()
    for size, stride in zip(reversed(shape[:leading]), reversed(strides[:leading]), strict=True):
        if size > 1 and stride != inner:
            return False
        inner *= size
    return True
