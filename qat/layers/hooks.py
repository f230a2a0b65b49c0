"""Finding hooks that look at what modules compute and save: what is computed another way must not pass them by."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as modules

innermost_hooks: Callable[[], Any] = partial(torch._C._autograd._top_saved_tensors_default_hooks, True)  # pyright: ignore[reportAttributeAccessIssue]
"""The hooks that see a tensor when it is saved; `None` without any."""


def looked_at(module: nn.Module) -> bool:
    """Whether somebody else sees what the module gets and returns, or its gradients."""
    m = module
    hooks = m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
    return bool(hooks or modules._has_any_global_hook())
