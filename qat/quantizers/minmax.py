"""A grid that follows the data: the range of the weights as they are, and a moving average of the activations' extremes
(Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", CVPR
2018, section 3.1).

Ranges move in training only, and only while `tracking`; validation, sanity checks and prediction read them. The
gradient is the clipped straight-through estimator, for weights with half a step of room: the largest define the scale,
and its rounding must not cost them their gradient. Calibration gives weights the range that training follows, their
extremes (`even` and `centred` make another scale of them, at both times): training begins with the grid that was
measured.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from qat.errors import UserError
from qat.grid.ranges import Range, even, minmax
from qat.grid.spec import QuantSpec
from qat.kernels.gradient import Gradient, gradient
from qat.modes import recomputing
from qat.quantizers import dynamic
from qat.quantizers.fixed import Fixed, forward


class MinMax(Fixed):
    """Tracked range; `tracking` (a buffer) freezes it. What is loaded is not frozen: the callback that froze it when it
    was saved may not be there in the fit that goes on.

    Use it for weights in blocks (MX, NVFP4), whose scale is defined by the largest magnitude, and to do as torch's and
    TensorFlow's own QAT does.

    Args:
        spec, shape, axis: See `Quantizer`.
        momentum: Weight of a new batch in the moving average of an activation's range.
    """

    running_low: Tensor
    running_high: Tensor
    tracking: Tensor

    def __init__(self, spec: QuantSpec, shape: torch.Size | None = None, axis: int = 0, momentum: float = 0.01) -> None:
        if not 0 < momentum <= 1:
            raise UserError(f"options.momentum={momentum}: must be above 0 and at most 1")
        super().__init__(spec, shape, axis)
        self.momentum = 1.0 if self.is_weight else momentum
        if self.is_weight:
            self.gradient = gradient(forward, dynamic.backward, spec.rounding)
        self.register_buffer("running_low", torch.zeros_like(self.scale))
        self.register_buffer("running_high", torch.zeros_like(self.scale))
        self.register_buffer("tracking", torch.ones(1, dtype=torch.bool))

    @torch.no_grad()
    def follow(self, x: Tensor) -> None:
        if not x.numel() or recomputing():
            return
        running, rows = self.running_low, self.partition.rows(x.float())
        low, high = (r.view_as(running).to(running.dtype) for r in self._extremes(rows))
        # A non-finite batch (an exploded step) must not poison the range for ever.
        step = (self.tracking * low.isfinite() * high.isfinite()).to(running.dtype) * self.momentum
        self._set_range(
            torch.lerp(self.running_low, low.nan_to_num(), step).flatten(),
            torch.lerp(self.running_high, high.nan_to_num(), step).flatten(),
        )

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.tracking = torch.ones_like(self.tracking)  # a new one: `assign` may have put in the caller's own

    def _extremes(self, rows: Tensor) -> Range:
        return (even if self.spec.range == "even" else minmax)(rows, self.spec)

    @classmethod
    def heeds(cls, weight: bool) -> Collection[str]:
        return ("minmax", "centred", "even") if weight else super().heeds(weight)

    def _fit(self, rows: Tensor) -> None:
        if self.is_weight:
            self._set_range(*self._extremes(rows))
        else:
            super()._fit(rows)

    @torch.no_grad()
    def _set_range(self, low: Tensor, high: Tensor) -> None:
        self.running_low.copy_(low.view_as(self.running_low))
        self.running_high.copy_(high.view_as(self.running_high))
        super()._set_range(low, high)

    def fake_quantize(
        self, x: Tensor, scale: Tensor, low: Tensor, high: Tensor, gradient: Gradient | None = None
    ) -> Tensor:
        # A copy: the tensor may be read twice before backward, and the second reading moves the scale in place.
        return super().fake_quantize(x, scale.clone(), low, high, gradient)
