"""What quantized layers share: they read their input and their weight through quantizers, and run the original computation.

A mixin names the layer class it serves (`serves`) and which axis of the weight is the output channel. Adding a layer is one more mixin in this folder,
listed in `qat/layers/__init__.py`.
"""

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from qat.layers.accumulator import accumulator_scale, bias_codes
from qat.layers.twin import TwinMixin, ours
from qat.quantizers import Quantizer


class QuantizedLayer(TwinMixin):
    """A layer whose input (and weight, if it has one) lie on grids.

    Attributes:
        input_quantizer: Grid of the input; several in a row where a tensor is first put on a finer grid that it shares with other readers.
        weight_quantizer: Grid of the weight.
        folds: Whether a BatchNorm folds into it.
    """

    serves: ClassVar[type[nn.Module]]
    channel_axis: ClassVar[int | None] = None

    input_quantizer: nn.Module | None
    weight_quantizer: Quantizer | None
    weight: Tensor
    bias: Tensor | None
    training: bool
    folds: bool = False
    _weight_cache: tuple[Any, Tensor] | None = None

    def quantized_input(self, x: Tensor) -> Tensor:
        if self.input_quantizer is None:
            return x
        with ours():
            return self.input_quantizer(x)

    def quantized_weight(self) -> Tensor:
        """The weight on its grid; outside training it is computed once per change of weight or grid."""
        quantizer, weight = self.weight_quantizer, self.weight
        if quantizer is None:
            return weight
        with ours():
            return self._on_grid(quantizer, weight)

    def _on_grid(self, quantizer: Quantizer, weight: Tensor) -> Tensor:
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or weight.is_inference():
            return quantizer(weight)
        stamp = weight.data_ptr(), weight._version, *quantizer.versions()
        if self._weight_cache is None or self._weight_cache[0] != stamp:
            self._weight_cache = stamp, quantizer(weight)
        return self._weight_cache[1]

    def quantized_bias(self) -> Tensor | None:
        """The bias: float in training, in whole accumulator steps in evaluation (a BatchNorm behind the layer does that for both)."""
        if self.bias is None or self.training or self.folds:
            return self.bias
        with ours():
            scale = accumulator_scale(self)
            return self.bias if scale is None else (bias_codes(self.bias, scale) * scale).to(self.bias.dtype)

    def train(self, mode: bool = True) -> Self:
        # Averaging callbacks swap weights through `.data`, which no version counter sees; they do so after switching modes.
        self._weight_cache = None
        return super().train(mode)  # pyright: ignore[reportAttributeAccessIssue]

    def __getstate__(self) -> dict[str, Any]:
        parent = super().__getstate__()  # pyright: ignore[reportAttributeAccessIssue]
        return {k: v for k, v in parent.items() if k != "_weight_cache"}
