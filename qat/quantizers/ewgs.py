"""EWGS: gradients scaled element by element by how far rounding moved the element (Lee, Kim and Ham, "Network
Quantization with Element-wise Gradient Scaling", CVPR 2021).

    dL/dx = g * (1 + delta * sign(g) * (x_n - x_q))          where low <= x / scale <= high, else 0

with g = dL/dy, and x_n and x_q the value before and after rounding in units of the whole range (so its effect shrinks
with the number of levels: scale `delta` up with them). An element whose step would carry it over the next threshold
gets more gradient, one that is already there less.

Differs from the paper: the step size is learned as in LSQ instead of both ends of an interval, its gradient by the
product rule from the scaled gradient,

    dL/dscale = sum(g * level - dL/dx * x / scale) / sqrt(N * quant_max)

and `delta` is a constant (the paper's for binary networks) rather than estimated from the Hessian's trace, which takes
a second backward pass.
"""

import torch
from torch import Tensor

from qat.errors import UserError
from qat.grid.formats import Rounding
from qat.grid.functional import masks, ratio, sum_to, wide
from qat.grid.spec import QuantSpec
from qat.kernels.gradient import Grads
from qat.quantizers.fixed import forward
from qat.quantizers.lsq import LSQ


def backward(
    rounding: Rounding, grad: Tensor, x: Tensor, scale: Tensor, low: Tensor, high: Tensor, delta: Tensor
) -> Grads:
    v = ratio(x, scale)
    clipped = v.clamp_min(low).clamp_max_(high)
    inside = masks(v, clipped)
    grad = wide(grad)
    level = rounding(clipped.clone())
    more = delta * grad.abs() * (clipped - level) / (high - low)
    # Of two large products the difference would be lost: the ones that cancel are left out.
    partial = grad * (level - torch.where(inside[1], clipped, 0)) - torch.where(inside[2], more * clipped, 0)
    return ((grad + more) * inside[0]).to(x.dtype), sum_to(partial, scale), None


class EWGS(LSQ):
    """Learned step size with element-wise scaled gradients; see the module's docstring.

    Use it to try, at few bits, gradients that know how far rounding moved each element; raise `delta` with the bits.

    Args:
        spec, shape, axis: See `Quantizer`.
        delta: Strength of the scaling; 0 is LSQ.
    """

    kernels = forward, backward
    extra = ("delta",)
    delta: Tensor

    def __init__(self, spec: QuantSpec, shape: torch.Size | None = None, axis: int = 0, delta: float = 1e-3) -> None:
        if delta < 0:
            raise UserError(f"options.delta={delta}: must be at least 0")
        super().__init__(spec, shape, axis)
        self._set_constants(delta=delta)
