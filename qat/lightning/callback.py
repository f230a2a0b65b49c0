"""`QATCallback`: quantization-aware training of any LightningModule, by adding one callback to the trainer.

Order of events in `trainer.fit` (Lightning 2.6): callbacks' `setup`, the module's `setup`, `configure_model`,
restoring a checkpoint, optimizers, `on_fit_start`. Layers may be built as late as in `configure_model`, and scales
must exist before the restore and the optimizers. So `setup` wraps `configure_model`: insertion happens right after
the user's own. Ranges are calibrated in `on_fit_start`, on the final device, unless a checkpoint has just brought them.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BatchSizeFinder, Callback, LearningRateFinder, ModelPruning

from qat.calibrate import calibrate, needs_calibration
from qat.errors import UserError, nearest
from qat.insert import adopt_modes, fold_again, named_quantizers, plan_of, remembered
from qat.kernels.memory import keep_freed
from qat.layers.twin import become_twin, original_class
from qat.lightning.averages import AVERAGING, average_floats_alone, follow_calibration, follow_insertion, follow_widths
from qat.lightning.base import callbacks_of
from qat.lightning.compiled import eagerly, uncompiled
from qat.lightning.fsdp import average_gradients
from qat.lightning.module import QuantizedModule, after_configure, insert_plan
from qat.lightning.scale_groups import late_groups
from qat.lightning.shared_ranges import RangeCache
from qat.lightning.spawn import tell_left_behind
from qat.lightning.steps import at_home, described_input, run_steps, trainer_source
from qat.planning.audit import checked_plan
from qat.planning.plan import Plan
from qat.policies.networks import KEY, NetworkPolicies, Policy, policy_of
from qat.policies.policy import differences
from qat.shards import is_shard
from qat.starts import Start

MUST_FOLLOW = (*AVERAGING, ModelPruning)


class QATCallback(Callback):
    """Inserts quantizers into the module, calibrates them, and lets training do the rest.

    Args:
        policy: Which grids go where: a `QuantPolicy`, or its settings as plain containers.
        calibration_samples: How many training samples set the first ranges.
        scale_lr_factor: Learning rate of the scales relative to that of the weights beside them; `None` for 0.1 under
            SGD and 3 under other optimizers, where it is a share of the scale (`qat.lightning.scale_groups` says why).
            Schedulers that take a list take one value for each group of the module's own.
        module: Path of the submodule that the policy is for (`generator`); everything else stays float, unless another
            `QATCallback` is for it. Names in the policy are then relative to that submodule.
        starts: What is done to the model right before and after its first calibration (`qat.starts`).
        ranges: First ranges that are known from elsewhere; not together with starts, which change what is calibrated.

    Raises:
        UserError: (while the trainer sets up) if a rule matches nothing, if nothing can be quantized, if less than
            `require_coverage` of the arithmetic would be on integers, if two callbacks are for the same layers, or if a
            weight-averaging or pruning callback, which must see the quantized model, comes before this one.
    """

    def __init__(
        self,
        policy: Policy | Mapping[str, Any],
        calibration_samples: int = 512,
        scale_lr_factor: float | None = None,
        module: str | None = None,
        starts: Sequence[Start] = (),
        ranges: RangeCache | None = None,
    ) -> None:
        if calibration_samples < 1:
            raise UserError(f"calibration_samples={calibration_samples}: must be at least 1")
        if scale_lr_factor is not None and not 0 <= scale_lr_factor < float("inf"):
            raise UserError(
                f"scale_lr_factor={scale_lr_factor}: must be 0 or more, or null to let the optimizer decide"
            )
        where = "quant" if module is None else f"quant.{KEY}.{module}"
        self.policy = policy if isinstance(policy, Policy) else policy_of(policy, where)
        self.calibration_samples = calibration_samples
        self.scale_lr_factor = scale_lr_factor
        self.module = module
        if not isinstance(starts, Sequence) or not all(isinstance(start, Start) for start in starts):
            raise UserError(f"starts={starts!r}: must be a list of starts, such as [qat.starts.Equalize()]")
        self.starts = list(starts)
        if ranges is not None and self.starts:
            raise UserError("ranges: with starts there is no range that could be known from elsewhere")
        self.ranges = ranges
        self._late = ExitStack()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_late": ExitStack()}  # what training has open is of this process

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._check_order(trainer)
        if not self._leads(trainer):
            return
        callbacks = self._everyone(trainer)
        _before_tuners(trainer, self)
        become_twin(pl_module, QuantizedModule)
        factors = {c.module or "": c.scale_lr_factor for c in callbacks}
        pl_module.scale_lr_factors = factors  # pyright: ignore[reportArgumentType]
        if stage != "fit":
            return
        self._before = plan = remembered(pl_module)
        keep_freed()
        follow_insertion(trainer, pl_module)
        if plan is not None:
            policy = joint_policy(callbacks, pl_module).settings
            if changed := differences(policy, plan.policy):
                raise UserError(
                    f"{original_class(pl_module).__name__} is quantized already, with another policy "
                    f"({', '.join(changed)} differ); train it on with that, or start from a float module"
                )
            return
        after_configure(pl_module, lambda: self._insert(trainer, pl_module))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._leads(trainer):
            return
        average_floats_alone(trainer)
        follow_widths(trainer, pl_module)
        self._ready(trainer, pl_module)
        average_gradients(trainer, pl_module)
        self._late = ExitStack()
        factors = pl_module.scale_lr_factors  # pyright: ignore[reportAttributeAccessIssue]
        self._late.enter_context(late_groups(pl_module, trainer.optimizers, factors))  # pyright: ignore[reportArgumentType]

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._late.close()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._ready(trainer, pl_module)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._ready(trainer, pl_module)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._ready(trainer, pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._late.close()
        if stage == "fit" and self._leads(trainer):
            tell_left_behind(trainer, pl_module, self._before)
        # Lightning puts modules back into training after an evaluation, but not those that it did not find before.
        adopt_modes(pl_module)
        fold_again(pl_module)

    def plan(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Plan:
        """The plan for all `QATCallback`s of the trainer, from one probe batch; the module is left as it is."""
        policy = joint_policy(self._everyone(trainer), pl_module)
        return checked_plan(pl_module, policy, run_steps(pl_module, trainer_source(trainer), samples=1))

    def _everyone(self, trainer: pl.Trainer) -> list["QATCallback"]:
        """All of the trainer's; this one, of a trainer that has none."""
        return callbacks_of(trainer, QATCallback) or [self]

    def _leads(self, trainer: pl.Trainer) -> bool:
        """Whether it is the first of them, which acts for all."""
        return self is self._everyone(trainer)[0]

    def _starts(self, trainer: pl.Trainer) -> list[Start]:
        return [start for callback in self._everyone(trainer) for start in callback.starts]

    def _insert(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if remembered(pl_module) is None:
            with described_input(pl_module) as described, uncompiled(pl_module), at_home(pl_module):
                for start in self._starts(trainer):
                    with eagerly():  # they call parts of the module themselves, and watch
                        start.prepare(pl_module, run_steps(pl_module, trainer_source(trainer), samples=1))
                insert_plan(pl_module, self.plan(trainer, pl_module))
            pl_module.input_described = next(iter(described), None)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
            follow_insertion(trainer, pl_module)

    def _ready(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Calibrates what needs it. Outside fit quantizers are inserted as late as here: a checkpoint may bring
        them.
        """
        if not self._leads(trainer):
            return
        with torch.inference_mode(False):  # what evaluation loops run in would make parameters that cannot be trained
            self._insert(trainer, pl_module)
            fold_again(pl_module)
            # DDP has just copied the first process's flags to the others.
            for _, quantizer in named_quantizers(pl_module):
                quantizer.enable(bool(quantizer.enabled))
            if needs_calibration(pl_module):
                shown = trainer.global_rank == 0 and trainer.progress_bar_callback is not None
                title = "Calibrating" if shown else None
                samples = max(callback.calibration_samples for callback in self._everyone(trainer))
                missing = None if self.ranges is None else self.ranges.load(pl_module)
                calibrate(pl_module, run_steps(pl_module, trainer_source(trainer), samples, title), missing)
                if self.ranges is not None:
                    self.ranges.save(pl_module, missing or ())
                for start in self._starts(trainer):
                    run = run_steps(pl_module, trainer_source(trainer), samples)
                    with eagerly():
                        start.refine(pl_module, run, plan_of(pl_module))
                if trainer.world_size > 1:
                    _agree(pl_module, started=bool(self._starts(trainer)))
                follow_calibration(trainer, pl_module)

    def _check_order(self, trainer: pl.Trainer) -> None:
        callbacks = callbacks_of(trainer, Callback)
        for other in callbacks[: callbacks.index(self)]:
            if isinstance(other, MUST_FOLLOW):
                raise UserError(
                    f"QATCallback must come before {type(other).__name__} in the trainer's callbacks, "
                    "which has to see the quantized model"
                )


def _before_tuners(trainer: pl.Trainer, first: QATCallback) -> None:
    """Lightning puts those that find a learning rate or a batch size first; they train, so ranges are needed before."""
    everyone: list[Any] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    if any(isinstance(c, LearningRateFinder | BatchSizeFinder) for c in everyone):
        everyone.sort(key=lambda c: c is not first)  # in place, and nobody else changes place


def joint_policy(callbacks: list[QATCallback], pl_module: pl.LightningModule) -> Policy:
    """The policy of the whole module that the callbacks make together."""
    wanted = [callback.module for callback in callbacks]
    if len(wanted) > 1 and (None in wanted or len(set(wanted)) < len(wanted)):
        raise UserError(f"{len(wanted)} QATCallbacks, for module={wanted}: give each a submodule of its own")
    paths = [name for name, _ in pl_module.named_modules() if name]
    for callback in callbacks:
        if callback.module is not None and callback.module not in paths:
            where, hint = original_class(pl_module).__name__, nearest(callback.module, paths)
            raise UserError(f"module={callback.module}: no such submodule in {where}{hint}")
    first = callbacks[0]
    return first.policy if first.module is None else NetworkPolicies({str(c.module): c.policy for c in callbacks})


@torch.no_grad()
def _agree(module: pl.LightningModule, started: bool) -> None:
    """Gives every process the first one's ranges, and what starts have made of weights: under a distributed sampler of
    the user's, each saw other samples.
    """
    holders = [module] if started else [quantizer for _, quantizer in named_quantizers(module)]
    for value in [value for holder in holders for value in (*holder.parameters(), *holder.buffers())]:
        # Flags are the same everywhere, and not every backend takes them; shards are each process's own.
        if value.dtype != torch.bool and not is_shard(value) and not value.is_inference():
            first = value.detach().clone(memory_format=torch.contiguous_format)
            torch.distributed.broadcast(first, 0)
            value.copy_(first)  # which counts as a change of it
