"""A grid that stays where calibration put it; the gradient is the clipped straight-through estimator (Bengio et al.,
arXiv 1308.3432, section 4).

    dL/dx = dL/dy where low <= x / scale <= high, else 0
"""

import torch
from torch import Tensor

from qat.grid.formats import Rounding
from qat.grid.functional import narrowed, ratio
from qat.kernels.gradient import Grads
from qat.quantizers.base import Quantizer


def forward(rounding: Rounding, x: Tensor, scale: Tensor, low: Tensor, high: Tensor, *_: Tensor) -> Tensor:
    """Rounds to the grid; what else a gradient needs (`*_`) changes no value."""
    scale = scale.clamp_min(2.0**-126)  # `functional.levels` and `values`, with the scale that acts made once
    return narrowed(rounding((x / scale).clamp_min_(low).clamp_max_(high)).mul_(scale), x.dtype)


def backward(rounding: Rounding, grad: Tensor, x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Grads:
    v = ratio(x, scale)
    return torch.where(v.clamp_min(low).clamp_max_(high) == v, grad, 0), None


class Fixed(Quantizer):
    """Fixed range; only the weights learn.

    Use it where the grid is given or should stay as it was calibrated, and as the baseline for those that learn.
    """

    kernels = forward, backward
