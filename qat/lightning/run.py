"""One run, from config to proof: float -> calibrated -> trained -> integers -> file -> verdict -> table.

Everything a run writes is in its folder. `progress.json` remembers what earlier stages measured, so that a run that was killed resumes (`ckpt=last`) where it stopped:

    float.safetensors, float.onnx      the float model it started from        checkpoints/{last,best}.ckpt     training states
    quantized.ckpt                     the trained model with its scales      model.onnx                       the file for the runtime
    model.safetensors, manifest.json   the packed integers                    audit.json                       what is integer, what is float and why
    report.json, report.png            the table at the end
"""

import copy
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.loggers import CSVLogger
from rich.console import Console
from safetensors.torch import save_file

from qat import __version__
from qat.audit import audit, coverage, to_dict
from qat.cli.instantiate import instantiate
from qat.convert import convert
from qat.errors import UserError
from qat.export.files import atomic
from qat.export.onnx import OnnxTarget, export_onnx
from qat.export.packed import MANIFEST, WEIGHTS, save_packed
from qat.export.runtime import OnnxRunner, latency_ms
from qat.export.verify import Verdict
from qat.insert import Plan, apply_plan, make_plan
from qat.lightning.callback import QATCallback
from qat.lightning.evaluate import test_metric, verify_onnx
from qat.lightning.logs import finish, log_results
from qat.lightning.module import load_from_checkpoint
from qat.lightning.resume import SeedEpochs
from qat.lightning.steps import example_input, run_steps
from qat.lightning.weights import load_weights
from qat.policy import QuantPolicy
from qat.report import audit_table, layer_rows, report_table, save_plot
from qat.stats import quantizer_stats

POLICY_KEYS = ("weight", "act", "sites", "rules")
STATISTICS_SAMPLES = 256


class Run:
    """A run's config, data and folder, and what it has measured so far.

    Args:
        cfg: The composed and resolved config (see configs/train.yaml).
        folder: Where everything is written.

    Raises:
        UserError: if anything in the config is wrong that can be known before training.
    """

    def __init__(self, cfg: DictConfig, folder: Path) -> None:
        self.cfg, self.folder = cfg, folder
        self.console = Console()
        settings = OmegaConf.to_container(cfg.quant, resolve=True)
        assert isinstance(settings, dict)
        self.policy = QuantPolicy.from_dict(
            {str(k): v for k, v in settings.items() if k not in ("calibration_samples", "scale_lr")}
        )
        self.resuming = cfg.ckpt == "last"
        self.progress: dict[str, Any] = {"stages": {}, "seconds": {}}
        if self.resuming:
            self._recall()
        self.data: pl.LightningDataModule = instantiate(cfg.data)
        self.data.prepare_data()
        self.data.setup("fit")
        self.module: pl.LightningModule = instantiate(cfg.model)
        if not self.policy.is_off:
            self._check_policy()
        if cfg.ckpt and not self.resuming:
            load_weights(self.module, cfg.ckpt)

    def _check_policy(self) -> None:
        """A rule that matches nothing, or a grid that does not fit a layer, is an error now rather than after float training."""
        shell = copy.deepcopy(self.module)
        plan, recording = make_plan(shell, self.policy, run_steps(shell, self.data.train_dataloader, samples=1))
        apply_plan(shell, plan)
        self.audit_rows = audit(shell, plan, recording)

    def _recall(self) -> None:
        path = self.folder / "progress.json"
        if not path.is_file():
            raise UserError(f"ckpt=last: there is no run to resume in {self.folder}; name its folder with run_dir=...")
        self.progress = json.loads(path.read_text())

    @contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        """Times a stage and remembers what it measured once it is complete."""
        start, values = time.perf_counter(), {}
        pl.seed_everything(self.cfg.seed, workers=True, verbose=False)
        yield values
        if values:
            self.progress["stages"].setdefault(name, {}).update(values)
        self.progress["seconds"][name] = round(time.perf_counter() - start, 2)
        with atomic(self.folder / "progress.json") as temporary:
            temporary.write_text(json.dumps(self.progress, indent=1))

    def done(self, name: str) -> bool:
        return name in self.progress["stages"]

    def trainer(self, **settings: Any) -> pl.Trainer:
        return instantiate(self.cfg.trainer, **{"logger": False, "enable_checkpointing": False, **settings})

    def qat_callback(self) -> QATCallback:
        quant = self.cfg.quant
        return QATCallback(self.policy, calibration_samples=quant.calibration_samples, scale_lr_factor=quant.scale_lr)

    # -- stages ------------------------------------------------------------------------------------------------------------

    def float_stage(self) -> None:
        """Trains in float, unless a checkpoint was given, and measures the float model."""
        weights = self.folder / "float.safetensors"
        if self.done("float"):
            load_weights(self.module, weights)
            return
        with self.stage("float") as values:
            if not self.cfg.ckpt or self.resuming:
                self._train_float()
            values["metric"] = test_metric(self.trainer(), self.module, self.data, self.cfg.metric)
            values["bytes"] = self._export(self.module, "float.onnx")
            with atomic(weights) as temporary:
                save_file({k: v.cpu().contiguous() for k, v in self.module.state_dict().items()}, temporary)

    def _train_float(self) -> None:
        module = instantiate(self.cfg.model, **(self.cfg.float_model or {}))
        checkpoint = pl.callbacks.ModelCheckpoint(
            self.folder / "float", save_last=True, save_top_k=0, enable_version_counter=False
        )
        last = self.folder / "float" / "last.ckpt"
        trainer = self.trainer(
            max_epochs=self.cfg.float_epochs,
            callbacks=[SeedEpochs(self.cfg.seed), checkpoint],
            logger=CSVLogger(self.folder, "float", ""),
            enable_checkpointing=True,
        )
        trainer.fit(module, datamodule=self.data, ckpt_path=str(last) if self.resuming and last.is_file() else None)
        self.module.load_state_dict(module.state_dict())

    def ptq_stage(self) -> None:
        """Inserts, calibrates and measures, before any training."""
        if self.done("ptq"):
            return
        with self.stage("ptq") as values:
            values["metric"] = test_metric(
                self.trainer(callbacks=[self.qat_callback()]), self.module, self.data, self.cfg.metric
            )

    def qat_stage(self) -> None:
        """Trains with fake quantization."""
        last = self.folder / "checkpoints" / "last.ckpt"
        with self.stage("qat") as values:
            callbacks = [
                self.qat_callback(),
                SeedEpochs(self.cfg.seed),
                *(instantiate(c) for c in (self.cfg.callbacks or {}).values() if c),
            ]
            self.loggers = [instantiate(self.cfg.logger)] if self.cfg.logger else []
            trainer = self.trainer(callbacks=callbacks, logger=self.loggers, enable_checkpointing=True)
            trainer.fit(
                self.module, datamodule=self.data, ckpt_path=str(last) if self.resuming and last.is_file() else None
            )
            values["metric"] = test_metric(self.trainer(), self.module, self.data, self.cfg.metric)
            trainer.save_checkpoint(self.folder / "quantized.ckpt", weights_only=True)

    def export_stage(self) -> Verdict | None:
        """Converts, writes the files, verifies and measures them."""
        with self.stage("exported") as values:
            plan = self.module.quantization_plan
            assert isinstance(plan, Plan)
            converted = convert(self.module, plan)
            save_packed(converted, plan, self.folder)
            if self.cfg.export is None:
                return None
            target = instantiate(self.cfg.export)
            values["bytes"] = self._export(converted, target.file)
            verdict = self.verify(target, converted)
            values |= {"metric": verdict.facts["metric"], "agreement": verdict.facts["agreement"]}
            runners = {
                "float": OnnxRunner(self.folder / "float.onnx", threads=1),
                "exported": OnnxRunner(self.folder / target.file, threads=1),
            }
            measured = latency_ms(runners)
            values["latency_ms"] = measured["exported"]
            self.progress["stages"]["float"]["latency_ms"] = measured["float"]
        return verdict

    def verify(self, target: OnnxTarget, converted: Any) -> Verdict:
        return verify_onnx(
            self.folder / target.file, target, converted, self.trainer(), self.module, self.data, self.cfg.metric,
            self.progress["stages"]["qat"]["metric"],
        )  # fmt: skip

    def _export(self, model: Any, name: str) -> int:
        """Writes a model as ONNX; returns the file's size in bytes."""
        example = example_input(self.module, self.data.train_dataloader)
        export_onnx(copy.deepcopy(model).cpu(), example, self.folder / name)
        return (self.folder / name).stat().st_size

    # -- the end -----------------------------------------------------------------------------------------------------------

    def report(self, verdict: Verdict | None) -> dict[str, Any]:
        """Writes and shows the report."""
        report: dict[str, Any] = {
            "name": self.cfg.name, "metric": self.cfg.metric, "higher_is_better": self.cfg.mode == "max", "version": __version__, **self.progress,
        }  # fmt: skip
        if not self.policy.is_off:
            statistics = quantizer_stats(
                self.module, run_steps(self.module, self.data.train_dataloader, STATISTICS_SAMPLES)
            )
            report["layers"] = layer_rows(self.audit_rows, statistics)
        if verdict is not None:
            report["verify"] = verdict.to_dict()
        with atomic(self.folder / "report.json") as temporary:
            temporary.write_text(json.dumps(report, indent=1))
        save_plot(report, self.folder / "report.png")
        self.console.print(report_table(report))
        return report


def run(cfg: DictConfig, run_dir: Path) -> float:
    """Runs the whole path; `qat train` calls it with the composed config.

    Returns:
        The metric of the last stage (what a sweep optimizes).

    Raises:
        UserError: for mistakes in the config, before anything is written.
        SystemExit: with status 1 if the exported file falls short.
    """
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    this = Run(cfg, run_dir)
    this.loggers = []
    try:
        this.float_stage()
        verdict = None
        if not this.policy.is_off:
            this.console.print(audit_table(this.audit_rows, coverage(this.audit_rows)))
            with atomic(run_dir / "audit.json") as temporary:
                temporary.write_text(json.dumps(to_dict(this.audit_rows), indent=1))
            this.ptq_stage()
            this.qat_stage()
            verdict = this.export_stage()
        report = this.report(verdict)
        files = [run_dir / name for name in (WEIGHTS, MANIFEST, OnnxTarget.file, "report.json", "report.png")]
        log_results(this.loggers, report, [f for f in files if f.is_file()])
    finally:
        finish(this.loggers)
    if verdict is not None and not verdict.passed:
        raise SystemExit(1)
    return list(report["stages"].values())[-1]["metric"]


def verify(run_dir: Path) -> bool:
    """Checks the exported files of a finished run again, from the files alone.

    Raises:
        UserError: if the folder holds no finished run.
    """
    config = run_dir / ".hydra" / "config.yaml"
    for path in (config, run_dir / "quantized.ckpt", run_dir / "progress.json"):
        if not path.is_file():
            raise UserError(f"{run_dir} holds no finished run: there is no {path.name}")
    cfg = OmegaConf.load(config)
    assert isinstance(cfg, DictConfig)
    cfg.run_dir, cfg.ckpt = str(run_dir), "last"
    OmegaConf.resolve(cfg)
    this = Run(cfg, run_dir)
    this.module = load_from_checkpoint(type(this.module), run_dir / "quantized.ckpt")
    if cfg.export is None:
        raise UserError(f"{run_dir} was run with export=none; there is no file to verify")
    verdict = this.verify(instantiate(cfg.export), convert(this.module, this.module.quantization_plan))  # pyright: ignore[reportArgumentType]
    report = json.loads((run_dir / "report.json").read_text())
    report["verify"] = verdict.to_dict()
    this.console.print(report_table(report))
    return verdict.passed
