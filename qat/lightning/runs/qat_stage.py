"""The quantized part of a run: calibrated, trained with fake quantization, and read back if that was done before."""

import os
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import ModelCheckpoint

from qat.config.configs import trains
from qat.errors import UserError
from qat.insert import plan_of
from qat.lightning.module import insert_plan
from qat.lightning.runs.workspace import Workspace
from qat.lightning.weights import CHECKPOINT_KEY, read_checkpoint
from qat.planning.audit import coverage, to_dict
from qat.planning.plan import Plan
from qat.report import audit_table
from qat.run_files import AUDIT, LAST_CHECKPOINT, TRAINED

LIMITS = ("max_epochs", "min_epochs", "max_steps", "min_steps", "max_time", "limit_train_batches")
"""Settings of the trainer that say how long training takes."""


def ptq_stage(run: Workspace) -> None:
    """Inserts, calibrates and measures, before any training."""
    if "ptq" in run.progress.stages:
        return
    with run.stage("ptq", "Calibrated (PTQ)") as values:
        values["metric"] = run.measure(callbacks=[run.qat_callback()])


def qat_stage(run: Workspace) -> None:
    """Trains with fake quantization; where that is to take no step, keeps what was calibrated."""
    with run.stage("qat", "Quantization-aware training" if trains(run.cfg) else None) as values:
        trainer = run.training(logger=run.loggers)
        limits = OmegaConf.to_container(OmegaConf.masked_copy(run.cfg.trainer, list(LIMITS)))
        if not _load_trained(run, limits):
            last = run.progress.resume_from(run.folder / LAST_CHECKPOINT, *run.loggers)
            run.progress.stages.pop("exported", None)  # of what was trained less
            try:
                trainer.fit(run.module, datamodule=run.data, ckpt_path=last, weights_only=True)
            except UserError:
                if not trainer.global_step:  # what corrects it may change what is calibrated
                    run.progress.stages.pop("ptq", None)
                    run.progress.save()
                raise
            run.check_finite("training", LAST_CHECKPOINT)
            trainer.save_checkpoint(run.folder / TRAINED, weights_only=True)  # whole or not at all
            # The first process is alone from here on: nothing may wait for the others.
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
            run.progress.trained = {"limits": limits, "best": _best_file(run, trainer)}
            run.progress.save()
        if trains(run.cfg):
            values["metric"] = run.measure()
        if (best := _best(run)) is not None:
            values["best"] = best


def audit_trained(run: Workspace) -> None:
    """Accounts for the model once more if training has changed bits for good (`LearnBits`)."""
    plan = plan_of(run.module)
    rows = run.audit(plan)
    if rows != run.audit_rows:
        run.audit_rows = rows
        run.console.print(audit_table(rows, coverage(rows)))
        run.write_json(AUDIT, to_dict(rows))


def _load_trained(run: Workspace, limits: Any) -> bool:
    """Loads the trained model from its file, if training to the same limits has ended. Resuming would not give the
    same: Lightning runs an epoch more or none, and without an epoch it leaves out what callbacks do at the end of
    training (averages take the place of weights then).
    """
    file = run.folder / TRAINED
    then = (run.progress.trained or {}).get("limits")
    if not run.progress.resuming or then is None or not file.is_file():
        return False
    if any(then.get(key) != value for key, value in limits.items()):  # an older version noted fewer
        return False
    checkpoint = read_checkpoint(file)
    insert_plan(run.module, Plan.from_dict(checkpoint[CHECKPOINT_KEY]))
    run.module.load_state_dict(checkpoint["state_dict"])
    return True


def _best_file(run: Workspace, trainer: pl.Trainer) -> str | None:
    """The checkpoint that was best in validation (not on the test set), as seen from the run's folder."""
    kept = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.monitor]
    return os.path.relpath(kept[0].best_model_path, run.folder) if kept and kept[0].best_model_path else None


def _best(run: Workspace) -> float | None:
    """The metric of the best checkpoint, if it has the grids of the policy: an annealed run's may be from before
    they were reached.
    """
    trained = run.progress.trained
    assert trained is not None
    if (best := trained["best"]) is None or not (run.folder / best).is_file():
        return None
    checkpoint = read_checkpoint(run.folder / best)
    plan = plan_of(run.module)
    if Plan.from_dict(checkpoint[CHECKPOINT_KEY]) != plan:
        return None
    last = {key: value.clone() for key, value in run.module.state_dict().items()}
    run.module.load_state_dict(checkpoint["state_dict"])
    try:
        return run.measure()
    finally:
        run.module.load_state_dict(last)
