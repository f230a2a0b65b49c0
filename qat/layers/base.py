"""What quantized layers share: they read their input and their weight through quantizers, and run the original
computation.

A mixin names the layer class it serves (`serves`) and which axis of the weight is the output channel. Adding a layer is
one more mixin in this folder, listed in `qat/layers/__init__.py`.
"""

from typing import ClassVar

from torch import Tensor, nn

from qat.layers.accumulator import accumulator_scale, bias_codes, grid_versions
from qat.layers.twin import TwinMixin, ours, versions
from qat.quantizers import Quantizer


class QuantizedLayer(TwinMixin):
    """A layer whose input (and weight, if it has one) lie on grids.

    Attributes:
        input_quantizer: Grid of the input; several in a row where a tensor is first put on a finer grid that it shares
            with other readers.
        weight_quantizer: Grid of the weight.
        folds: Whether a BatchNorm folds into it.

    Class attributes:
        serves: The layer class; subclasses are served too, unless they have a forward of their own.
        channel_axis: Which axis of the weight is the output channel; `None` if it has no weight.
        inputs: How many of its first float arguments are read through grids (the second through
            `input_quantizer_1`).
    """

    serves: ClassVar[type[nn.Module]]
    channel_axis: ClassVar[int | None] = None
    inputs: ClassVar[int] = 1

    input_quantizer: nn.Module | None
    weight_quantizer: Quantizer | None
    weight: Tensor
    bias: Tensor | None
    training: bool
    folds: bool = False

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
            if self.training:
                return quantizer(weight)
            stamp = lambda: (*versions(weight), *quantizer.versions())  # noqa: E731
            return self.once_per_change("weight", stamp, lambda: quantizer(weight))

    def quantized_bias(self) -> Tensor | None:
        """The bias: float in training, in whole accumulator steps in evaluation (a BatchNorm behind the layer does that
        for both).
        """
        if self.bias is None or self.training or self.folds:
            return self.bias
        with ours():
            stamp = lambda: (*versions(self.bias), *grid_versions(self))  # noqa: E731
            return self.once_per_change("bias", stamp, self._rounded_bias)

    def release(self) -> None:
        """Gives up the float weight and bias (conversion has made codes of them)."""
        del self.weight
        self._parameters.pop("bias", None)  # pyright: ignore[reportAttributeAccessIssue]

    def _rounded_bias(self) -> Tensor | None:
        scale = accumulator_scale(self)
        if scale is None or self.bias is None:
            return self.bias
        return (bias_codes(self.bias, scale) * scale).to(self.bias.dtype)
