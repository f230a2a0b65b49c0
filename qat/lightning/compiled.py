"""Compiled modules: watched and changed uncompiled.

A module that was compiled before `trainer.fit` (`torch.compile(module)`, or `net.compile()` in place) is probed and
calibrated eagerly: a recording has to see every call. Lightning keeps the compiled steps of the first kind as
attributes of the instance, where they would hide the twin's forward, functional sites included; so while a module
changes they are taken off, and made anew for what it has become.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.compile import from_compiled
from torch._dynamo import OptimizedModule

from qat.copies import drop_compiled_steps


def eagerly() -> AbstractContextManager[None]:
    """While it lasts, compiled code runs as it was written."""
    return torch.compiler.set_stance("force_eager")


@contextmanager
def uncompiled(module: pl.LightningModule) -> Iterator[None]:
    """While it lasts, `module` is what it was before `torch.compile(module)`; afterwards it is compiled as before."""
    context = module._compiler_ctx
    if context is None:
        yield
        return
    drop_compiled_steps(module)  # not `to_uncompiled`: what it puts back is bound to the class that it was
    try:
        yield
    finally:
        from_compiled(OptimizedModule(module, context["dynamo_ctx"]))
