"""Finding hooks that look at what modules compute: what is computed another way must not pass them by."""

from torch import nn
from torch.nn.modules import module as modules


def looked_at(module: nn.Module) -> bool:
    """Whether somebody else sees what the module gets and returns, or its gradients."""
    m = module
    hooks = m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
    return bool(hooks or modules._has_any_global_hook())
