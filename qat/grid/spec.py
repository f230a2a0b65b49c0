"""`QuantSpec`: what one tensor's grid should be, straight from YAML. It holds no tensors.

A grid of `bits` bits has the integer codes `quant_min .. quant_max`; a real value is `(code - zero_point) * scale`.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from qat.annotations import accepts
from qat.errors import UserError, nearest
from qat.grid.formats import FLOATS, Float, Rounding, round_int, round_midrise

MAX_BITS = 16
FIXED_BITS = {"binary": 1, "ternary": 2, **{name: f.bits for name, f in FLOATS.items()}}
"""Formats whose name says how many bits they have."""


@dataclass(frozen=True)
class QuantSpec:
    """The number format of one tensor and how its scale is found and trained.

    Attributes:
        bits: Width of a code: 1 to 16 for `int` and `midrise`; other formats bring their own, and `null` is as good.
        format: `int`; `binary` (+1, -1), `ternary` (+1, 0, -1), `midrise` (odd numbers: no zero); or a floating-point
            format of `qat.grid.formats.FLOATS` (`e4m3`, `e5m2`, `e3m2`, `e2m3`, `e2m1`).
        signed: Whether codes may be negative. `None` decides at insertion: unsigned for tensors that are known to be >=
            0 (after ReLU and the like) and for affine grids, else signed.
        symmetric: `zero_point == 0`. An affine grid places it by the calibrated range.
        narrow: Drop the lowest signed code, so that the grid is its own mirror image (which makes folding a BatchNorm
            with a negative gamma exact). `None` means yes for weights from 4 bits up, where the lost code costs
            nothing.
        granularity: One scale per `tensor`, per output `channel`, per `group` of `group_size` input channels, or per
            `token` (the vector along the last axis of an activation, measured as it passes).
        group_size: Consecutive elements along the input-channel axis (of an activation: along `group_axis`) with the
            same scale.
        group_axis: Of an activation with `granularity: group`, the axis of the groups, counted from the end. `None`
            decides at insertion: the channels of a convolution's input, else the last.
        scale: Format of the scales: `float32`; `float16`, which GGUF blocks have; `pow2`, the nearest power of two
            (hardware shifts); `e8m0`, the power of two of the OCP Microscaling formats; `e4m3`, fp8 scales under one
            float32 scale per tensor (NVFP4).
        quantizer: Name of a file in `qat/quantizers`: how the grid is trained.
        range: One of `qat.grid.ranges.ESTIMATORS`: how calibration finds the first scale. Quantizers that define it
            themselves (`Quantizer.heeds`) do not ask, and policies refuse another than the default there.
        rounding_mode: `nearest`; or `stochastic`: in training, up or down at random, right on average. Codes are always
            the nearest.
        options: Settings of that quantizer, by the names of its constructor; `None` for its own defaults.
    """

    bits: int | None = 8
    format: str = "int"
    signed: bool | None = None
    symmetric: bool = True
    narrow: bool | None = None
    granularity: Literal["tensor", "channel", "group", "token"] = "tensor"
    group_size: int | None = None
    group_axis: int | None = None
    scale: Literal["float32", "float16", "pow2", "e8m0", "e4m3"] = "float32"
    quantizer: str = "lsq"
    range: str = "mse"
    rounding_mode: Literal["nearest", "stochastic"] = "nearest"
    options: Mapping[str, Any] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        self._check_format()
        self._check_grid()
        self._check_scales()

    def _check_format(self) -> None:
        formats = ("int", "midrise", *FIXED_BITS)
        if self.format not in formats:
            raise UserError(f"format={self.format}: no such format{nearest(self.format, formats)}")
        own = FIXED_BITS.get(self.format)
        if own is not None and self.bits not in (None, own):
            raise UserError(
                f"bits={self.bits} with format={self.format}, which has {own}: set bits: {own} or bits: null"
            )
        if own is None and (self.bits is None or not 1 <= self.bits <= MAX_BITS):
            raise UserError(
                f"bits={'null' if self.bits is None else self.bits}: format={self.format} has 1 to {MAX_BITS} bits"
            )
        # One spelling, so that specs of the same grid are equal and tensors share it.
        object.__setattr__(self, "bits", own or self.bits)

    def _check_grid(self) -> None:
        if self.format != "int":
            for key, value in (("signed", True), ("symmetric", True), ("narrow", True)):
                if getattr(self, key) is (not value):
                    raise UserError(
                        f"{key}=False with format={self.format}, whose grid is signed and symmetric: leave {key} out"
                    )
            if self.rounding_mode == "stochastic":
                raise UserError(f"rounding_mode=stochastic with format={self.format}: it is for format=int")
        elif self.bits == 1 and self.signed:
            raise UserError(
                "bits=1: a signed grid of one bit has only 0 and -1; use format: binary (+1, -1), or signed: false"
            )
        elif self.narrow and (self.signed is False or (self.signed is None and not self.symmetric)):
            raise UserError(
                f"narrow=True with signed={self.signed}, symmetric={self.symmetric}: an unsigned grid has no lowest "
                "negative code to drop; leave narrow out, or set signed: true"
            )

    def _check_scales(self) -> None:
        if (self.granularity == "group") != (self.group_size is not None):
            raise UserError(
                f"granularity={self.granularity} with group_size={self.group_size}: "
                "group_size goes with granularity=group, and only with it"
            )
        if self.group_size is not None and self.group_size < 1:
            raise UserError(f"group_size={self.group_size}: must be at least 1")
        if self.group_axis is not None and (self.granularity != "group" or self.group_axis >= 0):
            raise UserError(
                f"group_axis={self.group_axis} with granularity={self.granularity}: it counts from the end (-1 is the "
                "last) and goes with granularity=group"
            )
        if self.granularity == "token" and self.quantizer != "dynamic":
            raise UserError(
                f"granularity=token with quantizer={self.quantizer}: tokens are measured as they pass; "
                "set quantizer: dynamic"
            )
        if self.scale in ("e8m0", "e4m3"):
            if self.granularity != "group":
                raise UserError(
                    f"scale={self.scale} with granularity={self.granularity}: block scales go with granularity=group"
                )
            if not self.symmetric:
                raise UserError(
                    f"scale={self.scale} with symmetric=False: blocks have no zero_point; set symmetric: true"
                )

    @property
    def width(self) -> int:
        """Bits of a code: `bits`, which are settled by now."""
        assert self.bits is not None
        return self.bits

    @property
    def float_format(self) -> Float | None:
        """The floating-point format, if it is one."""
        return FLOATS.get(self.format)

    @property
    def integer(self) -> bool:
        """Whether codes are integers that integer arithmetic can use."""
        return self.float_format is None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "spec") -> "QuantSpec":
        """Builds a spec from plain values, checking every key and type.

        Raises:
            UserError: naming `where` (a config key), the value and the nearest valid key.
        """
        hints = typing.get_type_hints(cls)
        for key, value in values.items():
            if key not in hints:
                raise UserError(f"{where}.{key}: no such setting{nearest(key, hints)}")
            if not accepts(hints[key], value):
                raise UserError(f"{where}.{key}={value!r}: must be {_describe(hints[key])}")
        try:
            return cls(**values)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def resolved(self, *, nonnegative: bool, weight: bool, channels: int = -1) -> "QuantSpec":
        """Settles what insertion decides, for a weight or an activation.

        Args:
            nonnegative: Whether the activation is known to be >= 0.
            weight: Whether it is a weight.
            channels: The axis that groups of the activation run along if they are not told, counted from the end.
        """
        if self.granularity == "group" and self.group_axis is None and not weight:
            return dataclasses.replace(self, group_axis=channels).resolved(nonnegative=nonnegative, weight=weight)
        if self.format != "int":
            return dataclasses.replace(self, signed=True, narrow=True)
        one_bit = self.bits == 1 and not weight
        signed = self.signed if self.signed is not None else self.symmetric and not nonnegative and not one_bit
        wanted = self.narrow if self.narrow is not None else weight and self.symmetric and self.width >= 4
        # An unsigned grid has no lowest negative code to drop: `narrow` is for the tensors that turn out signed.
        narrow = wanted and signed
        return dataclasses.replace(self, signed=signed, narrow=narrow)

    @cached_property
    def quant_min(self) -> int:
        """Lowest code (of a floating-point format: its lowest value)."""
        if self.format != "int":
            return -self.quant_max
        return -(2 ** (self.width - 1)) + (1 if self.narrow else 0) if self.signed else 0

    @cached_property
    def quant_max(self) -> int:
        """Highest code (of a floating-point format: its largest value, in whole units for all but e2m3's 7.5)."""
        if self.float_format is not None:
            return self.float_format.largest  # pyright: ignore[reportReturnType]
        if self.format == "ternary":
            return 1
        if self.format in ("binary", "midrise"):
            return 2**self.width - 1
        return 2 ** (self.width - 1) - 1 if self.signed else 2**self.width - 1

    @property
    def max_exponent(self) -> int:
        """Exponent of the power of two in `quant_max`: `emax` of the Microscaling specification, in units of codes."""
        return math.frexp(self.quant_max)[1] - 1

    @property
    def last_step(self) -> float:
        """Distance of the two highest levels, in units of the scale."""
        if self.float_format is not None:
            return self.float_format.magnitudes[-1] - self.float_format.magnitudes[-2]
        return 2 if self.format in ("binary", "midrise") else 1

    @property
    def size(self) -> int:
        """How many codes there are (of a floating-point format, with both zeros)."""
        if self.float_format is not None:
            return 2 * len(self.float_format.magnitudes)
        return 2**self.width if self.format in ("binary", "midrise") else self.quant_max - self.quant_min + 1

    @property
    def trits(self) -> bool:
        """Whether its codes are -1, 0 and 1, five of which fit in a byte."""
        return self.integer and self.symmetric and self.size == 3

    @property
    def rounding(self) -> Rounding:
        """How a ratio becomes a level."""
        if self.float_format is not None:
            return self.float_format
        return round_midrise if self.format in ("binary", "midrise") else round_int

    @property
    def short(self) -> str:
        """A label for tables, such as `int4/channel` or `uint8`."""
        kind = self.format if self.format != "int" else f"{'int' if self.signed is not False else 'uint'}{self.bits}"
        kind += str(self.bits) if self.format == "midrise" else ""
        unit = "" if self.granularity == "tensor" else f"/{self.granularity}{self.group_size or ''}"
        return f"{kind}{'' if self.symmetric else ' affine'}{unit}{'' if self.scale == 'float32' else ' ' + self.scale}"


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(typing.get_args(hint))
    if isinstance(hint, types.UnionType):
        return " or ".join(_describe(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is Mapping:
        return "a mapping"
    return {int: "a whole number", bool: "true or false", str: "a name", types.NoneType: "null"}[hint]
