"""Base class of quantized layers: they read their input and their weight through quantizers, and run the original
computation.

A mixin names the layer class it serves (`serves`) and which axis of the weight is the output channel. Adding a layer is
one more mixin in this folder, listed in `qat/layers/__init__.py`.
"""

from collections.abc import Callable
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from qat.kernels.onednn import Geometry
from qat.layers.accumulator import RoundedBias, accumulator_scale, grids
from qat.layers.products_evaluation import evaluated_on_codes
from qat.layers.products_training import MIN_ELEMENTS, trained_on_codes
from qat.layers.rounded import rounded
from qat.layers.shared import here, read
from qat.layers.sources import from_sources
from qat.layers.twin import Inserted, ours, stored_tensor
from qat.quantizers import Quantizer


class QuantizedLayer(Inserted):
    """A layer whose input (and weight, if it has one) lie on grids.

    Attributes:
        input_quantizer: Grid of the input; several in a row where a tensor is first put on a finer grid that it shares
            with other readers.
        weight_quantizer: Grid of the weight.
        folds: Whether a BatchNorm folds into it.
        round_bias: When its bias is rounded: in `eval`, in `train` too, or `never`.

    Class attributes:
        serves: The layer class; subclasses are served too, unless they have a forward of their own.
        channel_axis: Which axis of the weight is the output channel; `None` if it has no weight.
        output_axis: Which axis of the output the output channels are along, counted from the end; the input's are along
            the same one.
        inputs: How many of its first float arguments are read through grids (the second through
            `input_quantizer_1`).
    """

    serves: ClassVar[type[nn.Module]]
    channel_axis: ClassVar[int | None] = None
    output_axis: ClassVar[int] = -1
    inputs: ClassVar[int] = 1

    input_quantizer: nn.Module | None
    weight_quantizer: Quantizer | None
    weight: Tensor
    bias: Tensor | None
    folds: bool = False
    round_bias: str = "eval"

    def run(self, function: Callable[..., Tensor], x: Tensor, around: Callable[..., Tensor] | None = None) -> Tensor:
        """`function(input, weight, bias)` of the quantized tensors.

        Args:
            function: What multiplies in float32; the same product may run on codes instead.
            x: The input before its grid.
            around: In training, called with whatever multiplies and with the three quantized tensors for it.
        """
        if not self.training:
            y = None if torch.is_grad_enabled() else evaluated_on_codes(self, x)
        else:
            y = trained_on_codes(self, x, around) if x.numel() >= MIN_ELEMENTS else None
        if y is not None:
            return y
        x, weight = self.quantized_input(x), self.quantized_weight()
        as_it_is = self.training and self.round_bias != "train" and "bias" in self._parameters
        bias = self._parameters["bias"] if as_it_is else self.quantized_bias()
        if around is not None:
            function = partial(around, function)
        if hasattr(weight, "made") or (hasattr(x, "made") and not torch.compiler.is_dynamo_compiling()):
            return from_sources((x, weight), function, x, weight, bias)
        return function(x, weight, bias)

    def geometry(self) -> Geometry | None:
        """Stride, padding, dilation and groups of the convolution that the layer is, nothing of a linear map, `None` if
        it is something else: then codes are not multiplied, but what they stand for.
        """
        return None

    def quantized_input(self, x: Tensor) -> Tensor:
        quantizer = self._modules["input_quantizer"]
        if quantizer is None:
            return x
        with ours():
            y = None if self.training or torch.is_grad_enabled() else rounded(quantizer, x)
            if y is not None:
                return y
            return read(quantizer, x) if here.forwards else quantizer(x)  # a call less where nothing is shared

    def quantized_weight(self) -> Tensor:
        """The weight on its grid; outside training it is computed once per change of weight or grid."""
        quantizer, weight = self._modules["weight_quantizer"], self._parameters.get("weight")
        if weight is None:  # computed by a parametrization
            weight = self.weight
        if quantizer is None:
            return weight
        with ours():
            if self.training:
                return quantizer(weight)
            return self.once_per_change("weight", (weight,), (quantizer,), lambda: quantizer(weight))

    def quantized_bias(self) -> Tensor | None:
        """The bias as it is added: in whole accumulator steps in evaluation, or always (`round_bias`); a BatchNorm
        behind the layer does that for both, and in evaluation alone.
        """
        bias = stored_tensor(self, self._parameters, "bias")
        if bias is None or self.folds or (self.training and self.round_bias != "train"):
            return bias
        with ours():
            if self.training:
                scale = accumulator_scale(self)
                return bias if scale is None else RoundedBias.apply(bias, scale)  # pyright: ignore[reportReturnType]
            return self.once_per_change("bias", (bias,), grids(self), self._rounded_bias)

    def weight_place(self) -> tuple[nn.Module, str]:
        """The module that holds the weight, and the name of the tensor there that the weight is, or a part of."""
        return self, "weight"  # pyright: ignore[reportReturnType]

    def weight_within(self, whole: Tensor) -> Tensor:
        """A view of the weight's part of a tensor that is shaped as that one."""
        return whole

    def release(self) -> None:
        """Gives up the float weight and bias (conversion has made codes of them)."""
        del self.weight
        self.__dict__.pop("_kept", None)
        self._parameters.pop("bias", None)

    def undo_twin(self) -> None:
        super().undo_twin()
        del self.input_quantizer, self.weight_quantizer
        for index in range(1, self.inputs):
            delattr(self, f"input_quantizer_{index}")
        for name in ("folds", "round_bias"):
            self.__dict__.pop(name, None)

    def _rounded_bias(self) -> Tensor | None:
        scale = accumulator_scale(self)
        if scale is None or self.bias is None:
            return self.bias
        return RoundedBias.forward(None, self.bias, scale)
