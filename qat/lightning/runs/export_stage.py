"""Files that a run writes for others: the float model and the integers, verified and measured."""

from pathlib import Path

import pytorch_lightning as pl
from omegaconf import DictConfig
from torch import Tensor, nn

from qat.config.instantiate import instantiate
from qat.convert import EVERYTHING, conversion_refusal, convert
from qat.errors import UserError
from qat.export.bench import latency_ms
from qat.export.manifest import files_bytes
from qat.export.onnx.export import export_onnx, traceable
from qat.export.onnx.runtime import OnnxRunner
from qat.export.packed import WEIGHTS, save_packed
from qat.export.target import Runner, Target
from qat.export.verify import Verdict
from qat.insert import plan_of
from qat.lightning.runs.evaluate import verify_file
from qat.lightning.runs.workspace import ON_THE_CPU, Workspace
from qat.lightning.steps import example_input
from qat.run_files import FLOAT_ONNX


def export_stage(run: Workspace) -> Verdict | None:
    """Converts, writes the files, verifies and measures them."""
    with run.stage("exported", "Exported") as values:
        plan = plan_of(run.module)
        if not conversion_refusal(plan, EVERYTHING):
            save_packed(convert(run.module, plan, EVERYTHING), plan, run.folder)
            run.progress.packed_bytes = (run.folder / WEIGHTS).stat().st_size
        if run.target is None:
            return None
        prepared = run.target.prepared(run.module, plan)
        example, path = _example(run), run.folder / run.target.file
        run.target.export(prepared, plan, example, path)
        values["bytes"] = files_bytes(path)
        verdict = verdict_on(run, run.target, prepared, float_model_of(run.cfg))
        values |= {"metric": verdict.facts["metric"], "agreement": verdict.facts["agreement"]}
        if example is not None:
            runners: dict[str, Runner] = {"exported": run.target.load(path, float_model_of(run.cfg), threads=1)}
            if (float_file := run.folder / FLOAT_ONNX).is_file():
                runners["float"] = OnnxRunner(float_file, threads=1)
            measured = latency_ms(runners, example[:1].numpy())
            values["latency_ms"] = measured["exported"]
            run.progress.stages["float"]["latency_ms"] = measured.get("float")
    return verdict


def verdict_on(
    run: Workspace, target: Target, prepared: nn.Module, float_model: nn.Module, file: Path | None = None
) -> Verdict:
    """Verifies a file (by default the target's, in the run's folder) against the module as it is: on the CPU, where
    the runtimes compute, and where sums of codes are exact.
    """
    stages = run.progress.stages
    trained = (stages.get("qat") or stages["ptq"])["metric"]
    trainer = run.measuring(**ON_THE_CPU)
    return verify_file(
        file or run.folder / target.file, target, prepared, float_model, trainer, run.module, run.data,
        run.cfg.metric, trained,
    )  # fmt: skip


def float_model_of(cfg: DictConfig) -> pl.LightningModule:
    """The module as its class makes it: an architecture for formats that hold no graph."""
    model = instantiate(cfg.model)
    model.configure_model()
    return model


def export_float(run: Workspace) -> int | None:
    """Writes the float model as ONNX, to compare size and speed with; returns the file's size in bytes, `None` if
    it has no such form and the target does not ask for one.
    """
    path, example = run.folder / FLOAT_ONNX, _example(run)
    if example is None:
        return None
    try:
        export_onnx(run.module, example, path)
    except UserError:
        if run.target is not None and run.target.graph == "onnx":
            raise
        return None
    return files_bytes(path)


def _example(run: Workspace) -> Tensor | None:
    """Example input of forward; `None` if it does not take one tensor and return one, and the target does not ask."""
    if run.target is not None and run.target.graph is not None:  # `check` has tried it out
        return example_input(run.module, run.data.train_dataloader)
    try:
        example = example_input(run.module, run.data.train_dataloader)
        traceable(run.module, example)
        return example
    except UserError:
        return None
