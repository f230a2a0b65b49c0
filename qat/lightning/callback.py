"""`QATCallback`: quantization-aware training of any LightningModule, by adding one callback to the trainer.

Order of events in `trainer.fit` (Lightning 2.6): callbacks' `setup`, the module's `setup`, `configure_model`,
restoring a checkpoint, optimizers, `on_fit_start`. Layers may be built as late as in `configure_model`, and scales
must exist before the restore and the optimizers. So `setup` wraps `configure_model`: insertion happens right after
the user's own. Ranges are calibrated in `on_fit_start`, on the final device, unless a checkpoint has just brought them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelPruning, StochasticWeightAveraging, WeightAveraging

from qat.calibrate import calibrate, needs_calibration
from qat.errors import UserError
from qat.insert import Plan, make_plan, named_quantizers
from qat.layers.twin import become_twin
from qat.lightning.module import QuantizedModule, insert_plan
from qat.lightning.steps import run_steps, trainer_source
from qat.policy import QuantPolicy
from qat.starts import Start

MUST_FOLLOW = (StochasticWeightAveraging, WeightAveraging, ModelPruning)


class QATCallback(Callback):
    """Inserts quantizers into the module, calibrates them, and lets training do the rest.

    Args:
        policy: Which grids go where: a `QuantPolicy`, or its settings as plain containers.
        calibration_samples: How many training samples set the first ranges.
        scale_lr_factor: Learning rate of the scales relative to that of the weights beside them; `None` for 0.1 under
        SGD and 0.01 under other
            optimizers (`qat.lightning.groups` says why). Schedulers that take one function per group (`LambdaLR`)
            need one for the scales, too.
        starts: What is done to the model right before and after its first calibration (`qat.starts`).

    Raises:
        UserError: (while the trainer sets up) if a rule matches nothing, if nothing can be quantized, or if a
        weight-averaging or pruning callback, which must see
            the quantized model, comes before this one.
    """

    def __init__(
        self,
        policy: QuantPolicy | Mapping[str, Any],
        calibration_samples: int = 512,
        scale_lr_factor: float | None = None,
        starts: Sequence[Start] = (),
    ) -> None:
        if calibration_samples < 1:
            raise UserError(f"calibration_samples={calibration_samples}: must be at least 1")
        if scale_lr_factor is not None and not 0 <= scale_lr_factor < float("inf"):
            raise UserError(
                f"scale_lr_factor={scale_lr_factor}: must be 0 or more, or null to let the optimizer decide"
            )
        self.policy = policy if isinstance(policy, QuantPolicy) else QuantPolicy.from_dict(policy)
        self.calibration_samples = calibration_samples
        self.scale_lr_factor = scale_lr_factor
        self.starts = list(starts)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._check_order(trainer)
        become_twin(pl_module, QuantizedModule)
        pl_module.scale_lr_factor = self.scale_lr_factor  # pyright: ignore
        if stage != "fit" or pl_module.quantization_plan is not None:
            return
        configure = pl_module.configure_model

        def configure_then_insert() -> None:
            del pl_module.__dict__["configure_model"]
            configure()
            self._insert(trainer, pl_module)

        pl_module.__dict__["configure_model"] = configure_then_insert

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._ready(trainer, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._ready(trainer, pl_module)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._ready(trainer, pl_module)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._ready(trainer, pl_module)

    def plan(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Plan:
        """What would be inserted, from one probe batch; the module is left as it is."""
        return make_plan(pl_module, self.policy, run_steps(pl_module, trainer_source(trainer), samples=1))[0]

    def _insert(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if pl_module.quantization_plan is None:
            for start in self.starts:
                start.prepare(pl_module, run_steps(pl_module, trainer_source(trainer), samples=1))
            insert_plan(pl_module, self.plan(trainer, pl_module))

    def _ready(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Calibrates what needs it. Outside fit quantizers are inserted as late as here: a checkpoint may bring
        them.
        """
        with torch.inference_mode(False):  # what evaluation loops run in would make parameters that cannot be trained
            self._insert(trainer, pl_module)
            for _, quantizer in named_quantizers(
                pl_module
            ):  # DDP has just copied the first process's flags to the others
                quantizer.enable(bool(quantizer.enabled))
            if needs_calibration(pl_module):
                shown = trainer.global_rank == 0 and trainer.progress_bar_callback is not None
                title = "Calibrating" if shown else None
                calibrate(pl_module, run_steps(pl_module, trainer_source(trainer), self.calibration_samples, title))
                for start in self.starts:
                    run = run_steps(pl_module, trainer_source(trainer), self.calibration_samples)
                    start.refine(pl_module, run, pl_module.quantization_plan)  # pyright: ignore
                if trainer.world_size > 1:
                    _agree(pl_module)

    def _check_order(self, trainer: pl.Trainer) -> None:
        callbacks: list[Any] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
        for other in callbacks[: callbacks.index(self)]:
            if isinstance(other, MUST_FOLLOW):
                raise UserError(
                    f"QATCallback must come before {type(other).__name__} in the trainer's callbacks, "
                    "which has to see the quantized model"
                )


def _agree(module: pl.LightningModule) -> None:
    """Gives every process the first one's ranges: under a distributed sampler of the user's, each saw other samples."""
    for _, quantizer in named_quantizers(module):
        for value in quantizer.state_dict().values():
            if value.dtype != torch.bool:  # the flags are the same everywhere, and not every backend takes them
                torch.distributed.broadcast(value, 0)
