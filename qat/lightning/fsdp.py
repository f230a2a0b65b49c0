"""FSDP2 (`ModelParallelStrategy`): the user's `configure_model` shards weights; quantizers come later, whole.

Scales are a few numbers: every process keeps all of them, reads its layers' weights where FSDP has gathered them, and
so gets the gradient of its own samples alone. Nobody else averages those, so a hook does.
"""

import pytorch_lightning as pl
import torch.distributed as dist
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor

from qat.insert import named_quantizers
from qat.shards import is_shard


def average_gradients(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Makes the gradients of scales the mean over all processes, where weights are sharded."""
    if not isinstance(trainer.strategy, ModelParallelStrategy):
        return
    for _, quantizer in named_quantizers(module):
        for parameter in quantizer.parameters():
            if not is_shard(parameter):  # FSDP2 sees to those that it shards
                parameter.register_post_accumulate_grad_hook(_average)


def _average(parameter: Tensor) -> None:
    assert parameter.grad is not None
    dist.all_reduce(parameter.grad)
    parameter.grad /= dist.get_world_size()
