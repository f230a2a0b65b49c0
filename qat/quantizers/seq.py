"""Stretched elastic quantization: learned steps for weights of one, one and a half, and two bits (Liu et al.,
"ParetoQ: Scaling Laws in Extremely Low-bit LLM Quantization", arXiv 2502.02631).

With s the magnitude that the outermost cell ends at, the levels of ternary weights are -2/3 s, 0, 2/3 s, and those of
two bits -3/4 s, -1/4 s, 1/4 s, 3/4 s: equal cells that fill -s .. s. So `scale` is 2/3 s for `ternary` and 1/4 s for
two-bit `midrise`. With v = w / scale,

    d value / d w = 1 where |w| < 0.99 s, else 0 (|v| < 1.485 for ternary, 3.96 for two bits)
    d value / d scale = level - v there, else level

and s starts at max|w|. Binary weights are scale * sign(w), sign(0) = 1, with d value / d w = 1 where |w| <= scale, d
value / d scale = sign(w), and scale starting at mean|w|. All starts are those of the paper.

The paper's formula clips at s; 0.99 s is what its released code (utils_quant.py) clips at, and is taken from there.

Differs from that code: LSQ's factor 1 / sqrt(N * quant_max) counts the N weights that share a scale, not those of the
whole matrix; and outside the range a ternary weight has d value / d s = +-2/3, the derivative of its value, where the
code has +-1.
"""

from collections.abc import Collection

import torch
from torch import Tensor

from qat.errors import UserError
from qat.grid.formats import Rounding
from qat.grid.functional import ratio, sum_to, wide
from qat.grid.spec import QuantSpec
from qat.kernels.gradient import Grads, gradient
from qat.quantizers.fixed import forward
from qat.quantizers.lsq import LSQ

REACH = {"ternary": 1.485, "midrise": 3.96}
"""Where the gradient ends, in units of the scale: at 99 hundredths of the outermost cell's end."""


def backward(
    rounding: Rounding, grad: Tensor, x: Tensor, scale: Tensor, low: Tensor, high: Tensor, reach: Tensor
) -> Grads:
    v = ratio(x, scale)
    grad = wide(grad)
    inside = v.abs() < reach
    again = reach > v.abs() if torch.compiler.is_compiling() else inside  # see `qat.grid.functional.masks`
    partial = grad * (torch.where(inside, -v, 0) + rounding(v.clamp_min(low).clamp_max_(high)))
    return (grad * again).to(x.dtype), sum_to(partial, scale), None


def backward_binary(
    rounding: Rounding, grad: Tensor, x: Tensor, scale: Tensor, low: Tensor, high: Tensor, reach: Tensor
) -> Grads:
    v = ratio(x, scale)
    grad = wide(grad)
    level = rounding(v.clamp_min(low).clamp_max_(high))
    return (grad * (v.abs() <= reach)).to(x.dtype), sum_to(grad * level, scale), None


class SEQ(LSQ):
    """Learned scale of very few levels; see the module's docstring.

    Use it for weights of 1, 1.6 (ternary) and 2 bits: the presets `w1a16`, `w158a16` and `w2a16` do.
    """

    kernels = forward, backward
    extra = ("reach",)
    reach: Tensor

    def __init__(self, spec: QuantSpec, shape: torch.Size | None = None, axis: int = 0) -> None:
        if spec.format not in ("binary", "ternary", "midrise") or (spec.format == "midrise" and spec.width > 2):
            raise UserError(
                f"format={spec.format}, bits={spec.bits}: quantizer=seq has format: binary, ternary, or midrise with "
                "bits: 2; set quantizer: lsq for more"
            )
        super().__init__(spec, shape, axis)
        self._set_constants(reach=REACH[spec.format] if spec.width > 1 else 1.0)
        if spec.width == 1:
            self.gradient = gradient(forward, backward_binary, spec.rounding)

    def change_bits(self, bits: int) -> None:
        """Refused: each width has a gradient of its own."""
        raise UserError(f"quantizer=seq cannot go from {self.spec.bits} to {bits} bits; anneal with quantizer: lsq")

    @classmethod
    def heeds(cls, weight: bool) -> Collection[str]:
        return ()

    def _fit(self, rows: Tensor) -> None:
        if self.spec.width == 1:
            highest = rows.abs().mean(1)
        else:
            outermost = {"ternary": 2 / 3, "midrise": 3 / 4}[self.spec.format]
            highest = rows.abs().amax(1) * outermost
        self._set_range(-highest, highest)
