"""LSQ: the step size is a parameter, trained by its own gradient (Esser et al., "Learned Step Size Quantization",
ICLR 2020).

With v = x / scale, equation 3 of section 2.1 is

    d value / d scale = low | round(v) - v | high        below, inside and above the range

summed over the elements that share a scale and multiplied by 1 / sqrt(N * quant_max) (section 2.2). d value / d x is
1 inside, else 0 (equation 5).

Differs from the paper in three ways: the step acts as at least `TINY`, so that it cannot turn negative; it may be
    shared by a channel or a
group instead of the tensor, with N counting the elements that share it; and for activations N counts one sample's
elements rather than a batch's, so that the gradient does not depend on how a batch is split over processes.
"""

import torch
from torch import Tensor, nn

from qat.formats import Rounding
from qat.functional import ratio, sum_to, wide
from qat.kernels import Grads, gradient
from qat.quantizers.base import Quantizer
from qat.quantizers.fixed import forward
from qat.spec import QuantSpec


def backward(rounding: Rounding, grad: Tensor, x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Grads:
    v = ratio(x, scale)
    clipped = v.clamp(low, high)
    grad = wide(grad)
    grad_x = grad * (clipped == v)
    # <grad, level> - <grad inside, v>: two products and no third mask.
    partial = (grad_x * clipped).neg_()
    partial += grad * rounding(v, low, high)
    return grad_x.to(x.dtype), sum_to(partial, scale)


def elements_per_scale(quantizer: Quantizer, x: Tensor) -> int:
    """N of LSQ's gradient scale: elements of the weight that share a scale, or of one sample of an activation."""
    if quantizer.is_weight:
        return max(x.numel() // quantizer.scale.numel(), 1)
    return max(x.numel() // max(x.shape[0], 1), 1) if x.ndim else 1


class LSQ(Quantizer):
    """Learned step size; see the module's docstring. `scale` is a parameter."""

    def __init__(self, spec: QuantSpec, shape: torch.Size | None = None, axis: int = 0) -> None:
        super().__init__(spec, shape, axis)
        self.gradient = gradient(forward, backward, spec.rounding)

    def _make_scale(self, scale: Tensor) -> None:
        self.scale = nn.Parameter(scale)

    def fake_quantize(self, x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
        grad_scale = (elements_per_scale(self, x) * max(self.quant_max, 1)) ** -0.5
        return self.gradient(x, scale, low, high, grad_scale=grad_scale)
