"""LSQ: the step size is a parameter, trained by its own gradient (Esser et al., "Learned Step Size Quantization", ICLR 2020).

Differs from the paper in three ways: the step acts as at least `SCALE_FLOOR`, so that it cannot turn negative; it may be shared by a
channel or a group instead of the tensor, with N in the gradient scale 1 / sqrt(N * quant_max) counting the elements that share it; and for
activations N counts one sample's elements rather than a batch's, so that the gradient does not depend on how a batch is split over processes.
"""

from torch import Tensor, nn

from qat.functional import Bound, RoundLSQ
from qat.quantizers.base import Quantizer


class LSQ(Quantizer):
    """Learned step size; see the module's docstring. `scale` is a parameter."""

    def _make_scale(self, scale: Tensor) -> None:
        self.scale = nn.Parameter(scale)

    def fake_quantize(self, x: Tensor, scale: Tensor, low: Bound, high: Bound) -> Tensor:
        sharing = (
            x.numel() // self.scale.numel() if self.is_weight else x.numel() // max(x.shape[0], 1) if x.ndim else 1
        )
        grad_scale = (max(sharing, 1) * max(self.quant_max, 1)) ** -0.5
        return RoundLSQ.apply(x, scale, low, high, grad_scale)  # pyright: ignore[reportReturnType]
