"""A grid measured on each tensor as it passes: nothing to calibrate, nothing to learn (LLM.int8(), Dettmers et al.,
NeurIPS 2022, section 3.1, for vectors; OCP Microscaling v1.0 for groups).

The range estimator (`range: minmax` is what hardware does) looks at the very values it then rounds: at all of an
activation (`granularity: tensor`), at each vector along its last axis (`token`) or at `group_size` consecutive elements
along that axis, of a convolution's input along its channels (`group`); at a weight as a whole, by channel or by group.
Tensors, and fp8 block scales (`scale: e4m3`, whose float32 scale is one per tensor), mix the samples of a batch; tokens
and other groups do not.

`options: {calibrated: true}` takes the float32 scale above fp8 block scales from calibration instead, as hardware does
with the inputs of NVFP4 layers: a kernel cannot look at the whole tensor before it rounds the first block. Samples do
not mix then, and what is larger than anything in calibration saturates.

The gradient is the clipped straight-through estimator; none flows through the scale:

    dL/dx = dL/dy where low - 1/2 <= x / scale <= high + 1/2, else 0

The half step is room for the rounding of the scale: the largest value, which defines it, is not clipped. NaN stays NaN.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from qat.errors import UserError
from qat.grid import ranges
from qat.grid.formats import FLOATS, Rounding
from qat.grid.functional import TINY, over, ratio
from qat.grid.scales import snap, two_level
from qat.grid.spec import QuantSpec
from qat.kernels.gradient import Grads
from qat.quantizers.base import Grid, Quantizer
from qat.quantizers.fixed import forward

E4M3 = FLOATS["e4m3"]


def backward(rounding: Rounding, grad: Tensor, x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Grads:
    v = ratio(x, scale)
    return grad * (v.ge(low - 0.5) & v.le(high + 0.5)), None


class Dynamic(Quantizer):
    """Measured range; see the module's docstring. `scale` and `zero_point` exist for the keys' sake, and say
    nothing, but for the scale above block scales if that is calibrated.

    Use it for activations of language models (one scale per token) and in blocks (MX, NVFP4). No graph format holds a
    scale that is measured as it passes: export to `packed`, `compressed_tensors` or `none`.

    Args:
        spec, shape, axis: See `Quantizer`.
        calibrated: Whether the scale above block scales stays what calibration found.
    """

    kernels = forward, backward
    static: ClassVar[bool] = False

    def __init__(
        self, spec: QuantSpec, shape: torch.Size | None = None, axis: int = 0, calibrated: bool = False
    ) -> None:
        super().__init__(spec, shape, axis)
        if calibrated and (spec.scale != "e4m3" or shape is not None):
            raise UserError("options.calibrated=true: is for activations with block scales of e4m3, under one scale")
        self.calibrated = calibrated
        self.initialised.fill_(not calibrated)
        self._read_flags()

    def _scale_shape(self, shape: torch.Size | None) -> tuple[int, ...]:
        granularity = self.spec.granularity
        if shape is not None and granularity == "token":
            raise UserError("granularity=token is for activations; the vectors of a weight are granularity: channel")
        if shape is not None:
            return super()._scale_shape(shape)
        if granularity == "channel":
            raise UserError("granularity=channel: an activation is measured by tensor, token or group")
        return (1,)

    @property
    def needs_range(self) -> bool:
        return self.calibrated

    @torch.no_grad()
    def grid(self, x: Tensor) -> Grid:
        """The grid that fits `x`, without gradients."""
        rows = self.partition.rows(self.transform(x.detach()).float())
        if rows.numel():
            low, high = ranges.ESTIMATORS[self.spec.range](rows, self.spec)
            scale, zero_point = ranges.scale_and_zero_point(low, high, self.spec)
            scale = two_level(scale, self.scale) if self.calibrated else snap(scale, self.spec)
        else:
            scale = rows.new_ones(len(rows))
            zero_point = torch.zeros_like(scale, dtype=torch.int32)
        scale, zero_point = (self.partition.spread_rows(each, x) for each in (scale, zero_point))
        if self.spec.symmetric:
            return scale, self.lowest, self.highest
        return scale, self.lowest - zero_point, self.highest - zero_point

    def dequantize(self, codes: Tensor, grid: Grid | None = None) -> Tensor:
        """The real values of `codes` on `grid`, which only the tensor that they came from knows."""
        if grid is None:
            raise ValueError("a dynamic grid is not in its codes: dequantize(quantize(x), grid(x))")
        return super().dequantize(codes, grid)

    def _fit(self, rows: Tensor) -> None:
        largest = over(rows.abs().amax(), self.spec.quant_max)
        self.scale.copy_(over(largest, E4M3.largest).clamp_min(TINY / E4M3.smallest))

    def versions(self) -> tuple[Any, ...]:
        return (self.on,)  # of a weight, which it measures anew
