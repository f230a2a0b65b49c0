"""DoReFa-Net: weights squeezed by tanh onto a grid without a zero, activations clipped to 0 .. 1 (Zhou et al., arXiv
1606.06160).

With t = tanh(w), M = max|t| and Q the rounding of 0 .. 1 to 2^b - 1 steps,

    value = M * (2 Q(t / 2M + 1/2) - 1)

which is the `midrise` grid of scale M / (2^b - 1): its levels are the odd numbers -(2^b - 1) .. 2^b - 1. The gradient
passes Q untouched and tanh exactly; M is a constant to it. Binary weights are mean|w| * sign(w) instead, with an
untouched gradient. Activations have the fixed grid 0 .. 1, and no gradient outside it (a signed grid: -1 .. 1).

M follows the weights in every training forward pass and stays as it is in evaluation.

Differs from the paper: it drops the factor M and leaves the size of the weights to BatchNorm; M and mean|w| may be
those of a channel or a group; exactly between two levels the upper one is taken; gradients are not quantized.
"""

from collections.abc import Collection

import torch
from torch import Tensor

from qat.errors import UserError
from qat.grid.formats import Rounding
from qat.grid.spec import QuantSpec
from qat.kernels.gradient import Gradient, Grads, gradient
from qat.quantizers import fixed
from qat.quantizers.base import Quantizer
from qat.quantizers.fixed import forward


def backward(rounding: Rounding, grad: Tensor, x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Grads:
    return grad.clone(), None


class DoReFa(Quantizer):
    """Weights behind a tanh, on a grid that follows them; activations on a fixed one.

    Use it to reproduce the paper. The tanh changes the weights of a trained model, and activations above 1 are clipped,
    so it is for training from scratch rather than for fine-tuning.
    """

    kernels = forward, fixed.backward

    def __init__(self, spec: QuantSpec, shape: torch.Size | None = None, axis: int = 0) -> None:
        weight = shape is not None
        if weight and spec.format not in ("midrise", "binary"):
            raise UserError(
                f"format={spec.format}: the weights of quantizer=dorefa have no level at zero; "
                "set format: midrise (1 bit: binary)"
            )
        if not weight and (spec.format != "int" or not spec.symmetric):
            raise UserError(
                f"format={spec.format}, symmetric={str(spec.symmetric).lower()}: the activations of quantizer=dorefa "
                "lie on whole steps from 0 to 1; set format: int and symmetric: true"
            )
        super().__init__(spec, shape, axis)
        if weight:
            self.gradient = gradient(forward, backward, spec.rounding)

    def transform(self, x: Tensor) -> Tensor:
        return x.to(torch.promote_types(x.dtype, torch.float32)).tanh() if self.is_weight and self.spec.width > 1 else x

    @classmethod
    def heeds(cls, weight: bool) -> Collection[str]:
        return ()

    def _fit(self, rows: Tensor) -> None:
        if not self.is_weight:
            largest = rows.new_ones(1)
        else:
            largest = rows.abs().mean(1) if self.spec.width == 1 else rows.abs().amax(1)
        low = -largest if self.quant_min < 0 else torch.zeros_like(largest)
        self._set_range(low * (-self.quant_min / self.quant_max), largest)

    @torch.no_grad()
    def follow(self, x: Tensor) -> None:
        if self.is_weight and x.numel():
            self._fit(self.partition.rows(self.transform(x.float())))

    def fake_quantize(
        self, x: Tensor, scale: Tensor, low: Tensor, high: Tensor, gradient: Gradient | None = None
    ) -> Tensor:
        # A copy: the tensor may be read twice before backward, and the second reading moves the scale in place.
        return (gradient or self.gradient)(x, scale.clone(), low, high)
