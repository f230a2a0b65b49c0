"""One run, from config to proof: float -> calibrated -> trained -> integers -> file -> verdict -> table.

Everything a run writes is in its folder. `progress.json` remembers what earlier stages measured, so that a run that
was killed resumes (`ckpt=last`) where it stopped:

    float.safetensors, float.onnx      the float model it started from (ONNX if it has that form)
    float/, csv/                       logs of float training and of what follows
    checkpoints/{last,best}.ckpt       training states
    quantized.ckpt                     the trained model with its scales
    model.safetensors, manifest.json   the packed integers
    model.onnx                         the file for the runtime
    audit.json                         what is integer, what is float and why
    report.json, report.png            the table at the end
"""

import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf

from qat import __version__
from qat.export.manifest import companions
from qat.export.packed import MANIFEST, WEIGHTS
from qat.export.verify import Verdict
from qat.files import claimed
from qat.kernels.memory import keep_freed
from qat.lightning.logs import close_wandb, log_results
from qat.lightning.runs.checks import check
from qat.lightning.runs.export_stage import export_stage
from qat.lightning.runs.float_stage import float_stage
from qat.lightning.runs.qat_stage import audit_trained, ptq_stage, qat_stage
from qat.lightning.runs.quiet import calm
from qat.lightning.runs.workspace import Workspace
from qat.lightning.steps import run_steps
from qat.measure.stats import quantizer_stats
from qat.planning.audit import bops, coverage, to_dict
from qat.report import audit_table, layer_rows, report_table, save_plot
from qat.run_files import AUDIT, REPORT, REPORT_PICTURE
from qat.stages import final_metric

STATISTICS_SAMPLES = 256


def run(cfg: DictConfig, run_dir: Path) -> float:
    """Runs the whole path; `qat train` calls it with the composed config.

    Returns:
        The metric of the last stage (what a sweep optimizes).

    Raises:
        UserError: for mistakes in the config, before anything is written; if the run is going on in another process.
        SystemExit: with status 1 if the exported file falls short.
    """
    keep_freed()
    with calm(), ExitStack() as held:
        pl.seed_everything(cfg.seed, workers=True, verbose=False)
        workspace = Workspace(cfg, run_dir)
        check(workspace)
        if workspace.main:
            taken = f"run_dir={run_dir}: a run is going on in this folder, in another process"
            held.enter_context(claimed(run_dir / ".running", taken))
        workspace.progress.save()
        try:
            verdict = _stages(workspace)
            if not workspace.main:
                return math.nan
            report = _report(workspace, verdict)
            exported = companions(run_dir / workspace.target.file) if workspace.target is not None else []
            files = [*exported, *(run_dir / name for name in (WEIGHTS, MANIFEST, REPORT, REPORT_PICTURE))]
            log_results(workspace.loggers, report, [f for f in files if f.is_file()])
        finally:
            close_wandb()
    if verdict is not None and not verdict.passed:
        raise SystemExit(1)
    metric = final_metric(report)
    assert metric is not None  # every run measures the float model
    return metric


def _stages(run: Workspace) -> Verdict | None:
    float_stage(run)
    if run.policy.is_off:
        return None
    run.console.print(audit_table(run.audit_rows, coverage(run.audit_rows)))
    run.write_json(AUDIT, to_dict(run.audit_rows))
    ptq_stage(run)
    qat_stage(run)
    audit_trained(run)
    return export_stage(run) if run.main else None


def _report(run: Workspace, verdict: Verdict | None) -> dict[str, Any]:
    """Writes and shows the report."""
    report: dict[str, Any] = {
        "name": run.cfg.name, "metric": run.cfg.metric, "higher_is_better": run.cfg.mode == "max",
        "version": __version__, **run.progress.to_dict(),
    }  # fmt: skip
    if not run.policy.is_off:
        batches = run_steps(run.module, run.data.train_dataloader, STATISTICS_SAMPLES)
        report["bops"] = bops(run.audit_rows)
        report["layers"] = layer_rows(run.audit_rows, quantizer_stats(run.module, batches))
    if run.cfg.quant.get("predicted"):
        report["predicted"] = OmegaConf.to_container(run.cfg.quant.predicted)
    if verdict is not None:
        report["verify"] = verdict.to_dict()
    run.write_json(REPORT, report)
    save_plot(report, run.folder / REPORT_PICTURE)
    run.console.print(report_table(report))
    return report
