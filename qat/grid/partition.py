"""How a tensor is cut into parts that have a scale each: all of it, its channels, groups or tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qat.errors import UserError


@dataclass(frozen=True)
class Partition:
    """The parts of one tensor. Grids broadcast against its *grouped* view, which has one more axis where groups share a
    scale; range estimators look at its *rows*, one per part.

    Attributes:
        granularity, group_size: See `QuantSpec`.
        axis: The output-channel axis of a weight; groups run along the other one of axes 0 and 1.
        is_weight: Whether it is one.
        group_axis: The axis that groups of an activation run along, from the end.
    """

    granularity: str
    group_size: int | None
    axis: int
    is_weight: bool
    group_axis: int

    def scale_shape(self, shape: torch.Size) -> tuple[int, ...]:
        """The shape of the scales of a weight of this shape.

        Raises:
            UserError: if its groups are not all of one size.
        """
        if self.granularity == "tensor":
            return (1,)
        if self.granularity == "channel":
            return (shape[self.axis],)
        size, axis = self.group_size, self._group_axis(len(shape))
        width = shape[axis]
        if size is None or width % size:
            fits = [str(d) for d in range(min(size or width, width), 1, -1) if width % d == 0][:3]
            hint = f": set weight.group_size (of quant, or of a rule) to {', '.join(fits)}" if fits else ""
            raise UserError(
                f"group_size={size} does not divide the {width} input channels of a weight of shape {tuple(shape)}; "
                f"the last group would be ragged{hint}"
            )
        return (*shape[:axis], width // size, *shape[axis + 1 :])

    def grouped(self, x: Tensor) -> Tensor:
        """The grouped view of `x`: its group axis as `[groups, group_size]`, or `x` itself where nothing is grouped.

        Raises:
            UserError: if the groups of an activation are not all of one size.
        """
        size = self.group_size
        if size is None:
            return x
        if not self.is_weight and (x.ndim < -self.group_axis or x.shape[self.group_axis] % size):
            raise UserError(
                f"group_size={size} does not divide axis {self.group_axis} of an activation of shape {tuple(x.shape)}; "
                "the last group would be ragged"
            )
        axis = self._group_axis(x.ndim)
        return x.unflatten(axis, (x.shape[axis] // size, size))  # -1 would be ambiguous for an empty tensor

    def rows(self, x: Tensor) -> Tensor:
        """The elements of each part of `x`: `[parts, N]`."""
        if self.granularity == "tensor":
            return x.reshape(1, -1)
        if self.granularity == "channel":
            return x.movedim(self.axis, 0).flatten(1)
        if self.granularity == "token":
            return x.flatten(0, -2) if x.ndim > 1 else x.view(1, -1)
        return self.grouped(x).movedim(self._group_axis(x.ndim) + 1, -1).reshape(-1, self.group_size or 1)

    def spread(self, per_scale: Tensor, ndim: int) -> Tensor:
        """A view of a tensor shaped like the scales that broadcasts against the grouped view of one of `ndim` axes."""
        if self.granularity == "tensor":
            return per_scale
        if self.granularity == "channel":
            return per_scale.view([-1 if d == self.axis else 1 for d in range(ndim)])
        return per_scale.unsqueeze(self._group_axis(ndim) + 1)

    def spread_rows(self, per_row: Tensor, x: Tensor) -> Tensor:
        """One number per row of `rows(x)` as what broadcasts against the grouped view of `x`."""
        if self.granularity == "token":
            return per_row.view(*x.shape[:-1], 1) if x.ndim else per_row
        if self.group_size is not None:
            axis = self._group_axis(x.ndim)
            per_row = per_row.view(*x.shape[:axis], x.shape[axis] // self.group_size, *x.shape[axis + 1 :])
        return self.spread(per_row, x.ndim)

    def _group_axis(self, ndim: int) -> int:
        return 1 - self.axis if self.is_weight else ndim + self.group_axis
