"""`Quantizer`: one tensor's grid as a module. It knows no layer, no policy and no Lightning.

A quantizer is in one of three states. Whether it is on is kept in buffers (so that checkpoints carry it) and mirrored
in Python attributes (so that a forward pass never waits for a device to read them):

    observing   collects a sample of what passes and returns it untouched; `calibrate` turns the sample into scale and
                zero_point
    off         returns its input
    on          returns `dequantize(quantize(x))`, bit for bit (but for stochastic rounding, which is for training
                alone), with a straight-through gradient

A new quantizer is one file in this folder that subclasses `Quantizer` and defines `fake_quantize`; `find` knows it by
the file's name. Shapes: `x` is any tensor; its *grouped* view has one more axis where groups share a scale; grids
broadcast against that view.
"""

import dataclasses
import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qat import ranges
from qat.errors import UserError
from qat.functional import dither, levels, values, wide
from qat.kernels.rectified import made_by
from qat.scales import SnapSTE, snap
from qat.spec import QuantSpec

SAMPLES_PER_BATCH = 1 << 17
"""Calibration keeps at most this many values of a batch (and always its extremes)."""

Grid = tuple[Tensor, Tensor, Tensor]
"""(scale, low, high): scale and the limits in units of it, broadcasting against the grouped view."""


class Quantizer(nn.Module):
    """The grid of one tensor.

    Args:
        spec: A resolved spec (`QuantSpec.resolved`): `signed` and `narrow` are settled.
        shape: Shape of the tensor if it is a weight, `None` for an activation (whose batch dimension varies).
        axis: The output-channel axis of a weight; groups run along the other one of axes 0 and 1 (of an
            activation: along the last).

    Attributes:
        scale: `(1,)` per tensor, `(channels,)` per channel, or the weight's shape with the grouped axis divided
            by `group_size`.
        zero_point: int32 of the same shape; the code of the value zero.
        quant_min, quant_max: The lowest and highest code.
        on: Whether `forward` quantizes.
        readers: How many read through it in a forward pass of the owner.

    Class attributes:
        uniform: Whether codes come from equal steps, as `QuantizeLinear` computes them; otherwise there is no
            integer file.
        static: Whether every `x` has the same grid; of one that is measured on each `x`, only `grid(x)` knows the
            scale.

    Raises:
        UserError: if the granularity does not fit the shape.
    """

    uniform: ClassVar[bool] = True
    static: ClassVar[bool] = True

    scale: Tensor
    zero_point: Tensor
    enabled: Tensor
    initialised: Tensor
    lowest: Tensor
    highest: Tensor
    readers: int = 1

    def __init__(self, spec: QuantSpec, shape: torch.Size | None = None, axis: int = 0) -> None:
        super().__init__()
        self.spec = spec
        self.axis = axis
        self.quant_min, self.quant_max = spec.quant_min, spec.quant_max
        self.is_weight = shape is not None
        scale_shape = self._scale_shape(shape)
        self._make_scale(torch.ones(scale_shape, dtype=torch.float32))
        self._make_zero_point(torch.zeros(scale_shape, dtype=torch.int32))
        self.register_buffer("enabled", torch.ones(1, dtype=torch.bool))
        self.register_buffer("initialised", torch.zeros(1, dtype=torch.bool))
        # As tensors, so that compiled kernels are the same for every grid.
        self.register_buffer("lowest", torch.full((1,), self.quant_min, dtype=torch.float32), persistent=False)
        self.register_buffer("highest", torch.full((1,), self.quant_max, dtype=torch.float32), persistent=False)
        self._moves = spec.granularity == "group" or type(self).transform is not Quantizer.transform
        self._dithers = spec.rounding_mode == "stochastic"
        self._follows = type(self).follow is not Quantizer.follow
        self._spread_shape: tuple[int, ...] | None = None
        if spec.granularity == "channel" and shape is not None:
            self._spread_shape = tuple(-1 if d == axis else 1 for d in range(len(shape)))
        self.observing = False
        self._sample: list[Tensor] = []
        self._read_flags()

    def _make_scale(self, scale: Tensor) -> None:
        """Registers `scale`; quantizers that learn it register a parameter instead."""
        self.register_buffer("scale", scale)

    def _make_zero_point(self, zero_point: Tensor) -> None:
        """Registers `zero_point`; a quantizer that derives it from something else has a property instead."""
        self.register_buffer("zero_point", zero_point)

    def _scale_shape(self, shape: torch.Size | None) -> tuple[int, ...]:
        if self.spec.granularity == "tensor":
            return (1,)
        if shape is None:
            raise UserError(
                f"granularity={self.spec.granularity}: quantizer={self.spec.quantizer} keeps one scale for an "
                "activation (granularity=tensor); quantizer: dynamic measures tokens and groups as they pass"
            )
        if self.spec.granularity == "channel":
            return (shape[self.axis],)
        size, group_axis = self.spec.group_size, self._group_axis(len(shape))
        if size is None or shape[group_axis] % size:
            raise UserError(
                f"group_size={size} does not divide the {shape[group_axis]} input channels of a weight of shape "
                f"{tuple(shape)}; the last group would be ragged"
            )
        return (*shape[:group_axis], shape[group_axis] // size, *shape[group_axis + 1 :])

    # -- the grid ------------------------------------------------------------------------------------------------------

    def _group_axis(self, ndim: int) -> int:
        return 1 - self.axis if self.is_weight else ndim - 1

    def _grouped(self, x: Tensor) -> Tensor:
        if self.spec.granularity != "group":
            return x
        axis, size = self._group_axis(x.ndim), self.spec.group_size or 1
        return x.unflatten(axis, (x.shape[axis] // size, size))  # -1 would be ambiguous for an empty tensor

    def _spread(self, per_scale: Tensor, ndim: int) -> Tensor:
        """A view of a tensor shaped like `scale` that broadcasts against the grouped view of one of `ndim` axes."""
        if self.spec.granularity == "tensor":
            return per_scale
        if self.spec.granularity == "channel":
            return per_scale.view([-1 if d == self.axis else 1 for d in range(ndim)])
        return per_scale.unsqueeze(self._group_axis(ndim) + 1)

    def _acting(self, scale: Tensor) -> Tensor:
        """`scale` as it is stored: in its format, with a straight-through gradient. Kernels keep float32 scales above
        zero.
        """
        scale = wide(scale)
        if self.spec.scale == "float32":
            return scale
        if not scale.requires_grad:
            return snap(scale, self.spec)
        return SnapSTE.apply(scale, self.spec)  # pyright: ignore[reportReturnType]

    def step(self) -> Tensor:
        """The scale that acts, format and floor applied: float32, detached, of the shape of `scale`."""
        return snap(self.scale.detach().float(), self.spec)

    @property
    def needs_range(self) -> bool:
        """Whether calibration has to find something."""
        return self.static

    def grid(self, x: Tensor) -> Grid:
        """The grid for `x`, with gradients to what is learned."""
        # Not `self.scale` and so on: torch looks those up in Python, which shows in the time of small layers.
        buffers = self._buffers
        scale, low, high = self._parameters.get("scale", buffers.get("scale")), buffers["lowest"], buffers["highest"]
        assert scale is not None and low is not None and high is not None
        if scale.dtype is not torch.float32 or self.spec.scale != "float32":
            scale = self._acting(scale)
        if self._spread_shape is not None:
            scale = scale.view(self._spread_shape)
        elif self.spec.granularity != "tensor":
            scale = self._spread(scale, x.ndim)
        if self.spec.symmetric:
            return scale, low, high
        zero_point = self._spread(self.zero_point, x.ndim)
        return scale, low - zero_point, high - zero_point

    def transform(self, x: Tensor) -> Tensor:
        """What is rounded: `x` itself, but for quantizers that reshape their tensor first."""
        return x

    @torch.no_grad()
    def levels(self, x: Tensor) -> Tensor:
        """`x` rounded to the grid, in units of the scale: float32, of the shape of `x`."""
        return levels(self._grouped(self.transform(x)), *self.grid(x), self.spec.rounding).view(x.shape)

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
        codes = self._grouped(level) + (self.quant_min - self.grid(x)[1]) if not self.spec.symmetric else level
        return codes.to(self.code_dtype).view(x.shape)

    def dequantize(self, codes: Tensor, grid: Grid | None = None) -> Tensor:
        """The real values of `codes`, float32.

        Args:
            codes: From `quantize`.
            grid: From `grid(x)`, for a quantizer that measures each `x`.
        """
        scale, low, _ = grid or self.grid(codes)
        if self.spec.float_format is not None:
            level = self._grouped(self.spec.float_format.decode(codes))
        else:
            level = self._grouped(codes).float() + (low - self.quant_min)
        return values(level, scale.detach(), torch.float32).view(codes.shape)

    @property
    def code_dtype(self) -> torch.dtype:
        """The smallest integer type that holds every code of an integer format."""
        options = (torch.int8, torch.int16, torch.int32) if self.spec.signed else (torch.uint8, torch.int32)
        return next(t for t in options if torch.iinfo(t).min <= self.quant_min and self.quant_max <= torch.iinfo(t).max)

    def fake_quantize(self, x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """`dequantize(quantize(x))` with this quantizer's gradient; the grid broadcasts against `x`."""
        raise NotImplementedError

    def forward(self, x: Tensor, follow: bool = True) -> Tensor:
        """`x` on its grid; `follow` is false for a tensor that a moving range has followed already.

        Raises:
            UserError: under a transform of `torch.func`.
        """
        if not self.on:
            return self._pass(x)
        if hasattr(x, "on_grid") and made_by(self, x):
            return x
        if torch._C._are_functorch_transforms_active() and not torch.compiler.is_dynamo_compiling():
            raise UserError(
                "torch.func transforms (vmap, grad, jvp, ...) do not know the gradients of quantizers: call backward, "
                "or switch the quantizers off around the transform"
            )
        if follow and self._follows and self.training:
            self.follow(x.detach())
        inner, grid = self._grouped(self.transform(x)) if self._moves else x, self.grid(x)
        if self._dithers and self.training:
            inner = dither(inner, *grid)
        y = self.fake_quantize(inner, *grid)
        y = y if y.dtype is x.dtype else y.to(x.dtype)  # the very tensor, to compilers, too
        return y if y.shape == x.shape else y.view(x.shape)  # groups, and a scalar that met a scale of shape (1,)

    def follow(self, x: Tensor) -> None:
        """Moves the grid after `x` before a training forward pass rounds to it; most grids stay."""

    # -- states --------------------------------------------------------------------------------------------------------

    def _pass(self, x: Tensor) -> Tensor:
        if self.observing:
            self._observe(x)
        elif self._wants_calibration:
            raise RuntimeError("this quantizer has no range yet: qat.calibrate.calibrate(model, run) finds it")
        return x

    def _read_flags(self) -> None:
        """Refreshes the Python mirror of the flags; whoever writes a flag calls it."""
        enabled, initialised = bool(self.enabled), bool(self.initialised)
        self._wants_calibration = enabled and not initialised
        self.on = enabled and initialised and not self.observing

    def enable(self, enabled: bool = True) -> None:
        """Switches between on and off."""
        self.enabled.fill_(enabled)
        self._read_flags()

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
        self.lowest.fill_(self.quant_min)
        self.highest.fill_(self.quant_max)

    def versions(self) -> tuple[Any, ...]:
        """Changes whenever the grid or its state does; what a cache of quantized weights is keyed by."""
        scale = self._parameters.get("scale", self._buffers.get("scale"))
        assert scale is not None
        return scale._version, scale.data_ptr(), self.on, None if self.spec.symmetric else self.zero_point._version

    def observe(self, observing: bool = True) -> None:
        """Starts or ends collecting for `calibrate`."""
        self.observing = observing
        self._sample = []
        self._read_flags()

    @torch.no_grad()
    def _observe(self, x: Tensor) -> None:
        if not x.numel():
            return
        flat = x.detach().float().flatten()
        if not flat.isfinite().all():
            raise UserError("calibration data holds NaN or infinity, for which there is no range")
        if self.is_weight:  # `calibrate` looks at all of it
            return
        self._sample.append(torch.cat([_spread_out(flat), flat.amin()[None], flat.amax()[None]]))

    @torch.no_grad()
    def calibrate(self, x: Tensor | None = None) -> None:
        """Sets scale and zero_point from `x`, or from what was observed, and switches to on.

        Raises:
            UserError: if there is nothing to look at, or it holds NaN or infinity.
        """
        if x is not None:
            rows = self._rows(self.transform(x.detach().float()))
        elif self._sample:
            rows = torch.cat(self._sample)[None]
        else:
            raise UserError("nothing passed through it during calibration")
        if not rows.isfinite().all():
            raise UserError("holds NaN or infinity, for which there is no range")
        if rows.numel():
            self._fit(rows)
        self.initialised.fill_(True)
        self.observe(False)

    def _fit(self, rows: Tensor) -> None:
        """Finds the first range from `rows [scales, N]`."""
        self._set_range(*ranges.ESTIMATORS[self.spec.range](rows, self.spec))

    def _rows(self, x: Tensor) -> Tensor:
        if self.spec.granularity == "tensor":
            return x.reshape(1, -1)
        if self.spec.granularity == "channel":
            return x.movedim(self.axis, 0).flatten(1)
        return self._grouped(x).movedim(self._group_axis(x.ndim) + 1, -1).reshape(-1, self.spec.group_size or 1)

    @torch.no_grad()
    def _set_range(self, low: Tensor, high: Tensor) -> None:
        scale, zero_point = ranges.scale_and_zero_point(low, high, self.spec)
        self.scale.copy_(scale.view(self.scale.shape))
        self.zero_point.copy_(zero_point.view(self.zero_point.shape))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moves with the module, but stays in float32 where it goes to half precision: the scale of a grid of 8 bits
        needs more than bfloat16's.
        """

        def move(t: Tensor) -> Tensor:
            moved = fn(t)
            return t.to(moved.device) if moved.dtype in (torch.float16, torch.bfloat16) else moved

        return super()._apply(move, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._read_flags()

    def extra_repr(self) -> str:
        return f"{self.spec.short}, {self.spec.quantizer}"


def _spread_out(flat: Tensor) -> Tensor:
    """Every k-th of many values, k their number divided by the golden ratio and by nothing that divides that number:
    wrapped around, they fall evenly on every row, channel and column, where a short stride meets a few of them.
    """
    count = flat.numel()
    if count <= SAMPLES_PER_BATCH:
        return flat
    step = round(count * 0.618)
    while math.gcd(step, count) > 1:
        step += 1
    return flat[torch.arange(SAMPLES_PER_BATCH, device=flat.device) * step % count]
