"""Dampening oscillations: weights are drawn to the middle of their cell, away from the thresholds.

Nagel et al. (ICML 2022, section 4.2, equation 5) add to the loss, for every weight w with step s and levels n .. p,

    strength * sum (stopgrad(s clip(round(w / s), n, p)) - clip(w, s n, s p))^2

Its gradient is known: 2 strength (w - quantized w) inside the range, 0 outside, where clipping already keeps a weight
from oscillating. It is added to that of the weights right before an optimizer step: once, however many batches were
accumulated, and without a second forward pass. Scales get none.
"""

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from qat.errors import UserError
from qat.grid.functional import levels
from qat.lightning.base import QuantizationCallback
from qat.lightning.schedules.moments import check_ends, cosine, progress
from qat.lightning.schedules.oscillation import check_weights, few_bit_weights
from qat.quantizers import Quantizer


class DampenOscillations(QuantizationCallback):
    """Adds the dampening loss's gradient, its strength growing along a cosine from 0.

    Args:
        strength: Weight of the loss at the end of training (lambda of the paper, for a sum over elements).
        max_bits: Widest grid that is dampened.
    """

    def __init__(self, strength: float = 0.1, max_bits: int = 4) -> None:
        if not 0 < strength < float("inf"):
            raise UserError(f"strength={strength}: must be above 0; leave the callback out for none")
        if max_bits < 1:
            raise UserError(f"max_bits={max_bits}: must be at least 1")
        self.strength, self.max_bits = strength, max_bits

    def check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        check_ends(trainer, self, "give max_steps")
        check_weights(trainer, pl_module, self, self.max_bits, moving=True)

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        strength = cosine(0, self.strength, progress(trainer))
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for weight in few_bit_weights(pl_module, self.max_bits, moving=True):
            parameter = weight.parameter
            if parameter is not None and parameter.grad is not None and id(parameter) in stepped:
                gradient = weight.within(parameter.grad)
                gradient.add_(pull(weight.quantizer, weight.tensor).view(gradient.shape), alpha=2 * strength)


def pull(quantizer: Quantizer, weight: Tensor) -> Tensor:
    """`w - quantized w` where `w` is in range, else 0."""
    x = quantizer.partition.grouped(weight)
    scale, low, high = quantizer.grid(weight)
    level = levels(x, scale, low, high, quantizer.spec.rounding)
    inside = (x >= scale * low) & (x <= scale * high)
    return ((x - level * scale) * inside).view(weight.shape).to(weight.dtype)
