"""Oscillating weights: seen, counted and frozen (Nagel et al., "Overcoming Oscillations in Quantization-Aware
Training", ICML 2022).

Where the best value of a weight lies between two grid points, the straight-through gradient pushes its latent value
over the threshold between them again and again. With t counting optimizer steps, w_int the weight's level, m the
momentum and section 2.2 for the definition,

    flip_t = 1 if w_int changes at t, against the direction of its last change, else 0
    frequency_t = m flip_t + (1 - m) frequency_(t-1)                   equation 4
    average_t = m w_int_t + (1 - m) average_(t-1)                      section 4.3

Freezing (section 4.3): a weight whose frequency exceeds a threshold, which falls along a cosine, is fixed for good to
round(average). Its latent value is put on that grid point after every optimizer step, whatever the scale is by then, so
evaluation and export find the frozen integer by themselves.

Differs from the authors' code: all of this is in the callback's state and survives a resume.
"""

from dataclasses import dataclass, replace
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

from qat.errors import UserError
from qat.layers.weights import QuantizedWeight, quantized_weights
from qat.lightning.base import QuantizationCallback, callbacks_of
from qat.lightning.schedules.anneal import AnnealBits
from qat.lightning.schedules.moments import check_ends, cosine, progress
from qat.quantizers import Quantizer


@dataclass
class Oscillation:
    """Record of one weight; all tensors have its shape.

    Attributes:
        previous: Level after the last step, float32.
        direction: Sign of the level's last change (0: none yet), int8.
        frequency: Moving average of flips, float32.
        average: Moving average of levels, float32.
        frozen: Whether `previous` is fixed for good, bool.
        width: Bits of the grid that all this is about.
    """

    previous: Tensor
    direction: Tensor
    frequency: Tensor
    average: Tensor
    frozen: Tensor
    width: int

    @classmethod
    def start(cls, level: Tensor, width: int) -> "Oscillation":
        zeros = torch.zeros_like(level)
        return cls(level, zeros.to(torch.int8), zeros, level.clone(), zeros.bool(), width)

    def update(self, level: Tensor, momentum: float) -> None:
        """Takes in the levels after an optimizer step; frozen ones count as unchanged."""
        level = torch.where(self.frozen, self.previous, level)
        change = (level - self.previous).sign().to(torch.int8)
        flips = (change * self.direction == -1).float()
        self.frequency = torch.lerp(self.frequency, flips, momentum)
        self.average = torch.lerp(self.average, level, momentum)
        self.direction = torch.where(change != 0, change, self.direction)
        self.previous = level

    def freeze(self, threshold: float, quantizer: Quantizer) -> None:
        """Fixes the weights that flip more often than `threshold` to the level nearest to their average."""
        fresh = self.frequency > threshold  # that of frozen ones is 0
        nearest = quantizer.spec.rounding(self.average.clone())  # an average of levels is within their range
        self.previous = torch.where(fresh, nearest, self.previous)
        self.frequency = self.frequency.masked_fill(fresh, 0)  # it has come to rest
        self.frozen = self.frozen | fresh

    def to(self, device: torch.device) -> "Oscillation":
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def on_grid(quantizer: Quantizer, level: Tensor) -> Tensor:
    """The real values of a weight's levels, float32."""
    partition = quantizer.partition
    return (partition.grouped(level) * partition.spread(quantizer.step(), level.ndim)).view(level.shape)


def few_bit_weights(pl_module: pl.LightningModule, max_bits: int, moving: bool) -> list[QuantizedWeight]:
    """The weights that lie on grids of at most `max_bits` bits now; if they are to be moved, those that can be."""
    found = (w for w in quantized_weights(pl_module).values() if w.quantizer.on and w.quantizer.spec.width <= max_bits)
    return [weight for weight in found if weight.writable or not moving]


def check_weights(
    trainer: pl.Trainer, pl_module: pl.LightningModule, who: QuantizationCallback, max_bits: int, moving: bool
) -> None:
    """Checks what the callback `who` is given to work on.

    Raises:
        UserError: if no weight has at most `max_bits` bits, or (if they are to be moved) if none of these can be, or
            one is reshaped before rounding.
    """
    who.quantizers(pl_module)
    annealing = bool(callbacks_of(trainer, AnnealBits))  # then any grid may become narrow enough
    found = [w for w in quantized_weights(pl_module).values() if annealing or w.quantizer.spec.width <= max_bits]
    if not found:
        raise who.mistake(f"no weight has a grid of at most max_bits={max_bits}; weights with more hardly oscillate")
    if not moving:
        return
    if computed := [weight.name for weight in found if not weight.writable]:
        left = f"leaves out '{computed[0]}'" + (f" and {len(computed) - 1} more" if computed[1:] else "")
        reason = f"{left}: a parametrization computes the weight anew each time, so it cannot be moved"
        if len(computed) == len(found):
            raise who.mistake(f"{reason}; no other weight has a grid of at most max_bits={max_bits}")
        rank_zero_warn(f"{type(who).__name__}: {reason}")
    for weight in found:
        if weight.writable and weight.quantizer.transforms:
            raise who.mistake(
                f"the weight of '{weight.name}' is transformed before it is rounded (quantizer="
                f"{weight.quantizer.spec.quantizer}), so its values are not near its grid; give it another quantizer"
            )


class TrackOscillations(QuantizationCallback):
    """Logs `oscillation/<layer>` after every epoch: the share of a weight's elements that flip more than `threshold`.

    Args:
        threshold: Frequency (flips per optimizer step) above which an element counts as oscillating.
        momentum: Momentum of the moving averages.
        max_bits: Widest grid that is looked at.
    """

    moving = False

    def __init__(self, threshold: float = 0.005, momentum: float = 0.01, max_bits: int = 4) -> None:
        if not 0 < momentum < 1:
            raise UserError(f"momentum={momentum}: must be above 0 and below 1")
        if not 0 < threshold < 1:
            raise UserError(f"threshold={threshold}: must be above 0 and below 1")
        if max_bits < 1:
            raise UserError(f"max_bits={max_bits}: must be at least 1")
        self.threshold, self.momentum, self.max_bits = threshold, momentum, max_bits
        self._step = 0
        self.forget()

    def forget(self) -> None:
        self.weights: dict[str, Oscillation] = {}

    def check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        check_weights(trainer, pl_module, self, self.max_bits, self.moving)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.weights = {name: state.to(pl_module.device) for name, state in self.weights.items()}
        self._step = trainer.global_step
        self._watched(pl_module)

    @torch.no_grad()
    def _watched(self, pl_module: pl.LightningModule) -> list[QuantizedWeight]:
        """The weights of now; those that are new, or on another grid than before, start from here."""
        found = few_bit_weights(pl_module, self.max_bits, self.moving)
        for weight in found:
            width = weight.quantizer.spec.width
            if weight.name not in self.weights or self.weights[weight.name].width != width:
                self.weights[weight.name] = Oscillation.start(weight.quantizer.levels(weight.tensor), width)
        return found

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:  # gradients are still being accumulated
            return
        self._step = trainer.global_step
        for weight in self._watched(pl_module):
            self.weights[weight.name].update(weight.quantizer.levels(weight.tensor), self.momentum)
            self.after_update(trainer, self.weights[weight.name], weight)

    def after_update(self, trainer: pl.Trainer, state: Oscillation, weight: QuantizedWeight) -> None:
        """Acts on the oscillations of one weight after a step; a subclass says how."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        shares = {f"oscillation/{n}": (s.frequency > self.threshold).float().mean() for n, s in self.weights.items()}
        pl_module.log_dict(shares, sync_dist=True)

    def state_dict(self) -> dict[str, Any]:
        return {name: dict(vars(state)) for name, state in self.weights.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.weights = {name: Oscillation(**values) for name, values in state_dict.items()}


class FreezeOscillations(TrackOscillations):
    """Fixes the integers of weights that flip too often, for good; also logs `frozen/<layer>`, the share that is fixed.

    Args:
        threshold, momentum, max_bits: See `TrackOscillations`; `threshold` is for the log.
        freeze_above: Frequencies above which a weight is frozen, at the start and at the end of training, a cosine
            between them. The last is at least `momentum`: below it, one flip would be enough.
    """

    moving = True

    def __init__(
        self,
        freeze_above: tuple[float, float] = (0.1, 0.01),
        threshold: float = 0.005,
        momentum: float = 0.01,
        max_bits: int = 4,
    ) -> None:
        super().__init__(threshold, momentum, max_bits)
        if not (len(freeze_above) == 2 and momentum <= freeze_above[1] <= freeze_above[0] <= 1):
            raise UserError(
                f"freeze_above={list(freeze_above)}: must be a frequency for the start and no larger one for the end, "
                f"of at least momentum={momentum}: below it, one flip would be enough"
            )
        self.freeze_above = freeze_above

    def check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        check_ends(trainer, self, "give max_steps")
        super().check(trainer, pl_module)

    def after_update(self, trainer: pl.Trainer, state: Oscillation, weight: QuantizedWeight) -> None:
        state.freeze(cosine(*self.freeze_above, progress(trainer)), weight.quantizer)
        assert weight.parameter is not None
        values, whole = weight.tensor, weight.within(weight.parameter)
        frozen = torch.where(state.frozen, on_grid(weight.quantizer, state.previous).to(values.dtype), values)
        whole.copy_(frozen.view(whole.shape))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        pl_module.log_dict(
            {f"frozen/{name}": state.frozen.float().mean() for name, state in self.weights.items()}, sync_dist=True
        )
