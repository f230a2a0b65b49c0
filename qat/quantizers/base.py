"""`Quantizer`: one tensor's grid as a module. It knows no layer, no policy and no Lightning.

A quantizer is in one of three states, kept in buffers (so that checkpoints carry them) and mirrored in one Python attribute (so that a
forward pass never waits for a device to read them):

    observing   collects a sample of what passes and returns it untouched; `calibrate` turns the sample into scale and zero_point
    off         returns its input
    on          returns `dequantize(quantize(x))`, bit for bit, with a straight-through gradient

A new quantizer is one file in this folder that subclasses `Quantizer` and defines `fake_quantize`; `create` finds it by the file's name.
"""

import importlib
import pkgutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat import ranges
from qat.errors import UserError, nearest
from qat.functional import SCALE_FLOOR, Bound, levels, values
from qat.spec import QuantSpec

SAMPLES_PER_BATCH = 1 << 17
"""Calibration keeps at most this many values of a batch (and always its extremes)."""


class Quantizer(nn.Module):
    """The grid of one tensor.

    Args:
        spec: A resolved spec (`QuantSpec.resolved`): `signed` and `narrow` are settled.
        shape: Shape of the tensor if it is a weight, `None` for an activation (whose batch dimension varies).
        axis: The output-channel axis of a weight; groups run along the other one of axes 0 and 1.

    Attributes:
        scale: `(1,)` per tensor, `(channels,)` per channel, or the weight's shape with the grouped axis divided by `group_size`.
        zero_point: int32 of the same shape; the code of the value zero.

    Raises:
        UserError: if the granularity does not fit the shape.
    """

    scale: Tensor
    zero_point: Tensor
    enabled: Tensor
    initialised: Tensor

    def __init__(self, spec: QuantSpec, shape: torch.Size | None = None, axis: int = 0) -> None:
        super().__init__()
        self.spec = spec
        self.axis = axis
        self.quant_min, self.quant_max = spec.quant_min, spec.quant_max
        self.is_weight = shape is not None
        scale_shape = self._scale_shape(shape)
        self._make_scale(torch.ones(scale_shape, dtype=torch.float32))
        self.register_buffer("zero_point", torch.zeros(scale_shape, dtype=torch.int32))
        self.register_buffer("enabled", torch.ones(1, dtype=torch.bool))
        self.register_buffer("initialised", torch.zeros(1, dtype=torch.bool))
        self.observing = False
        self._sample: list[Tensor] = []
        self._read_flags()

    def _make_scale(self, scale: Tensor) -> None:
        """Registers `scale`; quantizers that learn it register a parameter instead."""
        self.register_buffer("scale", scale)

    def _scale_shape(self, shape: torch.Size | None) -> tuple[int, ...]:
        if self.spec.granularity == "tensor":
            return (1,)
        if shape is None:
            raise UserError(f"granularity={self.spec.granularity}: an activation has one scale (granularity=tensor)")
        if self.spec.granularity == "channel":
            return (shape[self.axis],)
        size, group_axis = self.spec.group_size, 1 - self.axis
        assert size is not None
        if shape[group_axis] % size:
            raise UserError(
                f"group_size={size} does not divide the {shape[group_axis]} input channels of a weight of shape {tuple(shape)}; "
                "the last group would be ragged"
            )
        return (*shape[:group_axis], shape[group_axis] // size, *shape[group_axis + 1 :])

    # -- the grid ----------------------------------------------------------------------------------------------------------

    def _grouped(self, x: Tensor) -> Tensor:
        """A view of `x` against which `_spread(scale)` broadcasts."""
        if self.spec.granularity != "group":
            return x
        return x.unflatten(1 - self.axis, (-1, self.spec.group_size or 1))

    def _spread(self, per_scale: Tensor, ndim: int) -> Tensor:
        """A view of a tensor shaped like `scale` that broadcasts against `_grouped(x)` for an `x` of `ndim` dimensions."""
        if self.spec.granularity == "tensor":
            return per_scale
        if self.spec.granularity == "channel":
            return per_scale.view([-1 if d == self.axis else 1 for d in range(ndim)])
        return per_scale.unsqueeze(2 - self.axis)

    def _levels_range(self, ndim: int) -> tuple[Bound, Bound]:
        if self.spec.symmetric:
            return self.quant_min, self.quant_max
        zero_point = self._spread(self.zero_point, ndim)
        return self.quant_min - zero_point, self.quant_max - zero_point

    def step(self) -> Tensor:
        """The scale that acts, floor applied: float32, detached, of the shape of `scale`."""
        return self.scale.detach().float().clamp_min(SCALE_FLOOR)

    def quantize(self, x: Tensor) -> Tensor:
        """The integer codes of `x`, `quant_min .. quant_max`.

        Returns:
            int8 or uint8, of the shape of `x`.

        Raises:
            ValueError: if `x` holds NaN, which has no code.
        """
        with torch.no_grad():
            level = levels(self._grouped(x), self._spread(self.scale, x.ndim), *self._levels_range(x.ndim))
            if level.isnan().any():
                raise ValueError("NaN has no code: the tensor to be quantized holds NaN")
            codes = level + self._spread(self.zero_point, x.ndim)
            return codes.to(torch.int8 if self.spec.signed else torch.uint8).view(x.shape)

    def dequantize(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The real values of `codes`."""
        level = self._grouped(codes).float() - self._spread(self.zero_point, codes.ndim)
        return values(level, self._spread(self.scale, codes.ndim), dtype).view(codes.shape)

    def fake_quantize(self, x: Tensor, scale: Tensor, low: Bound, high: Bound) -> Tensor:
        """`dequantize(quantize(x))` with this quantizer's gradient; `scale`, `low` and `high` broadcast against `x`."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if not self.on:
            return self._pass(x)
        return self._snap(x)

    def _snap(self, x: Tensor) -> Tensor:
        y = self.fake_quantize(self._grouped(x), self._spread(self.scale, x.ndim), *self._levels_range(x.ndim))
        return y.view(x.shape) if self.spec.granularity == "group" else y

    # -- states ------------------------------------------------------------------------------------------------------------

    def _pass(self, x: Tensor) -> Tensor:
        if self.observing:
            self._observe(x)
        elif self._wants_calibration:
            raise RuntimeError("this quantizer has no range yet: calibrate the model before running it (qat.calibrate)")
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

    def versions(self) -> tuple[Any, ...]:
        """Changes whenever the grid or its state does; what a cache of quantized weights is keyed by."""
        return self.scale._version, self.zero_point._version, self.on, self.scale.data_ptr()

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
        stride = -(-flat.numel() // SAMPLES_PER_BATCH)
        self._sample.append(torch.cat([flat[::stride], flat.amin()[None], flat.amax()[None]]))

    @torch.no_grad()
    def calibrate(self, x: Tensor | None = None) -> None:
        """Sets scale and zero_point from `x`, or from what was observed, and switches to on.

        Raises:
            UserError: if there is nothing to look at, or it holds NaN or infinity.
        """
        if x is not None:
            rows = self._rows(x.detach().float())
        elif self._sample:
            rows = torch.cat(self._sample)[None]
        else:
            raise UserError("nothing passed through it during calibration")
        if not rows.isfinite().all():
            raise UserError("holds NaN or infinity, for which there is no range")
        estimator = getattr(ranges, self.spec.range)
        low, high = estimator(rows, self.quant_min, self.quant_max, self.spec.symmetric)
        self._set_range(low, high)
        self.initialised.fill_(True)
        self.observe(False)

    def _rows(self, x: Tensor) -> Tensor:
        if self.spec.granularity == "tensor":
            return x.reshape(1, -1)
        if self.spec.granularity == "channel":
            return x.movedim(self.axis, 0).flatten(1)
        return self._grouped(x).movedim(2 - self.axis, -1).reshape(-1, self.spec.group_size or 1)

    @torch.no_grad()
    def _set_range(self, low: Tensor, high: Tensor) -> None:
        scale, zero_point = ranges.scale_and_zero_point(low, high, self.quant_min, self.quant_max, self.spec.symmetric)
        self.scale.copy_(scale.clamp_min(SCALE_FLOOR).view(self.scale.shape))
        self.zero_point.copy_(zero_point.view(self.zero_point.shape))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._read_flags()

    def extra_repr(self) -> str:
        return f"{self.spec.short}, {self.spec.quantizer}"


def names() -> list[str]:
    """The quantizers that exist: the files of this folder."""
    return sorted(m.name for m in pkgutil.iter_modules([str(Path(__file__).parent)]) if m.name != "base")


def find(name: str) -> type[Quantizer]:
    """The quantizer class of the file `qat/quantizers/<name>.py`.

    Raises:
        UserError: if there is no such file, with the nearest name.
    """
    if name not in names():
        raise UserError(f"quantizer={name}: no such quantizer{nearest(name, names())}")
    module = importlib.import_module(f"qat.quantizers.{name}")
    (cls,) = (
        c for c in vars(module).values()
        if isinstance(c, type) and issubclass(c, Quantizer) and c.__module__ == module.__name__
    )  # fmt: skip
    return cls


def create(spec: QuantSpec, shape: torch.Size | None = None, axis: int = 0) -> Quantizer:
    """Builds the quantizer that `spec` names."""
    return find(spec.quantizer)(spec, shape, axis)
