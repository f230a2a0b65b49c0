"""Weights of which this process holds a part: FSDP2 makes DTensors of them."""

from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_shard(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether it is one, told by what it can do: not every build of torch has the class."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """All of it, which every process has to ask for."""
    return tensor.full_tensor() if is_shard(tensor) else tensor
