"""What a LightningModule learns when it is quantized: its plan travels in its checkpoints, and scales get their own optimizer group.

`QATCallback` puts `QuantizedModule` in front of the user's class (re-classing, see `qat.layers.twin`), so nothing has to be inherited or overridden by hand:

    on_save_checkpoint     stores the plan as plain containers beside the weights
    on_load_checkpoint     rebuilds the same quantizers before the weights are loaded: resume, `trainer.test(ckpt_path=...)`, `load_from_checkpoint`
    configure_optimizers   runs the user's own, and splits the scales off every parameter group it makes
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch
from torch import nn

from qat.errors import UserError
from qat.insert import Plan, apply_plan, named_quantizers, remove
from qat.layers.twin import TwinMixin, become_twin

CHECKPOINT_KEY = "qat"
Module = TypeVar("Module", bound=pl.LightningModule)


class QuantizedModule(TwinMixin):
    """Mixed in front of a LightningModule's class by `QATCallback`.

    Attributes:
        quantization_plan: The plan that its quantizers were made from; `None` before insertion.
        scale_lr_factor: Learning rate of scales, relative to the group they were split from.
    """

    quantization_plan: Plan | None = None
    scale_lr_factor: float = 1.0

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)  # pyright: ignore[reportAttributeAccessIssue]
        if self.quantization_plan is not None:
            checkpoint[CHECKPOINT_KEY] = self.quantization_plan.to_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if CHECKPOINT_KEY in checkpoint:
            insert_plan(self, Plan.from_dict(checkpoint[CHECKPOINT_KEY]))  # pyright: ignore[reportArgumentType]
        elif self.quantization_plan is not None:
            raise UserError(
                "the checkpoint is of a float model, so it has no scales to resume from; load its weights before quantizing instead "
                "(ckpt=<path> on the command line, qat.load_weights(model, path) in Python)"
            )
        super().on_load_checkpoint(checkpoint)  # pyright: ignore[reportAttributeAccessIssue]

    def configure_optimizers(self) -> Any:
        scales = [q.scale for _, q in named_quantizers(self) if isinstance(q.scale, nn.Parameter)]  # pyright: ignore[reportArgumentType]
        with _split_groups(scales, self.scale_lr_factor):
            return super().configure_optimizers()  # pyright: ignore[reportAttributeAccessIssue]


def insert_plan(module: pl.LightningModule, plan: Plan) -> None:
    """Gives `module` the quantizers of `plan`, in place of any others it has."""
    become_twin(module, QuantizedModule)
    if module.quantization_plan == plan:
        return
    if module.quantization_plan is not None:
        remove(module)
    apply_plan(module, plan)
    module.quantization_plan = plan  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]


@contextmanager
def _split_groups(scales: list[nn.Parameter], lr_factor: float) -> Iterator[None]:
    """While it lasts, every parameter group given to an optimizer loses its scales to a group of their own.

    They get no weight decay and their own learning rate. Doing it at construction, rather than to finished optimizers, lets schedulers, which copy the
    groups' learning rates when they are made, see the final groups.
    """
    is_scale = {id(s) for s in scales}
    original: Callable[..., None] = torch.optim.Optimizer.add_param_group

    def add_param_group(self: torch.optim.Optimizer, group: dict[str, Any]) -> None:
        members = group["params"]
        members = [members] if isinstance(members, torch.Tensor) else list(members)
        tensor = lambda m: m[1] if isinstance(m, tuple) else m  # noqa: E731 - named_parameters() gives pairs
        split = [m for m in members if id(tensor(m)) in is_scale]
        rest = [m for m in members if id(tensor(m)) not in is_scale]
        if rest or not split:
            original(self, {**group, "params": rest})
        if split:
            lr = group.get("lr", self.defaults.get("lr"))
            own = {"params": split, "weight_decay": 0.0, **({"lr": lr * lr_factor} if lr is not None else {})}
            original(self, {**group, **own})

    torch.optim.Optimizer.add_param_group = add_param_group  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        torch.optim.Optimizer.add_param_group = original  # pyright: ignore[reportAttributeAccessIssue]


def load_from_checkpoint(cls: type[Module], path: str | Path, **kwargs: Any) -> Module:
    """`cls.load_from_checkpoint` for checkpoints of quantized models: the same class, its quantizers rebuilt, its weights and scales loaded.

    Args:
        cls: The plain LightningModule class.
        path: A checkpoint written while `QATCallback` was on.
        **kwargs: Passed on (hyperparameters, `map_location`, ...).

    Raises:
        UserError: if the file is no checkpoint that can be loaded safely.
    """
    from qat.layers.twin import twin_of
    from qat.lightning.weights import read_checkpoint

    read_checkpoint(path)
    return twin_of(cls, QuantizedModule).load_from_checkpoint(str(path), **kwargs)
