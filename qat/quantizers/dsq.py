"""DSQ: the gradient of a soft staircase that hardens during training (Gong et al., "Differentiable Soft Quantization",
ICCV 2019).

Between two neighbouring levels the paper's staircase is a tanh; in units of a step, with f in -1/2 .. 1/2 the distance
from the threshold,

    soft(f) = tanh(k f) / (2 tanh(k / 2))          d soft / d f = k (1 - tanh(k f)^2) / (2 tanh(k / 2))

The slope is 1 on average, below 1 near a level and above it near a threshold; k -> 0 is the plain straight-through
estimator, large k a hard staircase. The forward pass is the hard one.

Differs from the paper: k, the `sharpness`, is not learned but annealed geometrically over training forward passes, in a
buffer, so that a resumed run goes on where it was; the step size is learned, with LSQ's gradient, instead of the ends
of the range.
"""

import torch
from torch import Tensor

from qat.errors import UserError
from qat.grid.formats import Rounding
from qat.grid.functional import masks, ratio, sum_to, wide
from qat.grid.spec import QuantSpec
from qat.kernels.gradient import Gradient, Grads
from qat.modes import only_looking, recomputing
from qat.quantizers.fixed import forward
from qat.quantizers.lsq import LSQ


def backward(
    rounding: Rounding, grad: Tensor, x: Tensor, scale: Tensor, low: Tensor, high: Tensor, sharpness: Tensor
) -> Grads:
    v = ratio(x, scale)
    clipped = v.clamp_min(low).clamp_max_(high)
    grad, inside = wide(grad), masks(v, clipped)
    level = rounding(clipped.clone())
    soft = torch.tanh(sharpness * ((clipped - level).abs() - 0.5))
    slope = sharpness * (1 - soft.square()) / (2 * torch.tanh(sharpness / 2))
    partial = grad * (level - torch.where(inside[1], clipped, 0))
    return (grad * inside[0] * slope).to(x.dtype), sum_to(partial, scale), None


class DSQ(LSQ):
    """Learned step size with a soft staircase's gradient; see the module's docstring.

    Use it to try, at few bits, a gradient that is small near a level; set `steps` to the length of training.

    Args:
        spec, shape, axis: See `Quantizer`.
        start: Sharpness before annealing, per step of the grid.
        end: Sharpness after it.
        steps: Training forward passes that annealing takes.

    Attributes:
        sharpness: The present sharpness, `(1,)`.
    """

    kernels = forward, backward
    extra = ("sharpness",)
    sharpness: Tensor

    def __init__(
        self,
        spec: QuantSpec,
        shape: torch.Size | None = None,
        axis: int = 0,
        start: float = 1.0,
        end: float = 6.0,
        steps: int = 10_000,
    ) -> None:
        if spec.format not in ("int", "ternary"):
            raise UserError(f"format={spec.format}: quantizer=dsq softens steps of one; set format: int or ternary")
        if not 0 < start <= end:
            raise UserError(f"options.start={start}, options.end={end}: must be above 0, and end at least start")
        if steps < 1:
            raise UserError(f"options.steps={steps}: must be at least 1")
        super().__init__(spec, shape, axis)
        self.end, self.growth = float(end), (end / start) ** (1 / steps)
        self.register_buffer("sharpness", torch.full((1,), float(start), dtype=torch.float32))
        self._used = self.sharpness

    def fake_quantize(
        self, x: Tensor, scale: Tensor, low: Tensor, high: Tensor, gradient: Gradient | None = None
    ) -> Tensor:
        now = self.sharpness
        if again := self.training and recomputing():
            self.sharpness = self._used
        y = super().fake_quantize(x, scale, low, high, gradient)
        if again:
            self.sharpness = now
        elif self.training and not only_looking():  # not in place: this pass's backward has yet to read it
            self._used, self.sharpness = now, (now * self.growth).clamp(max=self.end)
        return y
