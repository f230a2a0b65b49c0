"""The float part of a run: trained, unless a checkpoint was given or another run has trained the same, and measured."""

import math
from collections.abc import Mapping

import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from safetensors.torch import save_file
from torch import Tensor

from qat.errors import UserError
from qat.files import atomic
from qat.lightning.resume import SeedEpochs
from qat.lightning.runs.export_stage import export_float
from qat.lightning.runs.float_cache import FloatCache
from qat.lightning.runs.workspace import Workspace
from qat.lightning.weights import load_weights
from qat.run_files import FLOAT_CHECKPOINT, FLOAT_WEIGHTS


def float_stage(run: Workspace) -> None:
    """Trains in float, unless a checkpoint was given, and measures the float model.

    Raises:
        UserError: if weights or metric are not finite: nothing can be made of them, and no other run may share them.
    """
    weights = run.folder / FLOAT_WEIGHTS
    if "float" in run.progress.stages:
        load_weights(run.module, weights)
        return
    cache = FloatCache(run.cfg, run.progress.start, run.main)
    with run.stage("float", "Float") as values, cache.locked():
        if (shared := cache.load(run.folder)) is not None:
            values |= shared
            load_weights(run.module, cache.weights)
            return
        if not run.progress.start:
            _train(run)
        values["metric"] = run.measure()
        if not math.isfinite(values["metric"]):
            raise UserError(
                f"metric={run.cfg.metric}: the float model measures {values['metric']}, though its weights are "
                "finite; look for NaN in the test data and for a division by 0 in test_step"
            )
        if run.main:
            values["bytes"] = export_float(run)
            with atomic(weights) as temporary:
                save_file(_apart(run.module.state_dict()), temporary)
            cache.save(run.folder, values)


def _train(run: Workspace) -> None:
    checkpoint = ModelCheckpoint(run.folder / "float", filename="last", enable_version_counter=False)
    logger = CSVLogger(run.folder, "float", "")
    file = run.folder / FLOAT_CHECKPOINT
    last = run.progress.resume_from(file, logger)
    callbacks = [SeedEpochs(run.cfg.seed), checkpoint]
    trainer = run.trainer(
        max_epochs=run.cfg.float_epochs, callbacks=callbacks, logger=logger, enable_checkpointing=True
    )
    trainer.fit(run.float_module, datamodule=run.data, ckpt_path=last, weights_only=True)
    run.module.load_state_dict(run.float_module.state_dict())
    run.check_finite("float training", FLOAT_CHECKPOINT)


def _apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy on the CPU of which every key has memory of its own: safetensors refuses tied parameters."""
    return {key: value.cpu().clone(memory_format=torch.contiguous_format) for key, value in state.items()}
