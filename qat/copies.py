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
    without its history; what was compiled runs as it is written, for compiled code is bound to the original's weights.
    """
    with _Detaching():
        made = copy.deepcopy(module)
    for part in made.modules():
        part.__dict__.pop("_compiled_call_impl", None)
        drop_compiled_steps(part)
    return made


def drop_compiled_steps(module: nn.Module) -> None:
    """Takes the compiled forward and steps that Lightning keeps in the instance off a module that went through
    `torch.compile(module)`; below them are those of its class.
    """
    for name in module.__dict__.get("_compiler_ctx") or ():  # original_forward, ...
        module.__dict__.pop(name.removeprefix("original_"), None)
    if "_compiler_ctx" in module.__dict__:
        module.__dict__["_compiler_ctx"] = None
