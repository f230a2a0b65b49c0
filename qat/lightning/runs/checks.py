"""What can be wrong with a run and shows only when its parts meet: looked for on copies, before anything is written."""

from collections.abc import Mapping
from pathlib import Path

import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from pytorch_lightning.accelerators import CPUAccelerator
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities import rank_zero_warn

from qat.config.configs import trains
from qat.config.instantiate import under
from qat.copies import copied
from qat.errors import UserError
from qat.export.onnx.export import traceable
from qat.export.onnx.trace import check_trace
from qat.export.packed import PackedTarget
from qat.files import make_folder
from qat.insert import apply_plan
from qat.lightning.base import QuantizationCallback
from qat.lightning.runs.evaluate import check_monitors, test_metric
from qat.lightning.runs.workspace import Workspace
from qat.lightning.steps import attach, example_input, run_steps
from qat.measure.storage import with_bytes
from qat.planning.audit import audit, check_coverage
from qat.planning.planner import make_plan
from qat.run_files import LAST_CHECKPOINT


def check(run: Workspace) -> None:
    """Tries files, metric, policy and callbacks: mistakes would else show after float training.

    Raises:
        UserError: for the first mistake.
    """
    _check_places(run)
    run.qat_callback()  # whose `start` is built anew for each trainer
    shell = copied(run.module)
    one = {key: int(run.cfg.trainer.get(key) != 0) for key in ("limit_test_batches", "limit_val_batches")}
    trainer = run.measuring(**one, enable_progress_bar=False)
    _warn_of_slow_precision(run, trainer)
    test_metric(trainer, shell, run.data, run.cfg.metric)
    if run.target is not None and run.target.graph is not None:
        example = example_input(shell, run.data.train_dataloader)
        check_trace(traceable(shell, example), example)
    if run.policy.is_off:
        return
    check_monitors(trainer, shell, run.data, _monitors(run.callbacks, run.cfg.val_metric))
    _quantize(run, shell)
    if trains(run.cfg) and not (run.progress.resuming and (run.folder / LAST_CHECKPOINT).is_file()):
        _check_callbacks(run, shell)


def _warn_of_slow_precision(run: Workspace, trainer: pl.Trainer) -> None:
    """Without fast kernels for it, bfloat16 takes up to nine times as long as float32 (ResNet-20, AVX2)."""
    precision = str(run.cfg.trainer.get("precision"))
    if not trains(run.cfg) or "16" not in precision or not isinstance(trainer.accelerator, CPUAccelerator):
        return
    if torch.backends.mkldnn.is_available() and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        rank_zero_warn(
            f"trainer.precision={precision}: torch has no fast kernels of bfloat16 for this processor, and may take "
            "several times as long as with trainer.precision=32-true"
        )


def _check_places(run: Workspace) -> None:
    """Raises if a file could not be written where it is to be."""
    if (cache := run.cfg.cache_dir) is not None:
        make_folder(Path(cache), "cache_dir")
    for target in (run.target, PackedTarget()):
        if target is not None:
            target.check_place(run.folder / target.file)


def _monitors(callbacks: Mapping[str, Callback], val_metric: str) -> dict[str, str]:
    """Metrics that callbacks look at, by config key; empty if one of the user's own callbacks may be what logs them."""
    homes = {type(callback).__module__.partition(".")[0] for callback in callbacks.values()}
    if not homes <= {"qat", "pytorch_lightning"}:
        return {}
    found = {key: getattr(callback, "monitor", None) for key, callback in callbacks.items()}
    names = {key: name for key, name in found.items() if isinstance(name, str)}
    return {"val_metric" if name == val_metric else f"{key}.monitor": name for key, name in names.items()}


def _quantize(run: Workspace, shell: pl.LightningModule) -> None:
    """Puts the policy's quantizers into the copy, and lets the run account for what is integer."""
    plan, recording = make_plan(shell, run.policy, run_steps(shell, run.data.train_dataloader, samples=1))
    if run.target is not None and (reason := run.target.refusal(shell, plan)):
        raise UserError(f"export: {reason}")
    apply_plan(shell, plan)
    for caution in run.target.cautions(shell, plan) if run.target is not None else ():
        rank_zero_warn(f"export: {caution}")
    run.audit = lambda plan: with_bytes(audit(shell, plan, recording), shell, plan)
    run.audit_rows = run.audit(plan)
    check_coverage(run.audit_rows, run.policy.required_coverage)


def _check_callbacks(run: Workspace, shell: pl.LightningModule) -> None:
    """Has callbacks check what they would find when training starts, on a copy of the module with quantizers."""
    trainer = run.training(default_root_dir=str(run.folder))
    attach(trainer, shell, run.data)
    for key, callback in run.callbacks.items():
        if not isinstance(callback, QuantizationCallback):
            continue
        try:
            callback.check(trainer, shell)
        except UserError as error:
            raise UserError(under(key, error.text, OmegaConf.select(run.cfg, key))) from error
