"""`QuantizerHealth`: what each quantizer does to its tensor while it trains, in the log and in checkpoints."""

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from qat.errors import UserError
from qat.layers.weights import quantized_weights
from qat.lightning.base import QuantizationCallback
from qat.measure.health import Health
from qat.measure.stats import Tally, readers_of, summarize
from qat.quantizers import Quantizer


class QuantizerHealth(QuantizationCallback):
    """Every so many optimizer steps, measures all quantizers on the batches of one step, as training sees them.

    Logs `health/<sqnr_db|clip_rate|drift|oscillation|grad_norm>/<quantizer>` (`qat.measure.health` defines them), warns
    once for each quantizer that has collapsed, and keeps the last measurement for `qat inspect CKPT`. Other steps cost
    nothing; batches with NaN or infinity are left out.

    Args:
        every_n_steps: Optimizer steps between measurements; at least 2, as oscillation takes two.
    """

    def __init__(self, every_n_steps: int = 100) -> None:
        if every_n_steps < 2:
            raise UserError(f"every_n_steps={every_n_steps}: must be at least 2")
        self.every_n_steps = every_n_steps
        self.forget()
        self._idle()

    def forget(self) -> None:
        self.rows: list[Health] = []
        self._start: dict[str, Tensor] = {}
        self._warned: set[str] = set()

    def _idle(self) -> None:
        self._tallies: dict[str, Tally] = {}
        self._levels: dict[str, list[Tensor]] = {}
        self._gradients: dict[str, float] = {}
        self._handles: list[Any] = []
        self._first = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._idle()
        found = self.quantizers(pl_module)
        if not self._start:  # else a checkpoint has brought where training began
            self._start = {name: q.step().cpu() for name, q in found.items()}
        self._found, self._readers = found, readers_of(pl_module)
        self._weights = {f"{w.name}.weight_quantizer": w for w in quantized_weights(pl_module).values()}

    # -- one measurement -----------------------------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._first >= 0 or trainer.global_step % self.every_n_steps or not trainer.is_global_zero:
            return
        self._first = trainer.global_step
        self._note_levels()
        for name, quantizer in self._found.items():
            if not quantizer.is_weight:
                self._handles.append(quantizer.register_forward_pre_hook(self._watch(name)))

    def _watch(self, name: str) -> Callable[..., None]:
        @torch.no_grad()
        def add(quantizer: Quantizer, args: tuple[Any, ...]) -> None:
            if quantizer.on and torch.isfinite(args[0]).all():
                self._tallies.setdefault(name, Tally()).add(name, quantizer, args[0])

        return add

    @torch.no_grad()
    def _note_levels(self) -> None:
        for name, weight in self._weights.items():
            if weight.quantizer.on:
                self._levels.setdefault(name, []).append(weight.quantizer.levels(weight.tensor))

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if trainer.global_step != self._first:
            return
        for name, quantizer in self._found.items():
            if quantizer.scale.grad is not None:
                self._gradients[name] = quantizer.scale.grad.norm().item()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._first < 0 or trainer.global_step == self._first:  # gradients are still being accumulated
            return
        if self._handles:
            for handle in self._handles:
                handle.remove()
            self._handles = []
            self._note_levels()
        if trainer.global_step >= self._first + 2:
            self._note_levels()
            self._finish(trainer)

    def _finish(self, trainer: pl.Trainer) -> None:
        for name, weight in self._weights.items():
            if weight.quantizer.on and (values := weight.tensor).isfinite().all():
                self._tallies.setdefault(name, Tally()).add(name, weight.quantizer, values)
        self.rows = [self._row(name, tally) for name, tally in self._tallies.items() if tally.total]
        logged: dict[str, float] = {}
        for row in self.rows:
            for what in ("sqnr_db", "clip_rate", "drift", "oscillation", "grad_norm"):
                if (value := getattr(row, what)) is not None:
                    logged[f"health/{what}/{row.name}"] = value
            self._warn(row)
        for logger in trainer.loggers:
            logger.log_metrics(logged, step=trainer.global_step - 1)
        self._idle()

    def _row(self, name: str, tally: Tally) -> Health:
        quantizer = self._found[name]
        step, start = quantizer.step().cpu(), self._start.get(name)
        drift = None if start is None else (step / start).log2().abs().mean().item()
        stats = summarize(name, quantizer, tally, self._readers[quantizer])
        return Health.of(
            stats, len(tally.codes), drift=drift, oscillation=self._oscillation(name),
            grad_norm=self._gradients.get(name),
        )  # fmt: skip

    def _oscillation(self, name: str) -> float | None:
        levels = self._levels.get(name, [])
        if len(levels) < 3:
            return None
        return ((levels[1] - levels[0]) * (levels[2] - levels[1]) < 0).float().mean().item()

    def _warn(self, row: Health) -> None:
        if (found := row.findings()) and row.name not in self._warned:
            self._warned.add(row.name)
            rank_zero_warn(
                f"QuantizerHealth: '{row.name}' ({row.spec}) has collapsed: {'; '.join(found)}. A smaller "
                "quant.scale_lr, more bits for it, or another range may help"
            )

    def release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._idle()

    def state_dict(self) -> dict[str, Any]:
        return {"start": dict(self._start), "rows": [row.to_dict() for row in self.rows]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._start = dict(state_dict["start"])
        self.rows = [Health(**row) for row in state_dict["rows"]]
