"""The quantized part of a run: calibrated, trained with fake quantization, and read back if that was done before."""

import os
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import Checkpoint, ModelCheckpoint

from qat.errors import UserError
from qat.insert import plan_of
from qat.lightning.module import insert_plan
from qat.lightning.resume import SeedEpochs
from qat.lightning.runs.workspace import Workspace
from qat.lightning.weights import CHECKPOINT_KEY, read_checkpoint
from qat.planning.audit import coverage, to_dict
from qat.planning.plan import Plan
from qat.report import audit_table
from qat.run_files import AUDIT, LAST_CHECKPOINT, TRAINED

LIMITS = ("max_epochs", "min_epochs", "max_steps", "min_steps", "max_time", "limit_train_batches")
"""Settings of the trainer that say how long training takes."""


def ptq_stage(this: Workspace) -> None:
    """Inserts, calibrates and measures, before any training."""
    if this.done("ptq"):
        return
    with this.stage("ptq", "Calibrated (PTQ)") as values:
        values["metric"] = this.measure(callbacks=[this.qat_callback()])


def qat_stage(this: Workspace) -> None:
    """Trains with fake quantization; where that is to take no step, keeps what was calibrated."""
    with this.stage("qat", "Quantization-aware training" if this.trains else None) as values:
        callbacks = [this.qat_callback(), SeedEpochs(this.cfg.seed), *this.callbacks]
        saves = any(isinstance(callback, Checkpoint) for callback in callbacks)  # else Lightning adds its own
        trainer = this.trainer(callbacks=callbacks, logger=this.loggers, enable_checkpointing=saves)
        limits = OmegaConf.to_container(OmegaConf.masked_copy(this.cfg.trainer, list(LIMITS)))
        if not _load_trained(this, limits):
            last = this.resume_from(this.folder / LAST_CHECKPOINT, *this.loggers)
            this.progress["stages"].pop("exported", None)  # of what was trained less
            try:
                trainer.fit(this.module, datamodule=this.data, ckpt_path=last, weights_only=True)
            except UserError:
                if not trainer.global_step:  # what corrects it may change what is calibrated
                    this.progress["stages"].pop("ptq", None)
                    this.remember()
                raise
            trainer.save_checkpoint(this.folder / TRAINED, weights_only=True)  # whole or not at all
            # The first process is alone from here on: nothing may wait for the others.
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
            this.progress["trained"] = {"limits": limits, "best": _best_file(this, trainer)}
            this.remember()
        if this.trains:
            values["metric"] = this.measure()
        if (best := _best(this)) is not None:
            values["best"] = best


def audit_trained(this: Workspace) -> None:
    """Accounts for the model once more if training has changed bits for good (`LearnBits`)."""
    plan = plan_of(this.module)
    rows = this.audit(plan)
    if rows != this.audit_rows:
        this.audit_rows = rows
        this.console.print(audit_table(rows, coverage(rows)))
        this.write_json(AUDIT, to_dict(rows))


def _load_trained(this: Workspace, limits: Any) -> bool:
    """Loads the trained model from its file, if training to the same limits has ended. Resuming would not give the
    same: Lightning runs an epoch more or none, and without an epoch it leaves out what callbacks do at the end of
    training (averages take the place of weights then).
    """
    file = this.folder / TRAINED
    then = this.progress.get("trained", {}).get("limits")
    if not this.resuming or then is None or not file.is_file():
        return False
    if any(then.get(key) != value for key, value in limits.items()):  # an older version noted fewer
        return False
    checkpoint = read_checkpoint(file)
    insert_plan(this.module, Plan.from_dict(checkpoint[CHECKPOINT_KEY]))
    this.module.load_state_dict(checkpoint["state_dict"])
    return True


def _best_file(this: Workspace, trainer: pl.Trainer) -> str | None:
    """The checkpoint that was best in validation (not on the test set), as seen from the run's folder."""
    kept = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.monitor]
    return os.path.relpath(kept[0].best_model_path, this.folder) if kept and kept[0].best_model_path else None


def _best(this: Workspace) -> float | None:
    """The metric of the best checkpoint, if it has the grids of the policy: an annealed run's may be from before
    they were reached.
    """
    best = this.progress["trained"]["best"]
    if best is None or not (this.folder / best).is_file():
        return None
    checkpoint = read_checkpoint(this.folder / best)
    plan = plan_of(this.module)
    if Plan.from_dict(checkpoint[CHECKPOINT_KEY]) != plan:
        return None
    last = {key: value.clone() for key, value in this.module.state_dict().items()}
    this.module.load_state_dict(checkpoint["state_dict"])
    try:
        return this.measure()
    finally:
        this.module.load_state_dict(last)
