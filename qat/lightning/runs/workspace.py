"""The workspace of a run, which all stages share: the checked config, the data, the module, the trainers, and what
earlier stages measured.

Everything that can be wrong in a config is looked for before anything is written: each part is built, the policy is
tried on a copy of the module, and one test batch shows whether the metric exists.

Under DDP every process goes through all stages and measures on a device of its own, so that none waits for another
outside of `trainer.fit`; only the first one writes and prints.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Callback, Checkpoint
from pytorch_lightning.loggers import CSVLogger, Logger
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.utilities import rank_zero_only, rank_zero_warn
from rich.console import Console

from qat.config.configs import policy_settings, trains
from qat.config.instantiate import build, under
from qat.config.overrides import going_on
from qat.copies import copied
from qat.errors import UserError
from qat.export.onnx.export import traceable
from qat.export.onnx.trace import check_trace
from qat.export.packed import PackedTarget
from qat.export.target import Target
from qat.files import atomic, make_folder, read_object
from qat.insert import apply_plan, make_plan
from qat.lightning.base import QuantizationCallback
from qat.lightning.callback import QATCallback
from qat.lightning.resume import continue_csv
from qat.lightning.runs.evaluate import check_monitors, test_metric
from qat.lightning.runs.float_cache import FloatCache
from qat.lightning.runs.resume_settings import check_settled, settled
from qat.lightning.shared_ranges import RangeCache
from qat.lightning.spawn import is_spawning
from qat.lightning.steps import attach, example_input, run_steps
from qat.lightning.weights import load_weights, not_finite, read_checkpoint
from qat.measure.storage import with_bytes
from qat.planning.audit import AuditRow, audit, check_coverage
from qat.planning.plan import Plan
from qat.policies.networks import KEY, NetworkPolicies, Policy, policy_of
from qat.run_files import FLOAT_CHECKPOINT, LAST_CHECKPOINT, PROGRESS
from qat.starts import Start

ON_THE_CPU = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto"}
"""How a run's trainer goes on where it need not be as it trained."""
SET_BY_THE_RUN = {
    "logger": "logger=NAME chooses the logger",
    "callbacks": "callbacks.NAME=... adds one",
    "enable_checkpointing": "callbacks.best=null callbacks.last=null leave checkpoints out",
}
"""Arguments of the trainer that cannot be configured as such, and what can be instead."""


class Workspace:
    """Builds all parts of a run; writes nothing.

    Args:
        cfg: The composed and resolved config (see configs/train.yaml).
        folder: The run's folder.

    Raises:
        UserError: if a part of the config is wrong, if there is no run to resume, or another one in the folder.
    """

    def __init__(self, cfg: DictConfig, folder: Path) -> None:
        self.cfg, self.folder = cfg, folder
        self.main = getattr(rank_zero_only, "rank", 0) == 0
        self.console = Console(quiet=not self.main)
        self.resuming = cfg.ckpt == "last"
        self.progress: dict[str, Any] = {"start": cfg.ckpt, "settings": settled(cfg), "stages": {}, "seconds": {}}
        if self.resuming:
            self._recall()
        elif self.main and self._begun():
            raise UserError(
                f"{folder} holds a run: {going_on(folder)} goes on with it; give another a folder of "
                "its own with run_dir=..."
            )
        self.target: Target | None = build(cfg, "export", Target) if cfg.export else None
        self.policy = self._policy()
        self.callbacks = [build(cfg, f"callbacks.{n}", Callback) for n, node in (cfg.callbacks or {}).items() if node]
        self.loggers: list[Any] = [build(cfg, "logger", Logger)] if cfg.logger else []
        for name, instead in SET_BY_THE_RUN.items():
            if name in cfg.trainer:
                raise UserError(f"trainer.{name}: a run has its own; {instead}")
        if is_spawning(self.trainer(logger=False)):
            raise UserError(
                f"trainer.strategy={cfg.trainer.strategy}: what it trains stays in the processes that it starts; "
                "ddp starts them as a run needs"
            )
        self.module = build(cfg, "model", pl.LightningModule)
        self.float_module: pl.LightningModule = self._float_module()
        if cfg.float_ckpt:
            self._start_float(cfg.float_ckpt)
        self.data = build(cfg, "data", pl.LightningDataModule)
        self.data.prepare_data()
        self.data.setup("fit")
        if self.progress["start"] and not self.done("float"):
            load_weights(self.module, self.progress["start"])

    def _policy(self) -> Policy:
        """That of the config; where it names no engine, that of the file to be written."""
        given = policy_settings(self.cfg.quant)
        for own in several.values() if isinstance(several := given.get(KEY), dict) else [given]:
            if self.target is not None and isinstance(own, dict) and own.get("engine") is None:
                own["engine"] = self.target.engine
        policy = policy_of(given)
        return NetworkPolicies({self.cfg.quant.module: policy}) if self.cfg.quant.module else policy

    def _float_module(self) -> pl.LightningModule:
        """The model with the settings of `float_model`, under whose key mistakes are reported."""
        settings = {**self.cfg.model, **(self.cfg.float_model or {})}
        return build(OmegaConf.create({"float_model": settings}), "float_model", pl.LightningModule)

    def _start_float(self, path: str) -> None:
        if self.progress["start"]:
            raise UserError(
                f"float_ckpt={path}: float training starts from it, but ckpt={self.progress['start']} takes the place "
                "of float training; leave one out"
            )
        load_weights(self.float_module, path)

    def _begun(self) -> bool:
        """Whether an earlier command has trained or measured something here, and did not end before it could."""
        if not self._remembered.is_file():
            return False
        return bool(read_object(self._remembered, "stages")["stages"]) or (self.folder / FLOAT_CHECKPOINT).is_file()

    def _recall(self) -> None:
        if not self._remembered.is_file():
            raise UserError(f"ckpt=last: there is no run to resume in {self.folder}; name its folder with run_dir=...")
        self.progress = read_object(self._remembered, "start", "stages", "seconds")
        check_settled(settled(self.cfg), self.progress.get("settings", {}), self.folder)

    def check(self) -> None:
        """Tries policy, metric and callbacks on copies of the module: mistakes would else show after float training."""
        if (cache := self.cfg.cache_dir) is not None:
            make_folder(Path(cache), "cache_dir")
        for target in (self.target, PackedTarget()):
            if target is not None:
                target.check_place(self.folder / target.file)
        self.qat_callback()
        shell = copied(self.module)
        one = {key: int(self.cfg.trainer.get(key) != 0) for key in ("limit_test_batches", "limit_val_batches")}
        trainer = self.measuring(**one, enable_progress_bar=False)
        test_metric(trainer, shell, self.data, self.cfg.metric)
        if self.target is not None and self.target.graph is not None:
            example = example_input(shell, self.data.train_dataloader)
            check_trace(traceable(shell, example), example)
        if not self.policy.is_off:
            check_monitors(trainer, shell, self.data, self._monitors())
            plan, recording = make_plan(shell, self.policy, run_steps(shell, self.data.train_dataloader, samples=1))
            if self.target is not None and (reason := self.target.refusal(shell, plan)):
                raise UserError(f"export: {reason}")
            apply_plan(shell, plan)
            for caution in self.target.cautions(shell, plan) if self.target is not None else ():
                rank_zero_warn(f"export: {caution}")
            self.audit: Callable[[Plan], list[AuditRow]] = lambda plan: with_bytes(
                audit(shell, plan, recording), shell, plan
            )
            self.audit_rows = self.audit(plan)
            check_coverage(self.audit_rows, self.policy.required_coverage)
            if self.trains and not (self.resuming and (self.folder / LAST_CHECKPOINT).is_file()):
                self._check_callbacks(shell)

    def _check_callbacks(self, shell: pl.LightningModule) -> None:
        """Has callbacks check what they would find when training starts, on a copy of the module with quantizers."""
        callbacks = [self.qat_callback(), *self.callbacks]
        saves = any(isinstance(callback, Checkpoint) for callback in callbacks)
        trainer = self.trainer(callbacks=callbacks, enable_checkpointing=saves, default_root_dir=str(self.folder))
        attach(trainer, shell, self.data)
        for key, callback in self._named_callbacks().items():
            if isinstance(callback, QuantizationCallback):
                with self._under(key):
                    callback.check(trainer, shell)

    @contextmanager
    def _under(self, key: str) -> Iterator[None]:
        """Mistakes of a callback are told under its config key, not in its name."""
        try:
            yield
        except UserError as error:
            raise UserError(under(key, error.text, OmegaConf.select(self.cfg, key))) from error

    def _monitors(self) -> dict[str, str]:
        """Metrics that callbacks look at, by config key; empty if one of the user's own callbacks may be what logs
        them.
        """
        if any(
            type(callback).__module__.partition(".")[0] not in ("qat", "pytorch_lightning")
            for callback in self.callbacks
        ):
            return {}
        found = {key: getattr(callback, "monitor", None) for key, callback in self._named_callbacks().items()}
        names = {key: name for key, name in found.items() if isinstance(name, str)}
        return {"val_metric" if n == self.cfg.val_metric else f"{key}.monitor": n for key, n in names.items()}

    def _named_callbacks(self) -> dict[str, Callback]:
        """The callbacks by config key; none where they are left out."""
        keys = [f"callbacks.{name}" for name, node in (self.cfg.callbacks or {}).items() if node]
        return dict(zip(keys, self.callbacks, strict=False))

    @property
    def trains(self) -> bool:
        """Whether there is quantization-aware training; else the run is PTQ alone."""
        return trains(self.cfg)

    # -- parts ---------------------------------------------------------------------------------------------------------

    def trainer(self, **settings: Any) -> pl.Trainer:
        """A trainer as configured, but for `settings`."""
        return build(self.cfg, "trainer", pl.Trainer, **{"logger": False, "enable_checkpointing": False, **settings})

    def measuring(self, **settings: Any) -> pl.Trainer:
        """A trainer on one device for this process alone: a distributed sampler would count some samples twice.

        In float32 where training is in mixed precision: what is reported is what the exported file computes.
        """
        settings = {**unmixed(self.cfg.trainer), **settings}
        if self.cfg.trainer.get("devices") == 1 and self.cfg.trainer.get("num_nodes", 1) == 1:
            return self.trainer(**settings)
        environment = LightningEnvironment()
        device = 1 if self.cfg.trainer.accelerator == "cpu" else [environment.local_rank()]
        alone = {
            "devices": device,
            "num_nodes": 1,
            "strategy": "auto",
            "sync_batchnorm": False,
            "plugins": [environment],
        }
        return self.trainer(
            **{"enable_progress_bar": self.main and self.cfg.trainer.enable_progress_bar, **alone, **settings}
        )

    def measure(self, **settings: Any) -> float:
        """The metric of the module as it is, over the test set."""
        return test_metric(self.measuring(**settings), self.module, self.data, self.cfg.metric)

    def qat_callback(self) -> QATCallback:
        quant = self.cfg.quant
        starts = [build(self.cfg, f"start.{n}", Start) for n, node in (self.cfg.get("start") or {}).items() if node]
        shared = FloatCache(self.cfg, self.progress["start"], self.main).folder
        ranges = None
        if shared is not None and not starts:
            ranges = RangeCache(shared / "ranges", quant.calibration_samples, self.main)
        return QATCallback(self.policy, quant.calibration_samples, quant.scale_lr, starts=starts, ranges=ranges)

    # -- progress ------------------------------------------------------------------------------------------------------

    @contextmanager
    def stage(self, name: str, title: str | None) -> Iterator[dict[str, Any]]:
        """Announces and times a stage, and remembers what it measured once it is complete."""
        if title is not None:
            self.console.print(title, style="bold")
        start, values = time.perf_counter(), {}
        pl.seed_everything(self.cfg.seed, workers=True, verbose=False)
        yield values
        if values:
            self.progress["stages"].setdefault(name, {}).update(values)
        self.progress["seconds"][name] = round(time.perf_counter() - start, 2)
        self.remember()

    def remember(self) -> None:
        """Writes `progress.json`, from which a run resumes."""
        self.write_json(self._remembered.name, self.progress)

    @property
    def _remembered(self) -> Path:
        return self.folder / PROGRESS

    def done(self, name: str) -> bool:
        return name in self.progress["stages"]

    def resume_from(self, last: Path, *loggers: Any) -> str | None:
        """The checkpoint to go on from, if this run was interrupted after it was written."""
        if not self.resuming or not last.is_file():
            return None
        step = read_checkpoint(last)["global_step"]
        for logger in loggers:
            if self.main and isinstance(logger, CSVLogger):
                continue_csv(logger, step)
        return str(last)

    def write_json(self, name: str, content: Any) -> None:
        if self.main:
            with atomic(self.folder / name) as temporary:
                temporary.write_text(json.dumps(content, indent=1))


def unmixed(trainer: DictConfig) -> dict[str, str]:
    """The precision in place of a mixed one."""
    return {"precision": "32-true"} if str(trainer.get("precision", "")).endswith("-mixed") else {}


def check_finite(run: Workspace, training: str, checkpoint: str) -> None:
    """Raises if what was trained holds NaN, and takes the checkpoint away: resumed, the run trains anew, corrected."""
    if (name := not_finite(run.module)) is not None:
        if run.main:
            (run.folder / checkpoint).unlink(missing_ok=True)
        raise UserError(f"{training} ended with NaN or infinity in '{name}': NaN in the data, or too high a rate")
