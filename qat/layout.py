"""Seeing a tensor of any shape as one that compiled kernels know: `[N]` or `[rows, N]`, whatever lies behind."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Shows kernels a tensor as `[N]` (one scale) or `[rows, N]` (a scale for each), whatever its shape, in the order
    it lies in memory.

    So a kernel is compiled once for all shapes, channels_last costs no copy, and per-channel runs like per-tensor.

    Attributes:
        shape, strides: Of the tensor; the strides are dense.
        view: The shape that kernels see.
    """

    shape: torch.Size
    strides: tuple[int, ...]
    view: tuple[int, ...]

    @property
    def steps(self) -> tuple[int, ...]:
        """The strides of `view`."""
        return (self.view[1], 1) if len(self.view) == 2 else (1,)

    def rows(self, x: Tensor) -> Tensor:
        """A tensor of this shape as kernels see it."""
        if x.stride() != self.strides:
            x = torch.empty_strided(self.shape, self.strides, dtype=x.dtype, device=x.device).copy_(x)
        return x.as_strided(self.view, self.steps)

    def per_row(self, parameter: Tensor) -> Tensor:
        """A parameter as kernels see it: one number, or one for each row, side by side."""
        return parameter.reshape((-1, 1) if len(self.view) == 2 and parameter.numel() > 1 else -1).contiguous()


@lru_cache(4096)
def layout_of(shape: torch.Size, strides: tuple[int, ...], scale: torch.Size) -> Layout | None:
    """The layout of a tensor of this shape whose scale has the shape `scale`; `None` if its scales lie across it."""
    strides, count = _dense_strides(shape, strides), shape.numel()
    leading = next((d for d in range(len(scale), 0, -1) if scale[d - 1] != 1), 0)
    if leading == 0:
        return Layout(shape, strides, (count,))
    rows = scale.numel()
    if len(scale) == len(shape) and shape[:leading] == scale[:leading] and _outermost(shape, strides, leading):
        return Layout(shape, strides, (rows, count // rows)) if rows < count else None
    return None


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


def _outermost(shape: torch.Size, strides: tuple[int, ...], leading: int) -> bool:
    """Whether the first `leading` axes lie outside all others in memory, in order."""
    inner = shape[leading:].numel()
    for size, stride in zip(reversed(shape[:leading]), reversed(strides[:leading]), strict=True):
        if size > 1 and stride != inner:
            return False
        inner *= size
    return True
