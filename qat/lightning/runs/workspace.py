"""The workspace of a run, which all stages share: the checked config, the data, the module, the trainers, and what
earlier stages measured.

Under DDP every process goes through all stages and measures on a device of its own, so that none waits for another
outside of `trainer.fit`; only the first one writes and prints.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Callback, Checkpoint
from pytorch_lightning.loggers import Logger
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.utilities import rank_zero_only
from rich.console import Console

from qat.config.configs import policy_settings
from qat.config.instantiate import build
from qat.errors import UserError
from qat.export.target import Target
from qat.files import write_object
from qat.lightning.callback import QATCallback
from qat.lightning.resume import SeedEpochs
from qat.lightning.runs.evaluate import test_metric
from qat.lightning.runs.float_cache import FloatCache
from qat.lightning.runs.progress import Progress
from qat.lightning.shared_ranges import RangeCache
from qat.lightning.spawn import is_spawning
from qat.lightning.weights import load_weights, not_finite
from qat.planning.audit import AuditRow
from qat.planning.plan import Plan
from qat.policies.networks import KEY, NetworkPolicies, Policy, policy_of
from qat.starts import Start

T = TypeVar("T")
ON_THE_CPU = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto"}
"""How a run's trainer goes on where it need not be as it trained."""
SET_BY_THE_RUN = {
    "logger": "logger=NAME chooses the logger",
    "callbacks": "callbacks.NAME=... adds one",
    "enable_checkpointing": "callbacks.best=null callbacks.last=null leave checkpoints out",
}
"""Arguments of the trainer that cannot be configured as such, and what can be instead."""


class Workspace:
    """Builds all parts of a run; until a stage begins, nothing is written.

    Args:
        cfg: The composed and resolved config (see configs/train.yaml).
        folder: The run's folder.

    Attributes:
        main: Whether this process is the one that writes and prints.
        progress: What earlier stages measured.
        target: The format of the file to be made, if any.
        callbacks: Those of training, by config key.
        float_module: The module as it trains in float (`float_model`).
        audit: Accounts for the model under a plan, from when `check` has planned it.
        audit_rows: The account under the plan that holds.

    Raises:
        UserError: if a part of the config is wrong, if there is no run to resume, or another one in the folder.
    """

    audit: Callable[[Plan], list[AuditRow]]
    audit_rows: list[AuditRow]

    def __init__(self, cfg: DictConfig, folder: Path) -> None:
        self.cfg, self.folder = cfg, folder
        self.main = getattr(rank_zero_only, "rank", 0) == 0
        self.console = Console(quiet=not self.main)
        self.progress = Progress(cfg, folder, self.main)
        self.target: Target | None = build(cfg, "export", Target) if cfg.export else None
        self.policy = self._policy()
        self.callbacks = self._group("callbacks", Callback)
        self.loggers: list[Any] = [build(cfg, "logger", Logger)] if cfg.logger else []
        self._check_trainer()
        self.module = build(cfg, "model", pl.LightningModule)
        self.float_module: pl.LightningModule = self._float_module()
        self.data = build(cfg, "data", pl.LightningDataModule)
        self.data.prepare_data()
        self.data.setup("fit")
        if self.progress.start and "float" not in self.progress.stages:
            load_weights(self.module, self.progress.start)

    def _group(self, group: str, kind: type[T]) -> dict[str, T]:
        """What a group of the config holds, by config key; what is null or empty there is left out."""
        keys = [f"{group}.{name}" for name, node in (self.cfg.get(group) or {}).items() if node]
        return {key: build(self.cfg, key, kind) for key in keys}

    def _policy(self) -> Policy:
        """That of the config; where it names no engine, that of the file to be written."""
        given = policy_settings(self.cfg.quant)
        for own in several.values() if isinstance(several := given.get(KEY), dict) else [given]:
            if self.target is not None and isinstance(own, dict) and own.get("engine") is None:
                own["engine"] = self.target.engine
        policy = policy_of(given)
        return NetworkPolicies({self.cfg.quant.module: policy}) if self.cfg.quant.module else policy

    def _check_trainer(self) -> None:
        for name, instead in SET_BY_THE_RUN.items():
            if name in self.cfg.trainer:
                raise UserError(f"trainer.{name}: a run has its own; {instead}")
        if is_spawning(self.trainer(logger=False)):
            raise UserError(
                f"trainer.strategy={self.cfg.trainer.strategy}: what it trains stays in the processes that it starts; "
                "ddp starts them as a run needs"
            )

    def _float_module(self) -> pl.LightningModule:
        """The model with the settings of `float_model`, under whose key mistakes are reported, and its weights."""
        settings = {**self.cfg.model, **(self.cfg.float_model or {})}
        module = build(OmegaConf.create({"float_model": settings}), "float_model", pl.LightningModule)
        if path := self.cfg.float_ckpt:
            if start := self.progress.start:
                raise UserError(
                    f"float_ckpt={path}: float training starts from it, but ckpt={start} takes the place "
                    "of float training; leave one out"
                )
            load_weights(module, path)
        return module

    # -- trainers ------------------------------------------------------------------------------------------------------

    def trainer(self, **settings: Any) -> pl.Trainer:
        """A trainer as configured, but for `settings`."""
        return build(self.cfg, "trainer", pl.Trainer, **{"logger": False, "enable_checkpointing": False, **settings})

    def training(self, **settings: Any) -> pl.Trainer:
        """A trainer with the quantizers' callback and the config's own."""
        callbacks = [self.qat_callback(), SeedEpochs(self.cfg.seed), *self.callbacks.values()]
        saves = any(isinstance(callback, Checkpoint) for callback in callbacks)  # else Lightning adds its own
        return self.trainer(callbacks=callbacks, enable_checkpointing=saves, **settings)

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
        starts = list(self._group("start", Start).values())
        shared = FloatCache(self.cfg, self.progress.start, self.main).folder
        ranges = None
        if shared is not None and not starts:
            ranges = RangeCache(shared / "ranges", quant.calibration_samples, self.main)
        return QATCallback(self.policy, quant.calibration_samples, quant.scale_lr, starts=starts, ranges=ranges)

    # -- stages --------------------------------------------------------------------------------------------------------

    @contextmanager
    def stage(self, name: str, title: str | None) -> Iterator[dict[str, Any]]:
        """Announces and times a stage, and remembers what it measured once it is complete."""
        if title is not None:
            self.console.print(title, style="bold")
        start, values = time.perf_counter(), {}
        pl.seed_everything(self.cfg.seed, workers=True, verbose=False)
        yield values
        self.progress.complete(name, values, time.perf_counter() - start)

    def check_finite(self, training: str, checkpoint: str) -> None:
        """Raises if what was trained holds NaN, and takes the checkpoint away: a resumed run trains anew, corrected."""
        if (name := not_finite(self.module)) is not None:
            if self.main:
                (self.folder / checkpoint).unlink(missing_ok=True)
            raise UserError(f"{training} ended with NaN or infinity in '{name}': NaN in the data, or too high a rate")

    def write_json(self, name: str, content: Any) -> None:
        if self.main:
            write_object(self.folder / name, content)


def unmixed(trainer: DictConfig) -> dict[str, str]:
    """The precision in place of a mixed one."""
    return {"precision": "32-true"} if str(trainer.get("precision", "")).endswith("-mixed") else {}
