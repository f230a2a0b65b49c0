"""LSQ: the step size is a parameter, trained by its own gradient (Esser et al., "Learned Step Size Quantization",
ICLR 2020).

With v = x / scale, equation 3 of section 2.1 is

    d value / d scale = low | round(v) - v | high        below, inside and above the range

summed over the elements that share a scale and multiplied by 1 / sqrt(N * quant_max) (section 2.2), where N is the
number of a layer's weights or features: one sample's, not a batch's, so that the gradient does not depend on how a
batch is split over processes. d value / d x is 1 inside, else 0 (equation 5).

Differs from the paper in three ways: the step acts as at least `TINY`, so that it cannot turn negative; it may be
shared by a channel or a group instead of the tensor, with N counting the elements that share it; and a value exactly
on a limit counts as inside, as clipped straight-through estimators have it, where the paper's inequality is strict.
"""

import torch
from torch import Tensor, nn

from qat.grid.formats import Rounding
from qat.grid.functional import masks, ratio, sum_to
from qat.grid.spec import QuantSpec
from qat.kernels.gradient import Gradient, Grads
from qat.quantizers.base import Quantizer
from qat.quantizers.fixed import forward


def slopes(rounding: Rounding, x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """`d value / d scale` of each element."""
    return _slopes(rounding, x, scale, low, high)[0]


def _slopes(rounding: Rounding, x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    v = ratio(x, scale)
    clipped = v.clamp_min(low).clamp_max_(high)
    inside, again, _ = masks(v, clipped)
    return rounding(clipped).sub_(torch.where(inside, v, 0)), again


def backward(rounding: Rounding, grad: Tensor, x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Grads:
    slope, inside = _slopes(rounding, x, scale, low, high)
    return torch.where(inside, grad, 0).to(x.dtype), sum_to(slope.mul_(grad), scale)


class LSQ(Quantizer):
    """Learned step size; see the module's docstring. `scale` is a parameter.

    Use it unless there is a reason for another: it is the default, and takes every format.

    Attributes:
        extra: Names of the tensors that a subclass's gradient takes beside the grid; their gradients are scaled alike.
    """

    kernels = forward, backward
    extra: tuple[str, ...] = ()

    def __init__(self, spec: QuantSpec, shape: torch.Size | None = None, axis: int = 0) -> None:
        super().__init__(spec, shape, axis)
        # N of a weight; an activation's depends on the batch.
        self._per_scale = None if shape is None else max(shape.numel() // self.scale.numel(), 1)

    def _make_scale(self, scale: Tensor) -> None:
        self.scale = nn.Parameter(scale)

    def fake_quantize(
        self, x: Tensor, scale: Tensor, low: Tensor, high: Tensor, gradient: Gradient | None = None
    ) -> Tensor:
        extra = [getattr(self, name) for name in self.extra] if self.extra else ()
        return (gradient or self.gradient)(x, scale, low, high, *extra, grad_scale=self.gradient_scale(x))

    def gradient_scale(self, x: Tensor) -> float:
        """The factor of the gradient of the scale: 1 / sqrt(N * quant_max)."""
        count = self._per_scale or x.numel() // ((x.ndim and x.shape[0]) or 1)
        return (max(count, 1) * max(self.quant_max, 1)) ** -0.5
