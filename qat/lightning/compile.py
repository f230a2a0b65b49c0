"""Training compiled: the whole forward and backward pass, quantizers fused with what is around them.

Compiling takes from half a minute to minutes, and again for each new set of bit-widths (`AnnealBits`); torch keeps the
result on disk for the next run. Evaluation runs as it is written: it is what exported files are compared with.
"""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from qat.kernels.launch import exact_division, own_code
from qat.lightning.base import QuantizationCallback, callbacks_of
from qat.lightning.distill import Distill
from qat.lightning.steps import batch_size


class Compile(QuantizationCallback):
    """Runs training batches through `torch.compile(module)`: what the module's step computes by calling `self(...)`.
    The teacher of `Distill` is compiled alike.

    Two kinds of batches run as they are written instead of being compiled for: those of another size than the first one
    (the last of an epoch is often smaller), and those for which a callback before this one has set hooks
    (`QuantizerHealth`, every so often).

    Args:
        fullgraph: Whether a part of the module that cannot be compiled is an error.
        cudagraphs: Whether steps on a GPU are recorded once and replayed: for models so small that Python is slower
            than the GPU.
    """

    def __init__(self, fullgraph: bool = False, cudagraphs: bool = False) -> None:
        self.fullgraph, self.cudagraphs = fullgraph, cudagraphs
        self._size: int | None = None
        self._compiled: list[tuple[nn.Module, Any, int]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        options = {"triton.cudagraphs": self.cudagraphs, **exact_division()}
        teachers = [distill.teacher for distill in callbacks_of(trainer, Distill)]
        self._size, self._compiled = None, []
        for module in (pl_module, *teachers):
            # Code of its own, for compilers do not look whether what they have compiled before had other hooks.
            whole = self.fullgraph and module is pl_module
            run = torch.compile(own_code(module._call_impl), fullgraph=whole, options=options)
            self._compiled.append((module, run, _hooks(module)))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        size = batch_size(batch)
        self._size = self._size or size
        if self.cudagraphs:
            torch.compiler.cudagraph_mark_step_begin()
        for module, run, hooks in self._compiled:
            _call(module, run if size == self._size and _hooks(module) == hooks else None)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.release()

    def release(self) -> None:
        for module, *_ in self._compiled:
            _call(module, None)


def _call(module: nn.Module, how: Any) -> None:
    """Sets what calling `module` runs: `how`, as `nn.Module.compile` does, or (`None`) the module as it is written."""
    module._compiled_call_impl = how  # pyright: ignore[reportAttributeAccessIssue]


def _hooks(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())
