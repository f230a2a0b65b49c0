"""Files that a run writes for others: the float model and the integers, verified and measured."""

from pathlib import Path

import pytorch_lightning as pl
from omegaconf import DictConfig
from torch import Tensor, nn

from qat.config.instantiate import instantiate
from qat.convert import EVERYTHING, conversion_refusal, convert
from qat.errors import UserError
from qat.export.manifest import files_bytes
from qat.export.onnx.export import export_onnx, traceable
from qat.export.onnx.runtime import OnnxRunner, latency_ms
from qat.export.packed import WEIGHTS, save_packed
from qat.export.target import Runner, Target
from qat.export.verify import Verdict
from qat.insert import plan_of
from qat.lightning.runs.evaluate import verify_file
from qat.lightning.runs.workspace import ON_THE_CPU, Workspace
from qat.lightning.steps import example_input
from qat.run_files import FLOAT_ONNX


def export_stage(this: Workspace) -> Verdict | None:
    """Converts, writes the files, verifies and measures them."""
    with this.stage("exported", "Exported") as values:
        plan = plan_of(this.module)
        if not conversion_refusal(plan, EVERYTHING):
            save_packed(convert(this.module, plan, EVERYTHING), plan, this.folder)
            this.progress["packed_bytes"] = (this.folder / WEIGHTS).stat().st_size
        if this.target is None:
            return None
        prepared = this.target.prepared(this.module, plan)
        example, path = _example(this), this.folder / this.target.file
        this.target.export(prepared, plan, example, path)
        values["bytes"] = files_bytes(path)
        verdict = verdict_on(this, this.target, prepared, float_model_of(this.cfg))
        values |= {"metric": verdict.facts["metric"], "agreement": verdict.facts["agreement"]}
        if example is not None:
            runners: dict[str, Runner] = {"exported": this.target.load(path, float_model_of(this.cfg), threads=1)}
            if (float_file := this.folder / FLOAT_ONNX).is_file():
                runners["float"] = OnnxRunner(float_file, threads=1)
            measured = latency_ms(runners, example[:1].numpy())
            values["latency_ms"] = measured["exported"]
            this.progress["stages"]["float"]["latency_ms"] = measured.get("float")
    return verdict


def verdict_on(
    this: Workspace, target: Target, prepared: nn.Module, float_model: nn.Module, file: Path | None = None
) -> Verdict:
    """Verifies a file (by default the target's, in the run's folder) against the module as it is: on the CPU, where
    the runtimes compute, and where sums of codes are exact.
    """
    stages = this.progress["stages"]
    trained = (stages.get("qat") or stages["ptq"])["metric"]
    trainer = this.measuring(**ON_THE_CPU)
    return verify_file(
        file or this.folder / target.file, target, prepared, float_model, trainer, this.module, this.data,
        this.cfg.metric, trained,
    )  # fmt: skip


def float_model_of(cfg: DictConfig) -> pl.LightningModule:
    """The module as its class makes it: an architecture for formats that hold no graph."""
    model = instantiate(cfg.model)
    model.configure_model()
    return model


def export_float(this: Workspace) -> int | None:
    """Writes the float model as ONNX, to compare size and speed with; returns the file's size in bytes, `None` if
    it has no such form and the target does not ask for one.
    """
    path, example = this.folder / FLOAT_ONNX, _example(this)
    if example is None:
        return None
    try:
        export_onnx(this.module, example, path)
    except UserError:
        if this.target is not None and this.target.graph == "onnx":
            raise
        return None
    return files_bytes(path)


def _example(this: Workspace) -> Tensor | None:
    """Example input of forward; `None` if it does not take one tensor and return one, and the target does not ask."""
    if this.target is not None and this.target.graph is not None:  # `check` has tried it out
        return example_input(this.module, this.data.train_dataloader)
    try:
        example = example_input(this.module, this.data.train_dataloader)
        traceable(this.module, example)
        return example
    except UserError:
        return None
