"""PACT: the clipping value of an activation is a parameter (Choi et al., "PACT: Parameterized Clipping Activation for
Quantized Neural Networks", arXiv 1805.06085).

    y = clip(x, 0, alpha), rounded to 2^b - 1 steps          equations 1 and 2
    d y / d alpha = 1 where x >= alpha, else 0               equation 3: rounding is left out of it

Here alpha = scale * quant_max. `scale` is the parameter, and its gradient is divided by quant_max^2, so that SGD moves
alpha exactly as it would if alpha itself were the parameter.

Differs from the paper: a signed grid clips at both ends, both of which move with alpha; alpha starts where `spec.range`
says instead of at a constant; alpha's L2 regularisation, which the paper ties to the weights' decay, is the option
`decay` (0: none), because scales have no weight decay.
"""

import torch
from torch import Tensor, nn

from qat.errors import UserError
from qat.grid.formats import Rounding
from qat.grid.functional import ratio, sum_to, wide
from qat.grid.spec import QuantSpec
from qat.kernels.gradient import Gradient, Grads
from qat.quantizers.base import Quantizer
from qat.quantizers.fixed import forward


def backward(
    rounding: Rounding, grad: Tensor, x: Tensor, scale: Tensor, low: Tensor, high: Tensor, decay: Tensor
) -> Grads:
    v = ratio(x, scale)
    inside = (v >= low) & (v < high)
    again = (low <= v) & (high > v) if torch.compiler.is_compiling() else inside  # see `qat.grid.functional.masks`
    grad = wide(grad)
    grad_scale = sum_to(grad * v.clamp_min(low).clamp_max_(high).masked_fill_(inside, 0), scale)
    return (grad * again).to(x.dtype), grad_scale + decay * scale * high.square(), None


class PACT(Quantizer):
    """Learned clipping value of an activation; see the module's docstring.

    Use it to reproduce the paper, with `dorefa` weights as there and a `decay`.

    Args:
        spec, shape, axis: See `Quantizer`.
        decay: The L2 coefficient of alpha (the paper: the weight decay of the weights). It is added once per backward
            pass.
    """

    kernels = forward, backward
    decay: Tensor

    def __init__(self, spec: QuantSpec, shape: torch.Size | None = None, axis: int = 0, decay: float = 0.0) -> None:
        if shape is not None:
            raise UserError(
                "quantizer=pact is for activations; for weights set quantizer: dorefa, as its paper does, or lsq"
            )
        if not spec.symmetric:
            raise UserError("symmetric=false: quantizer=pact clips at 0 and at one learned value; set symmetric: true")
        if decay < 0:
            raise UserError(f"options.decay={decay}: must be at least 0")
        super().__init__(spec, shape, axis)
        self._set_constants(decay=decay)

    def _make_scale(self, scale: Tensor) -> None:
        self.scale = nn.Parameter(scale)

    def fake_quantize(
        self, x: Tensor, scale: Tensor, low: Tensor, high: Tensor, gradient: Gradient | None = None
    ) -> Tensor:
        return (gradient or self.gradient)(x, scale, low, high, self.decay, grad_scale=self.quant_max**-2.0)
