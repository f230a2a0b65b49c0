"""A grid that follows the data: the range of the weights as they are, and a moving average of the activations' extremes
(Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", CVPR 2018, section 3.1).

Ranges move in training only, and only while `tracking`; validation, sanity checks and prediction read them.
"""

import torch
from torch import Tensor

from qat.functional import Bound, RoundSTE
from qat.quantizers.base import Quantizer
from qat.spec import QuantSpec

MOMENTUM = 0.01
"""Weight of a new batch in the moving average of activation ranges."""


class MinMax(Quantizer):
    """Tracked range with a clipped straight-through gradient; `tracking` (a buffer) freezes it."""

    running_low: Tensor
    running_high: Tensor
    tracking: Tensor

    def __init__(self, spec: QuantSpec, shape: torch.Size | None = None, axis: int = 0) -> None:
        super().__init__(spec, shape, axis)
        self.register_buffer("running_low", torch.zeros_like(self.scale))
        self.register_buffer("running_high", torch.zeros_like(self.scale))
        self.register_buffer("tracking", torch.ones(1, dtype=torch.bool))

    def _snap(self, x: Tensor) -> Tensor:
        if self.training and x.numel():
            self._track(x.detach())
        return super()._snap(x)

    @torch.no_grad()
    def _track(self, x: Tensor) -> None:
        rows = self._rows(x.float())
        low, high = (
            rows.amin(1).clamp_max(0).view_as(self.running_low),
            rows.amax(1).clamp_min(0).view_as(self.running_high),
        )
        # A non-finite batch (an exploded step) must not poison the range for ever.
        step = self.tracking * low.isfinite() * high.isfinite() * (1.0 if self.is_weight else MOMENTUM)
        self._set_range(
            torch.lerp(self.running_low, low.nan_to_num(), step).flatten(),
            torch.lerp(self.running_high, high.nan_to_num(), step).flatten(),
        )

    def _set_range(self, low: Tensor, high: Tensor) -> None:
        self.running_low.copy_(low.view_as(self.running_low))
        self.running_high.copy_(high.view_as(self.running_high))
        super()._set_range(low, high)

    def fake_quantize(self, x: Tensor, scale: Tensor, low: Bound, high: Bound) -> Tensor:
        # A copy: the tensor may be read twice before backward, and the second reading moves the scale in place.
        return RoundSTE.apply(x, scale.clone(), low, high)  # pyright: ignore[reportReturnType]
