"""A grid that stays where calibration put it; the gradient is the clipped straight-through estimator (Bengio et al., 2013)."""

from torch import Tensor

from qat.functional import Bound, RoundSTE
from qat.quantizers.base import Quantizer


class Fixed(Quantizer):
    """Fixed range; only the weights learn."""

    def fake_quantize(self, x: Tensor, scale: Tensor, low: Bound, high: Bound) -> Tensor:
        return RoundSTE.apply(x, scale, low, high)  # pyright: ignore[reportReturnType]
