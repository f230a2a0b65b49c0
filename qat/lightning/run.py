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
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Checkpoint, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from safetensors.torch import save_file
from torch import Tensor, nn

from qat import __version__
from qat.config.instantiate import instantiate
from qat.convert import EVERYTHING, convert, inconvertible
from qat.errors import UserError
from qat.export.manifest import companions, files_bytes
from qat.export.onnx.export import export_onnx, traceable
from qat.export.onnx.runtime import OnnxRunner, latency_ms
from qat.export.packed import MANIFEST, WEIGHTS, save_packed
from qat.export.target import Runner, Target
from qat.export.verify import Verdict
from qat.files import atomic, claimed
from qat.insert import Plan
from qat.kernels.memory import keep_freed
from qat.lightning.cache import FloatCache
from qat.lightning.calm import calm
from qat.lightning.evaluate import test_metric, verify_file
from qat.lightning.logs import finish, log_results
from qat.lightning.module import insert_plan
from qat.lightning.resume import SeedEpochs, continue_csv
from qat.lightning.steps import example_input, run_steps
from qat.lightning.weights import CHECKPOINT_KEY, load_weights, read_checkpoint
from qat.lightning.workspace import ON_THE_CPU, Workspace
from qat.planning.audit import bops, coverage, to_dict
from qat.report import audit_table, layer_rows, report_table, save_plot
from qat.run_files import AUDIT, FLOAT_ONNX, FLOAT_WEIGHTS, LAST_CHECKPOINT, REPORT, REPORT_PICTURE, TRAINED
from qat.stats import quantizer_stats

STATISTICS_SAMPLES = 256
LIMITS = ("max_epochs", "min_epochs", "max_steps", "min_steps", "max_time")
"""Settings of the trainer that say when training ends."""


class Run(Workspace):
    """The stages of a run, in order."""

    def float_stage(self) -> None:
        """Trains in float, unless a checkpoint was given, and measures the float model."""
        weights = self.folder / FLOAT_WEIGHTS
        if self.done("float"):
            load_weights(self.module, weights)
            return
        cache = FloatCache(self.cfg, self.progress["start"], self.main)
        with self.stage("float", "Float") as values, cache.locked():
            if (shared := cache.load(self.folder)) is not None:
                values |= shared
                load_weights(self.module, cache.weights)
                return
            if not self.progress["start"]:
                self._train_float()
            values["metric"] = self.measure()
            if self.main:
                values["bytes"] = self._export_float()
                with atomic(weights) as temporary:
                    save_file(_apart(self.module.state_dict()), temporary)
                cache.save(self.folder, values)

    def _train_float(self) -> None:
        checkpoint = ModelCheckpoint(self.folder / "float", filename="last", enable_version_counter=False)
        logger = CSVLogger(self.folder, "float", "")
        last = self._resume_from(self.folder / "float" / "last.ckpt", logger)
        callbacks = [SeedEpochs(self.cfg.seed), checkpoint]
        trainer = self.trainer(
            max_epochs=self.cfg.float_epochs, callbacks=callbacks, logger=logger, enable_checkpointing=True
        )
        trainer.fit(self.float_module, datamodule=self.data, ckpt_path=last, weights_only=True)
        self.module.load_state_dict(self.float_module.state_dict())

    def ptq_stage(self) -> None:
        """Inserts, calibrates and measures, before any training."""
        if self.done("ptq"):
            return
        with self.stage("ptq", "Calibrated (PTQ)") as values:
            values["metric"] = self.measure(callbacks=[self.qat_callback()])

    def qat_stage(self) -> None:
        """Trains with fake quantization; where that is to take no step, keeps what was calibrated."""
        with self.stage("qat", "Quantization-aware training" if self.trains else None) as values:
            callbacks = [self.qat_callback(), SeedEpochs(self.cfg.seed), *self.callbacks]
            saves = any(isinstance(callback, Checkpoint) for callback in callbacks)  # else Lightning adds its own
            trainer = self.trainer(callbacks=callbacks, logger=self.loggers, enable_checkpointing=saves)
            limits = OmegaConf.to_container(OmegaConf.masked_copy(self.cfg.trainer, list(LIMITS)))
            if not self._load_trained(limits):
                last = self._resume_from(self.folder / LAST_CHECKPOINT, *self.loggers)
                try:
                    trainer.fit(self.module, datamodule=self.data, ckpt_path=last, weights_only=True)
                except UserError:
                    if not trainer.global_step:  # what corrects it may change what is calibrated
                        self.progress["stages"].pop("ptq", None)
                        self.remember()
                    raise
                trainer.save_checkpoint(self.folder / TRAINED, weights_only=True)  # whole or not at all
                # The first process is alone from here on: nothing may wait for the others.
                if torch.distributed.is_initialized():
                    torch.distributed.destroy_process_group()
                self.progress["trained"] = {"limits": limits, "best": self._best_file(trainer)}
                self.remember()
            if self.trains:
                values["metric"] = self.measure()
            if (best := self._best()) is not None:
                values["best"] = best

    def _load_trained(self, limits: Any) -> bool:
        """Loads what training to the same limits ended with, if it did: Lightning runs an epoch more or none, and
        without one leaves out what callbacks do at the end of training (averages take the place of weights then).
        """
        file = self.folder / TRAINED
        if not self.resuming or self.progress.get("trained", {}).get("limits") != limits or not file.is_file():
            return False
        checkpoint = read_checkpoint(file)
        insert_plan(self.module, Plan.from_dict(checkpoint[CHECKPOINT_KEY]))
        self.module.load_state_dict(checkpoint["state_dict"])
        return True

    def _best_file(self, trainer: pl.Trainer) -> str | None:
        """The checkpoint that was best in validation (not on the test set), as seen from the run's folder."""
        kept = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.monitor]
        return os.path.relpath(kept[0].best_model_path, self.folder) if kept and kept[0].best_model_path else None

    def _best(self) -> float | None:
        """The metric of the best checkpoint, if it has the grids of the policy: an annealed run's may be from before
        they were reached.
        """
        best = self.progress["trained"]["best"]
        if best is None or not (self.folder / best).is_file():
            return None
        checkpoint = read_checkpoint(self.folder / best)
        plan = self.module.quantization_plan
        assert isinstance(plan, Plan)
        if Plan.from_dict(checkpoint[CHECKPOINT_KEY]) != plan:
            return None
        last = {key: value.clone() for key, value in self.module.state_dict().items()}
        self.module.load_state_dict(checkpoint["state_dict"])
        try:
            return self.measure()
        finally:
            self.module.load_state_dict(last)

    def audit_trained(self) -> None:
        """Accounts for the model once more if training has changed bits for good (`LearnBits`)."""
        plan = self.module.quantization_plan
        assert isinstance(plan, Plan)
        rows = self.audit(plan)
        if rows != self.audit_rows:
            self.audit_rows = rows
            self.console.print(audit_table(rows, coverage(rows)))
            self.write_json(AUDIT, to_dict(rows))

    def _resume_from(self, last: Path, *loggers: Any) -> str | None:
        """The checkpoint to go on from, if this run was interrupted after it was written."""
        if not self.resuming or not last.is_file():
            return None
        step = read_checkpoint(last)["global_step"]
        for logger in loggers:
            if self.main and isinstance(logger, CSVLogger):
                continue_csv(logger, step)
        return str(last)

    def export_stage(self) -> Verdict | None:
        """Converts, writes the files, verifies and measures them."""
        with self.stage("exported", "Exported") as values:
            plan = self.module.quantization_plan
            assert isinstance(plan, Plan)
            if not inconvertible(plan, EVERYTHING):
                save_packed(convert(self.module, plan, EVERYTHING), plan, self.folder)
                self.progress["packed_bytes"] = (self.folder / WEIGHTS).stat().st_size
            if self.target is None:
                return None
            prepared = self.target.prepared(self.module, plan)
            example, path = self._example(), self.folder / self.target.file
            self.target.export(prepared, plan, example, path)
            values["bytes"] = files_bytes(path)
            verdict = self.verify(self.target, prepared, self._float())
            values |= {"metric": verdict.facts["metric"], "agreement": verdict.facts["agreement"]}
            if example is not None:
                runners: dict[str, Runner] = {"exported": self.target.load(path, self._float(), threads=1)}
                if (float_file := self.folder / FLOAT_ONNX).is_file():
                    runners["float"] = OnnxRunner(float_file, threads=1)
                measured = latency_ms(runners, example[:1].numpy())
                values["latency_ms"] = measured["exported"]
                self.progress["stages"]["float"]["latency_ms"] = measured.get("float")
        return verdict

    def measure(self, **settings: Any) -> float:
        """The metric of the module as it is, over the test set."""
        return test_metric(self.measuring(**settings), self.module, self.data, self.cfg.metric)

    def verify(self, target: Target, prepared: nn.Module, float_model: nn.Module, file: Path | None = None) -> Verdict:
        """Verifies a file (by default the target's, in the run's folder) against the module as it is: on the CPU, where
        the runtimes compute, and where sums of codes are exact.
        """
        stages = self.progress["stages"]
        trained = (stages.get("qat") or stages["ptq"])["metric"]
        trainer = self.measuring(**ON_THE_CPU)
        return verify_file(
            file or self.folder / target.file, target, prepared, float_model, trainer, self.module, self.data,
            self.cfg.metric, trained,
        )  # fmt: skip

    def _float(self) -> pl.LightningModule:
        """The module as its class makes it: an architecture for formats that hold no graph."""
        model = instantiate(self.cfg.model)
        model.configure_model()
        return model

    def _example(self) -> Tensor | None:
        """What forward takes; `None` if it does not take one tensor and return one, and the target does not ask."""
        if self.target is not None and self.target.graph is not None:  # `check` has tried it out
            return example_input(self.module, self.data.train_dataloader)
        try:
            example = example_input(self.module, self.data.train_dataloader)
            traceable(self.module, example)
            return example
        except UserError:
            return None

    def _export_float(self) -> int | None:
        """Writes the float model as ONNX, to compare size and speed with; returns the file's size in bytes, `None` if
        it has no such form and the target does not ask for one.
        """
        path, example = self.folder / FLOAT_ONNX, self._example()
        if example is None:
            return None
        try:
            export_onnx(self.module, example, path)
        except UserError:
            if self.target is not None and self.target.graph == "onnx":
                raise
            return None
        return files_bytes(path)

    def report(self, verdict: Verdict | None) -> dict[str, Any]:
        """Writes and shows the report."""
        report: dict[str, Any] = {
            "name": self.cfg.name, "metric": self.cfg.metric, "higher_is_better": self.cfg.mode == "max",
            "version": __version__, **self.progress,
        }  # fmt: skip
        if not self.policy.is_off:
            batches = run_steps(self.module, self.data.train_dataloader, STATISTICS_SAMPLES)
            report["bops"] = bops(self.audit_rows)
            report["layers"] = layer_rows(self.audit_rows, quantizer_stats(self.module, batches))
        if self.cfg.quant.get("predicted"):
            report["predicted"] = OmegaConf.to_container(self.cfg.quant.predicted)
        if verdict is not None:
            report["verify"] = verdict.to_dict()
        self.write_json(REPORT, report)
        save_plot(report, self.folder / REPORT_PICTURE)
        self.console.print(report_table(report))
        return report


def _apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy on the CPU of which every key has memory of its own: safetensors refuses tied parameters."""
    return {key: value.cpu().clone(memory_format=torch.contiguous_format) for key, value in state.items()}


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
        this = Run(cfg, run_dir)
        this.check()
        if this.main:
            taken = f"run_dir={run_dir}: a run is going on in this folder, in another process"
            held.enter_context(claimed(run_dir / ".running", taken))
        this.remember()
        try:
            verdict = _stages(this)
            if not this.main:
                return math.nan
            report = this.report(verdict)
            exported = companions(run_dir / this.target.file) if this.target is not None else []
            files = [*exported, *(run_dir / name for name in (WEIGHTS, MANIFEST, REPORT, REPORT_PICTURE))]
            log_results(this.loggers, report, [f for f in files if f.is_file()])
        finally:
            finish()
    if verdict is not None and not verdict.passed:
        raise SystemExit(1)
    return [stage["metric"] for stage in report["stages"].values() if "metric" in stage][-1]


def _stages(this: Run) -> Verdict | None:
    this.float_stage()
    if this.policy.is_off:
        return None
    this.console.print(audit_table(this.audit_rows, coverage(this.audit_rows)))
    this.write_json(AUDIT, to_dict(this.audit_rows))
    this.ptq_stage()
    this.qat_stage()
    this.audit_trained()
    return this.export_stage() if this.main else None
