"""Mixin of a quantized LightningModule: a plan in its checkpoints, and optimizer groups for scales.

`QATCallback` puts `QuantizedModule` in front of the user's class (re-classing, see `qat.layers.twin`), so nothing has
to be inherited or overridden by hand:

    on_save_checkpoint     stores the plan as plain containers beside the weights, and the quantizers' state beside
                           theirs: `state_dict` has the float model's keys, so the class itself loads it strictly
    on_load_checkpoint     rebuilds the same quantizers before the weights are loaded: resume,
                           `trainer.test(ckpt_path=...)`, `load_from_checkpoint`
    configure_optimizers   runs the user's own, and splits the scales off every parameter group it makes
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from qat.errors import UserError
from qat.insert import apply_plan, remembered, remove
from qat.layers.twin import TwinMixin, become_twin, twin_of
from qat.lightning.scale_groups import assign_scales, own_groups
from qat.lightning.weights import CHECKPOINT_KEY, join_state, read_checkpoint, split_state
from qat.planning.plan import Plan
from qat.policies.policy import differences
from qat.quantizers import Quantizer

INPUT_KEY, SCALE_LR_KEY = "qat_input", "qat_scale_lr"
Module = TypeVar("Module", bound=pl.LightningModule)
M = TypeVar("M", bound=nn.Module)


class QuantizedModule(TwinMixin):
    """Mixed in front of a LightningModule's class by `QATCallback`.

    Attributes:
        quantization_plan: The plan that its quantizers were made from (`qat.insert`); `None` before insertion.
        scale_lr_factors: Learning rates of scales, relative to the group they were split from, by path of the
            submodule that they are in (`""`: all); `None` lets the optimizer decide (see `groups`).
        input_described: `shape` (of one sample) and `dtype` of what forward takes; `None` if that is no one tensor.
    """

    quantization_plan: Plan | None = None
    scale_lr_factors: Mapping[str, float | None] = MappingProxyType({"": None})
    input_described: dict[str, Any] | None = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)  # pyright: ignore[reportAttributeAccessIssue]
        if self.quantization_plan is not None:
            checkpoint[CHECKPOINT_KEY] = self.quantization_plan.to_dict()
            checkpoint[INPUT_KEY] = self.input_described
            checkpoint[SCALE_LR_KEY] = dict(self.scale_lr_factors)
            trainer = self._trainer  # pyright: ignore[reportAttributeAccessIssue]
            # Sharding strategies save and load what the module has by themselves, past these hooks.
            if trainer is None or not trainer.strategy.restore_checkpoint_after_setup:
                modules = self.named_modules(remove_duplicate=False)  # pyright: ignore[reportAttributeAccessIssue]
                split_state(checkpoint, {name for name, module in modules if isinstance(module, Quantizer)})

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        join_state(checkpoint)
        if CHECKPOINT_KEY in checkpoint:
            plan = Plan.from_dict(checkpoint[CHECKPOINT_KEY])
            self._check_same_settings(plan, checkpoint.get(SCALE_LR_KEY))
            insert_plan(self, plan)  # pyright: ignore[reportArgumentType]
            self.input_described = checkpoint.get(INPUT_KEY)
        elif self.quantization_plan is not None:
            raise UserError(
                "the checkpoint is of a float model, so it has no scales to resume from; "
                "load its weights before quantizing instead "
                "(ckpt=<path> on the command line, qat.load_weights(model, path) in Python)"
            )
        super().on_load_checkpoint(checkpoint)  # pyright: ignore[reportAttributeAccessIssue]

    def _check_same_settings(self, plan: Plan, factors: dict[str, float | None] | None) -> None:
        """Training that goes on under other settings than the trainer's would ignore them; evaluation takes any
        checkpoint.
        """
        trainer = self._trainer  # pyright: ignore[reportAttributeAccessIssue]
        mine = self.quantization_plan
        if trainer is None or trainer.state.fn != "fit" or mine is None:
            return
        if changed := differences(mine.policy, plan.policy):
            raise UserError(
                f"the checkpoint was trained with another quantization policy ({', '.join(changed)} differ); "
                "resume with the settings it has, or start anew from the float weights"
            )
        if factors is not None and factors != (own := dict(self.scale_lr_factors)):
            path = next(path for path in {**own, **factors} if own.get(path, ...) != factors.get(path, ...))
            raise UserError(
                f"scale_lr_factor={own.get(path)}: the checkpoint was trained with {factors.get(path)}, which its "
                "optimizers keep; resume with that, or start anew from the float weights"
            )

    def _slow_forward(self, *args: Any, **kwargs: Any) -> Any:
        """The method that torch calls in forward's place while `torch.jit` traces
        (`TensorBoardLogger(log_graph=True)`). The trace is held against a second one, which has no gradients:
        quantizers without them are other operations.
        """
        with torch.no_grad():
            return super()._slow_forward(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def configure_optimizers(self) -> Any:
        with own_groups(self, self.scale_lr_factors):  # pyright: ignore[reportArgumentType]
            configured = super().configure_optimizers()  # pyright: ignore[reportAttributeAccessIssue]
        optimizers = [leaf for leaf in tree_leaves(configured) if isinstance(leaf, Optimizer)]
        assign_scales(self, optimizers)  # pyright: ignore[reportArgumentType]
        return configured


def insert_plan(module: pl.LightningModule, plan: Plan) -> None:
    """Gives `module` the quantizers of `plan`, in place of any others it has."""
    become_twin(module, QuantizedModule)
    if remembered(module) == plan:
        return
    if remembered(module) is not None:
        remove(module)
    apply_plan(module, plan)


def bare(module: M) -> M:
    """Takes from `module` its quantizers and what callbacks have put in the place of its methods, in place."""
    for name in ("configure_model", "training_step"):
        module.__dict__.pop(name, None)
    remove(module)
    return module


def after_configure(module: pl.LightningModule, act: Callable[[], None]) -> None:
    """Calls `act` right after `configure_model`, once; of several, each after those that were named before it."""
    configure = module.configure_model

    def configure_then_act() -> None:
        module.__dict__.pop("configure_model", None)  # the last, which is called first, has taken itself away for all
        configure()
        act()

    module.__dict__["configure_model"] = configure_then_act


def load_from_checkpoint(cls: type[Module], path: str | Path, **kwargs: Any) -> Module:
    """`cls.load_from_checkpoint` for quantized models: the same class, quantizers rebuilt, weights and scales loaded.

    Args:
        cls: The plain LightningModule class.
        path: A checkpoint written while `QATCallback` was on.
        **kwargs: Passed on (hyperparameters, `map_location`, ...).

    Raises:
        UserError: if the file is no checkpoint that can be loaded safely, or of a float model, or `cls` no class.
    """
    if not (isinstance(cls, type) and issubclass(cls, pl.LightningModule)):
        given = cls if isinstance(cls, str | Path) else type(cls).__name__
        raise UserError(
            f"load_from_checkpoint({given}, ...): the LightningModule's class comes first, then the checkpoint's path"
        )
    if CHECKPOINT_KEY not in read_checkpoint(path):
        raise UserError(f"checkpoint {path}: is of a float model; {cls.__name__}.load_from_checkpoint loads it")
    return twin_of(cls, QuantizedModule).load_from_checkpoint(str(path), weights_only=True, **kwargs)
