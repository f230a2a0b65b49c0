"""N2UQ: learned, unequal input thresholds with equally spaced outputs, for activations (Liu et al.,
"Nonuniform-to-Uniform Quantization: Towards Accurate Quantization via Generalized Straight-Through Estimation", CVPR
2022).

In units of the scale, segment i of `widths` a_i (one for each of the 2^b - 1 steps) starts at d_i, where d_0 is the
lowest level and d_(i+1) = d_i + a_i. An element of segment i becomes level i or i + 1, by which side of the middle of
the segment it is on. The gradient is that of the mean of stochastic rounding, which climbs from i to i + 1 along the
segment:

    soft(v) = low + i + (v - d_i) / a_i          d soft / d v = 1 / a_i, and 0 outside all segments

Widths start at 1, where all this is LSQ (but exactly on a threshold, which belongs to the level above it).

Differs from the paper: one learned scale serves for input and output, with d value / d scale = level - v * d soft / d
v; d_0 is not learned. The outputs are integers, but thresholds that are not half-way between them cannot be written as
a division and a rounding.
"""

import torch
from torch import Tensor, nn

from qat.errors import UserError
from qat.grid.formats import Rounding
from qat.grid.functional import ratio, sum_to, values, wide
from qat.grid.spec import QuantSpec
from qat.kernels.gradient import Grads
from qat.quantizers.lsq import LSQ

MAX_BITS = 8


def acting_widths(widths: Tensor, dtype: torch.dtype) -> Tensor:
    """The widths that act: at least a hundredth of a step, so that thresholds stay in order and slopes finite."""
    return widths.to(dtype).clamp_min(1e-2)


def staircase(x: Tensor, scale: Tensor, low: Tensor, widths: Tensor) -> Tensor:
    """Levels of `x`: how many thresholds lie at or below it. NaN stays NaN."""
    v = ratio(x, scale)
    widths = acting_widths(widths, v.dtype)
    thresholds = low + widths.cumsum(0) - widths / 2
    return torch.where(v.isnan(), v, low + torch.bucketize(v.contiguous(), thresholds, right=True))


def forward(rounding: Rounding, x: Tensor, scale: Tensor, low: Tensor, high: Tensor, widths: Tensor) -> Tensor:
    return values(staircase(x, scale, low, widths), scale, x.dtype)


def backward(
    rounding: Rounding, grad: Tensor, x: Tensor, scale: Tensor, low: Tensor, high: Tensor, widths: Tensor
) -> Grads:
    v = ratio(x, scale)
    a = acting_widths(widths, v.dtype)
    ends = low + a.cumsum(0)
    segment = torch.bucketize(v.contiguous(), ends).clamp_max(len(a) - 1)
    inside = (v >= low) & (v <= ends[-1])
    grad = wide(grad)
    grad_x = torch.where(inside, grad / a[segment], 0)
    grad_scale = sum_to(grad * staircase(x, scale, low, widths) - torch.where(inside, grad_x * v, 0), scale)
    # A wider segment flattens its own climb, and moves all that lie above it.
    step = (grad_x * wide(scale)).flatten()
    along = torch.where(inside, (v - (ends - a)[segment]) / a[segment], 0).flatten()
    own, all_of = (torch.zeros_like(a).scatter_add(0, segment.flatten(), g) for g in (step * along, step))
    above = all_of.sum() - all_of.cumsum(0)
    return grad_x.to(x.dtype), grad_scale, -(own + above).to(widths.dtype)


class N2UQ(LSQ):
    """Learned thresholds of an activation; see the module's docstring. `widths`, `(2^bits - 1,)`, is a parameter.

    Use it for studies of very few bits. Its thresholds are no division and rounding, so no integer file can hold it.
    """

    kernels = forward, backward
    uniform = False
    extra = ("widths",)

    def __init__(self, spec: QuantSpec, shape: torch.Size | None = None, axis: int = 0) -> None:
        if shape is not None:
            raise UserError("quantizer=n2uq learns thresholds of activations; for weights set quantizer: lsq")
        if spec.format != "int" or spec.width > MAX_BITS:
            raise UserError(
                f"format={spec.format}, bits={spec.bits}: quantizer=n2uq has integers of at most {MAX_BITS} bits"
            )
        if spec.rounding_mode != "nearest":
            raise UserError(
                f"rounding_mode={spec.rounding_mode}: quantizer=n2uq compares and does not round; "
                "set rounding_mode: nearest"
            )
        super().__init__(spec, shape, axis)
        self.widths = nn.Parameter(torch.ones(self.quant_max - self.quant_min, dtype=torch.float32))

    def change_bits(self, bits: int) -> None:
        """Refused: each step has a width of its own."""
        raise UserError(f"quantizer=n2uq cannot go from {self.spec.bits} to {bits} bits; anneal with quantizer: lsq")

    @torch.no_grad()
    def levels(self, x: Tensor) -> Tensor:
        scale, low, _ = self.grid(x)
        return staircase(x, scale, low, self.widths)
