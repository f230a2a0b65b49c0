"""Modes of a model: running it for a look, which leaves its modes as they were, and knowing a second run by gradient
checkpointing.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.backends import mha


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for every module meanwhile; afterwards each is in the mode it was in (a frozen BatchNorm stays
    frozen).
    """
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Keeps torch's attention layers from handing their whole inside to one fused kernel, which would skip what is
    quantized in there, and hide from a recording what is not.
    """
    before = mha.get_fastpath_enabled()
    mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        mha.set_fastpath_enabled(before)


def recomputing() -> bool:
    """Whether autograd is at work, and so a forward can only be gradient checkpointing's second one."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def only_looking() -> bool:
    """Whether tensors made now are of `torch.inference_mode`, which nothing that trains may keep; compiled code cannot
    ask.
    """
    return not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
