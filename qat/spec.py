"""`QuantSpec`: what one tensor's grid should be, straight from YAML. It holds no tensors.

A grid of `bits` bits has the integer codes `quant_min .. quant_max`; a real value is `(code - zero_point) * scale`.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from qat.errors import UserError, nearest

MIN_BITS, MAX_BITS = 2, 8


@dataclass(frozen=True)
class QuantSpec:
    """The number format of one tensor and how its scale is found and trained.

    Attributes:
        bits: Width of a code, 2 to 8.
        signed: Whether codes may be negative. `None` decides at insertion: unsigned for tensors that are known to be >= 0
            (after ReLU and the like) and for affine grids, else signed.
        symmetric: `zero_point == 0`. An affine grid places it by the calibrated range.
        narrow: Drop the lowest signed code, so that the grid is its own mirror image (which makes folding a BatchNorm with a
            negative gamma exact). `None` means yes for weights from 4 bits up, where the lost code costs nothing.
        granularity: One scale per `tensor`, per output `channel`, or per `group` of `group_size` input channels.
        group_size: Consecutive elements along the input-channel axis that share a scale.
        quantizer: Name of a file in `qat/quantizers`: how the grid is trained.
        range: Name of a function in `qat/ranges.py`: how calibration finds the first scale.
    """

    bits: int = 8
    signed: bool | None = None
    symmetric: bool = True
    narrow: bool | None = None
    granularity: Literal["tensor", "channel", "group"] = "tensor"
    group_size: int | None = None
    quantizer: str = "lsq"
    range: str = "mse"

    def __post_init__(self) -> None:
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise UserError(f"bits={self.bits}: a grid has {MIN_BITS} to {MAX_BITS} bits")
        if (self.granularity == "group") != (self.group_size is not None):
            raise UserError(
                f"granularity={self.granularity} with group_size={self.group_size}: "
                "group_size goes with granularity=group, and only with it"
            )
        if self.group_size is not None and self.group_size < 1:
            raise UserError(f"group_size={self.group_size}: must be at least 1")

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
            if not _is_a(value, hints[key]):
                raise UserError(f"{where}.{key}={value!r}: must be {_describe(hints[key])}")
        try:
            return cls(**values)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def resolved(self, *, nonnegative: bool, weight: bool) -> "QuantSpec":
        """Settles `signed` and `narrow` for a weight, or for an activation that is (not) known to be >= 0."""
        signed = self.signed if self.signed is not None else self.symmetric and not nonnegative
        narrow = self.narrow if self.narrow is not None else weight and signed and self.symmetric and self.bits >= 4
        return dataclasses.replace(self, signed=signed, narrow=narrow)

    @cached_property
    def quant_min(self) -> int:
        if not self.signed:
            return 0
        return -(2 ** (self.bits - 1)) + (1 if self.narrow else 0)

    @cached_property
    def quant_max(self) -> int:
        return 2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1

    @property
    def short(self) -> str:
        """A label for tables, such as `int4/channel` or `uint8`."""
        kind = "int" if self.signed or self.signed is None else "uint"
        unit = {"tensor": "", "channel": "/channel", "group": f"/group{self.group_size}"}[self.granularity]
        return f"{kind}{self.bits}{'' if self.symmetric else ' affine'}{unit}"


def _is_a(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        return any(_is_a(value, option) for option in typing.get_args(hint))
    return isinstance(value, hint) and not (hint is int and isinstance(value, bool))


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(typing.get_args(hint))
    if isinstance(hint, types.UnionType):
        return " or ".join(_describe(option) for option in typing.get_args(hint))
    return {int: "a whole number", bool: "true or false", str: "a name", types.NoneType: "null"}[hint]
