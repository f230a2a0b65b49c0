"""Parts of a converted model: codes and frozen grids, and the two operations on them.

A converted model runs anywhere torch does (its operations compute in float what the codes stand for), and it is the
one thing that exporters consume: by `emitting`, an object of theirs writes their format's operations instead while
they trace the model.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from qat.grid.formats import Float, round_midrise
from qat.grid.functional import levels, values
from qat.grid.spec import QuantSpec
from qat.layers.site import Site
from qat.layers.twin import TwinMixin, ours
from qat.quantizers import Quantizer

WEIGHT_CODES = ".integer_weight.codes"
"""How the names of the codes of layers' weights end in a state dict."""


def weight_codes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The codes of weights in the state dict of a converted model, by layer."""
    keys = [key for key in state if key.endswith(WEIGHT_CODES)]
    return {key.removesuffix(WEIGHT_CODES): state[key] for key in keys}


class IntegerTensor(nn.Module):
    """A constant (weight or bias) as integer codes, or as those of a floating-point format.

    Attributes:
        codes: int8 or uint8 (of more than 8 bits int16, or int32 if unsigned; of biases int32), in the tensor's own
            shape; of a floating-point format the bit patterns, uint8.
        scale: float32; `(1,)`, `(channels,)`, or the tensor's shape with the grouped axis divided by the group size.
        zero_point: of the shape of `scale` and the type of `codes`.
        bits: Width that every code fits in.
        axis: The channel axis, or for groups the grouped axis; `None` for one scale.
        group_size: Elements per group along `axis`.
        number: The floating-point format of the codes; `None` for integers.
        odd: Whether the grid has odd numbers alone.
        trits: Whether the codes are -1, 0 and 1.
        scale_format: How the scale can be stored (see `QuantSpec.scale`), unless a BatchNorm was folded into it.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    number: Float | None = None
    odd = False
    trits = False
    scale_format = "float32"

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        bits: int,
        axis: int | None = None,
        group_size: int | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point.to(codes.dtype))
        self.bits, self.axis, self.group_size = bits, axis, group_size

    def spread(self, per_scale: Tensor) -> Tensor:
        """Expands a tensor shaped like `scale` so that it broadcasts against `codes`."""
        if self.group_size is not None:
            assert self.axis is not None
            return per_scale.repeat_interleave(self.group_size, dim=self.axis)
        if self.axis is None:
            return per_scale
        return per_scale.view([-1 if d == self.axis else 1 for d in range(self.codes.ndim)])

    def forward(self) -> Tensor:
        return _here.emitter.dequantize(self)

    def extra_repr(self) -> str:
        return f"{'x'.join(map(str, self.codes.shape))} codes of {self.bits} bits"


def integer_bits(spec: QuantSpec) -> int:
    """Bits of the integers that engines compute with: odd numbers -(2^b - 1) .. 2^b - 1 take one more than b."""
    return spec.width + (spec.rounding is round_midrise)


def integer_tensor(x: Tensor, quantizer: Quantizer) -> IntegerTensor:
    """A constant on the grid of a calibrated quantizer."""
    spec = quantizer.spec
    axis = {"tensor": None, "channel": quantizer.axis, "group": 1 - quantizer.axis}[spec.granularity]
    zero = quantizer.zero_point.detach().clone()
    codes = quantizer.quantize(x)
    tensor = IntegerTensor(codes, quantizer.step(), zero, integer_bits(spec), axis, spec.group_size)
    tensor.number, tensor.odd, tensor.scale_format = spec.float_format, spec.rounding is round_midrise, spec.scale
    tensor.trits = spec.trits
    return tensor


class IntegerActivation(nn.Module):
    """A frozen activation grid; `forward` puts a tensor on it.

    Attributes:
        scale: float32 `(1,)`.
        zero_point: int32 `(1,)`.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        self.spec = quantizer.spec
        self.quant_min, self.quant_max = quantizer.quant_min, quantizer.quant_max
        self.register_buffer("scale", quantizer.step())
        self.register_buffer("zero_point", quantizer.zero_point.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return _here.emitter.quantize_dequantize(x, self)

    def extra_repr(self) -> str:
        return self.spec.short


def reads_elementwise(layer: Any) -> bool:
    """Whether the weight of an `IntegerLayer` is an operand like any other, on the grid of an activation: a parameter
    that is added or multiplied elementwise."""
    return isinstance(layer, Site) and layer.holder is None


class Emitter(Protocol):
    """How the operations of a converted model are carried out."""

    def dequantize(self, tensor: IntegerTensor) -> Tensor: ...

    def quantize_dequantize(self, x: Tensor, grid: IntegerActivation) -> Tensor: ...


class Eager:
    """Computes the values with the functions that training uses."""

    def dequantize(self, tensor: IntegerTensor) -> Tensor:
        if tensor.number is not None:
            return tensor.number.decode(tensor.codes) * tensor.spread(tensor.scale)
        level = tensor.codes.to(torch.float64 if tensor.codes.dtype == torch.int32 else torch.float32) - tensor.spread(
            tensor.zero_point
        )
        return (level * tensor.spread(tensor.scale)).float()

    def quantize_dequantize(self, x: Tensor, grid: IntegerActivation) -> Tensor:
        low, high = grid.quant_min - grid.zero_point, grid.quant_max - grid.zero_point
        return values(levels(x, grid.scale, low, high, grid.spec.rounding), grid.scale, x.dtype)


class _Here(threading.local):
    """Who carries them out in this thread."""

    emitter: Emitter = Eager()


_here = _Here()


@contextmanager
def emitting(other: Emitter) -> Iterator[None]:
    """Carries out the operations of converted models with `other` meanwhile, in this thread alone."""
    previous, _here.emitter = _here.emitter, other
    try:
        yield
    finally:
        _here.emitter = previous


class IntegerLayer(TwinMixin):
    """On top of a quantized layer: its weight (and bias, where input and weight are quantized) come from codes.

    Attributes:
        computes_in: Type of the layer's arithmetic, as it was in float.
    """

    computes_in: torch.dtype
    integer_weight: IntegerTensor
    integer_bias: IntegerTensor | None
    bias: Tensor | None

    def train(self, mode: bool = True) -> Self:
        """Codes have no training mode: in it, a layer would look for its float bias."""
        return super().train(False)

    def geometry(self) -> None:
        """`None`: the emitter does the arithmetic of a converted layer."""
        return None

    def quantized_weight(self) -> Tensor:
        with ours():
            return self._typed(self.integer_weight())

    def quantized_bias(self) -> Tensor | None:
        with ours():
            return self._typed(self.integer_bias()) if self.integer_bias is not None else self.bias

    def _typed(self, x: Tensor) -> Tensor:
        # A cast to the type that it has is an operation in a traced program all the same.
        return x if x.dtype == self.computes_in else x.to(self.computes_in)
