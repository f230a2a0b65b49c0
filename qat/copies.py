"""Copies of a user's module, which may have run before."""

import copy
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

M = TypeVar("M", bound=nn.Module)


class _Detaching(TorchFunctionMode):
    """Copies the values of a tensor that autograd made, which torch refuses to copy: its history stays behind."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not Tensor.__deepcopy__ or args[0].is_leaf:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        memo[id(tensor)] = values = tensor.detach().clone()
        return values


def copied(module: M) -> M:
    """A deep copy. What a forward in training kept as an attribute (an auxiliary output, an attention map) is copied
    without its history.
    """
    with _Detaching():
        return copy.deepcopy(module)
