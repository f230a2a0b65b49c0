"""`Quantizer`: one tensor's grid as a module. It knows no layer, no policy and no Lightning.

A quantizer observes, is off or is on (`qat.grid.calibrated`). Switched on, it returns `dequantize(quantize(x))` in the
type of `x`, bit for bit (but for stochastic rounding, which is for training alone), with a straight-through gradient;
in float64 before `dequantize` rounds it to float32.

A new quantizer is one file in this folder that subclasses `Quantizer` and gives it `kernels`; `find` knows it by the
file's name. Shapes: `x` is any tensor; grids broadcast against its *grouped* view (`qat.grid.partition`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from qat.errors import UserError
from qat.grid.calibrated import Calibrated
from qat.grid.functional import dither, levels, values
from qat.grid.partition import Partition
from qat.grid.scales import acting, snap
from qat.grid.spec import QuantSpec
from qat.kernels.gradient import Gradient, Grads, gradient
from qat.kernels.recipes import marked_by

Grid = tuple[Tensor, Tensor, Tensor]
"""(scale, low, high): scale and the limits in units of it, broadcasting against the grouped view."""


class Quantizer(Calibrated):
    """The grid of one tensor.

    Args:
        spec: A resolved spec (`QuantSpec.resolved`): `signed` and `narrow` are settled.
        shape: Shape of the tensor if it is a weight, `None` for an activation (whose batch dimension varies).
        axis: The output-channel axis of a weight; groups run along the other one of axes 0 and 1 (of an
            activation: along `spec.group_axis`).

    Attributes:
        scale: `(1,)` per tensor, `(channels,)` per channel, or the weight's shape with the grouped axis divided
            by `group_size`.
        zero_point: int32 of the same shape; the code of the value zero.
        quant_min, quant_max: The lowest and highest code.
        partition: Which of a tensor's elements share a scale.
        gradient: The fake quantization that training differentiates.
        reshapes: Whether groups or a transform lie between `x` and what is rounded.
        dithers: Whether training rounds stochastically.
        follows: Whether training moves the grid after the tensors that pass (`minmax`, weights of `dorefa`).
        readers: How many layers and operands use this quantizer in a forward pass; in training they share one rounding.

    Class attributes:
        kernels: Its rounding and the gradient of that (see `qat.kernels.gradient.gradient`).
        uniform: Whether codes come from equal steps, as `QuantizeLinear` computes them; otherwise there is no
            integer file.
        static: Whether every `x` has the same grid; of one that is measured on each `x`, only `grid(x)` knows the
            scale.

    Raises:
        UserError: if the granularity does not fit the shape.
    """

    kernels: ClassVar[tuple[Callable[..., Tensor], Callable[..., Grads]]]
    uniform: ClassVar[bool] = True
    static: ClassVar[bool] = True

    lowest: Tensor
    highest: Tensor
    readers: int = 1

    def __init__(self, spec: QuantSpec, shape: torch.Size | None = None, axis: int = 0) -> None:
        super().__init__()
        self.spec = spec
        self.axis = axis
        self.gradient = gradient(*self.kernels, spec.rounding)
        self.quant_min, self.quant_max = spec.quant_min, spec.quant_max
        self.is_weight = shape is not None
        self.partition = Partition(spec.granularity, spec.group_size, axis, self.is_weight, spec.group_axis or -1)
        scale_shape = self._scale_shape(shape)
        self._make_scale(torch.ones(scale_shape, dtype=torch.float32))
        self._make_zero_point(torch.zeros(scale_shape, dtype=torch.int32))
        self._constants: dict[str, float] = {}
        self._set_constants(lowest=self.quant_min, highest=self.quant_max)
        self.reshapes = spec.granularity == "group" or self.transforms
        self.dithers = spec.rounding_mode == "stochastic"
        self.follows = type(self).follow is not Quantizer.follow
        self._spread_shape: tuple[int, ...] | None = None
        if spec.granularity == "channel" and shape is not None:
            self._spread_shape = tuple(-1 if d == axis else 1 for d in range(len(shape)))

    def forward(self, x: Tensor, follow: bool = True) -> Tensor:
        """`x` on its grid; `follow` is false for a tensor that a moving range has followed already.

        Raises:
            UserError: under a transform of `torch.func`, or for a dual tensor.
        """
        if not self.on:
            return self._pass(x)
        if hasattr(x, "on_grid") and marked_by(self, x):
            return x
        if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
            _check_transforms(x)
        if follow and self.follows and self.training:
            self.follow(x.detach())
        inner, grid = self.partition.grouped(self.transform(x)) if self.reshapes else x, self.grid(x)
        if self.dithers and self.training:
            inner = dither(inner, *grid)
        y = self.fake_quantize(inner, *grid)
        y = y if y.dtype is x.dtype else y.to(x.dtype)  # the very tensor, to compilers, too
        return y if y.shape == x.shape else y.view(x.shape)  # groups, and a scalar that met a scale of shape (1,)

    def fake_quantize(
        self, x: Tensor, scale: Tensor, low: Tensor, high: Tensor, gradient: Gradient | None = None
    ) -> Tensor:
        """`dequantize(quantize(x))` with this quantizer's gradient; the grid broadcasts against `x`. Another `gradient`
        also knows what comes before (`qat.kernels.rectified`).
        """
        return (gradient or self.gradient)(x, scale, low, high)

    def follow(self, x: Tensor) -> None:
        """Moves the grid after `x` before a training forward pass rounds to it; most grids stay."""

    # -- the grid ------------------------------------------------------------------------------------------------------

    def step(self) -> Tensor:
        """The scale that acts, format and floor applied: float32, detached, of the shape of `scale`."""
        return snap(self.scale.detach().float(), self.spec)

    def grid(self, x: Tensor) -> Grid:
        """The grid for `x`, with gradients to what is learned."""
        # Not `self.scale` and so on: torch looks those up in Python, which shows in the time of small layers.
        buffers = self._buffers
        scale, low, high = self._parameters.get("scale", buffers.get("scale")), buffers["lowest"], buffers["highest"]
        assert scale is not None and low is not None and high is not None
        if scale.dtype is not torch.float32 or self.spec.scale != "float32":
            scale = acting(scale, self.spec)
        if self._spread_shape is not None:
            scale = scale.view(self._spread_shape)
        elif self.spec.granularity != "tensor":
            scale = self.partition.spread(scale, x.ndim)
        if self.spec.symmetric:
            return scale, low, high
        zero_point = self.partition.spread(self.zero_point, x.ndim)
        return scale, low - zero_point, high - zero_point

    def transform(self, x: Tensor) -> Tensor:
        """The tensor that is rounded: `x` itself, but for quantizers that reshape it first."""
        return x

    @property
    def transforms(self) -> bool:
        """Whether `transform` does anything, so that a value need not be near the grid point that it is rounded to."""
        return type(self).transform is not Quantizer.transform

    def _rows(self, x: Tensor) -> Tensor:
        return self.partition.rows(self.transform(x))

    @torch.no_grad()
    def levels(self, x: Tensor) -> Tensor:
        """`x` rounded to the grid, in units of the scale: float32, of the shape of `x`."""
        return levels(self.partition.grouped(self.transform(x)), *self.grid(x), self.spec.rounding).view(x.shape)

    def quantize(self, x: Tensor) -> Tensor:
        """The codes of `x`.

        Returns:
            Of the shape of `x`. Integer formats: `quant_min .. quant_max` as `code_dtype`. Floating-point formats:
            bit patterns as uint8.

        Raises:
            ValueError: if `x` holds NaN, which has no code.
        """
        level = self.levels(x)
        if level.isnan().any():
            raise ValueError("NaN has no code: the tensor to be quantized holds NaN")
        if self.spec.float_format is not None:
            return self.spec.float_format.encode(level)
        if not self.spec.symmetric:
            level = self.partition.grouped(level) + (self.quant_min - self.grid(x)[1])
        return level.to(self.code_dtype).view(x.shape)

    def dequantize(self, codes: Tensor, grid: Grid | None = None) -> Tensor:
        """The real values of `codes`, float32.

        Args:
            codes: From `quantize`.
            grid: From `grid(x)`, for a quantizer that measures each `x`.
        """
        scale, low, _ = grid or self.grid(codes)
        if self.spec.float_format is not None:
            level = self.partition.grouped(self.spec.float_format.decode(codes))
        else:
            level = self.partition.grouped(codes).float() + (low - self.quant_min)
        return values(level, scale.detach(), torch.float32).view(codes.shape)

    @property
    def code_dtype(self) -> torch.dtype:
        """The smallest integer type that holds every code of an integer format."""
        options = (torch.int8, torch.int16, torch.int32) if self.spec.signed else (torch.uint8, torch.int32)
        return next(t for t in options if torch.iinfo(t).min <= self.quant_min and self.quant_max <= torch.iinfo(t).max)

    # -- what it is made of --------------------------------------------------------------------------------------------

    def _make_scale(self, scale: Tensor) -> None:
        """Registers `scale`; quantizers that learn it register a parameter instead."""
        self.register_buffer("scale", scale)

    def _make_zero_point(self, zero_point: Tensor) -> None:
        """Registers `zero_point`; a quantizer that derives it from something else has a property instead."""
        self.register_buffer("zero_point", zero_point)

    def _set_constants(self, **values: float) -> None:
        """Makes buffers of numbers that the settings say, so that compiled kernels are the same for all of them.
        Checkpoints do not carry them.
        """
        for name, value in values.items():
            held = self._buffers.get(name)
            if held is None or held.is_meta:
                held = torch.empty(1, dtype=torch.float32, device=self.enabled.device)
                self.register_buffer(name, held, persistent=False)
            held.fill_(value)
        self._constants.update(values)

    def _scale_shape(self, shape: torch.Size | None) -> tuple[int, ...]:
        """The shape of `scale`, where the granularity suits a weight of this shape, or an activation."""
        if shape is not None:
            return self.partition.scale_shape(shape)
        if self.spec.granularity != "tensor":
            raise UserError(
                f"granularity={self.spec.granularity}: quantizer={self.spec.quantizer} keeps one scale for an "
                "activation (granularity=tensor); quantizer: dynamic measures tokens and groups as they pass"
            )
        return (1,)

    # -- another grid --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def change_bits(self, bits: int) -> None:
        """Gives the grid another width in place; its range stays (the step changes), and so do keys and shapes.

        Raises:
            UserError: if its format does not have that many bits.
        """
        old, new = self.spec, dataclasses.replace(self.spec, bits=bits)
        if new.symmetric:
            factor = old.quant_max / new.quant_max
        else:
            factor = (old.quant_max - old.quant_min) / (new.quant_max - new.quant_min)
            zero_point = new.quant_min + (self.zero_point - old.quant_min) / factor
            self.zero_point.copy_(zero_point.round().clamp(new.quant_min, new.quant_max))
        self.change_spec(new, self.scale * factor)

    @torch.no_grad()
    def change_spec(self, spec: QuantSpec, scale: Tensor) -> None:
        """Gives the grid another spec of the same granularity in place, and another scale."""
        self.scale.copy_(scale)
        self.spec, self.quant_min, self.quant_max = spec, spec.quant_min, spec.quant_max
        self._set_constants(lowest=self.quant_min, highest=self.quant_max)

    def versions(self) -> tuple[Any, ...]:
        """Changes whenever the grid or its state does; what a cache of quantized weights is keyed by."""
        scale = self._parameters.get("scale", self._buffers.get("scale"))
        assert scale is not None
        return scale._version, scale.data_ptr(), self.on, None if self.spec.symmetric else self.zero_point._version

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._set_constants(**self._constants)  # `to_empty` leaves anything in them

    def extra_repr(self) -> str:
        return f"{self.spec.short}, {self.spec.quantizer}"


def _check_transforms(x: Tensor) -> None:
    """Raises UserError where `x` is under a transform that would find a rounding, and no gradient of it."""
    if torch.compiler.is_dynamo_compiling():
        return
    if torch._C._are_functorch_transforms_active() or forward_ad.unpack_dual(x).tangent is not None:
        raise UserError(
            "torch.func transforms (vmap, grad, jvp, ...) and forward-mode derivatives do not know the gradients of "
            "quantizers: call backward, or switch the quantizers off around the transform"
        )
