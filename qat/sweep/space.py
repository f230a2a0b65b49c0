"""The space of a sweep: for every key that varies a list of choices, or an interval to draw from.

Written in YAML (`params:` of a sweep) or on the command line, where Hydra's grammar says the same:

    params:                                      qat train -m
      quant.weight.bits: [2, 4, 8]                 quant.weight.bits=2,4,8
      model.lr: {low: 1e-3, high: 0.1, log: true}  'model.lr=tag(log, interval(1e-3, 0.1))'
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qat.errors import UserError, nearest


@dataclass(frozen=True)
class Interval:
    """Numbers from `low` to `high`, both included; integers if both ends are. `log`: even in the logarithm."""

    low: float
    high: float
    log: bool = False


Choices = list[str]
Space = dict[str, Choices | Interval]
"""Key -> what may stand behind `=`."""


def from_yaml(params: Mapping[str, Any] | None) -> Space:
    """Reads the `params` of a sweep's YAML.

    Raises:
        UserError: for a key without choices, or an interval that is none.
    """
    return {str(key): _parse(f"sweep.params.{key}", value) for key, value in (params or {}).items()}


def _parse(key: str, value: Any) -> Choices | Interval:
    if isinstance(value, Mapping):
        fields = ("low", "high", "log")
        for name in value:
            if name not in fields:
                raise UserError(f"{key}.{name}: an interval has low, high and log{nearest(str(name), fields)}")
        ends: list[Any] = [value.get("low"), value.get("high")]
        (low, high), log = ends, value.get("log", False)
        numbers = all(isinstance(end, (int, float)) and not isinstance(end, bool) for end in ends)
        if not numbers or low >= high or (log and low <= 0):
            raise UserError(f"{key}={dict(value)}: an interval needs numbers low < high (above 0 with log)")
        return Interval(low, high, bool(log))
    if not isinstance(value, list) or not value:
        raise UserError(f"{key}={value!r}: must be a list of choices, or an interval like {{low: 0.01, high: 0.1}}")
    if any(isinstance(item, (list, Mapping)) for item in value):
        raise UserError(f"{key}: write nested choices as text, as on the command line: ['{{bits: 4}}', '[1,2]']")
    return list(dict.fromkeys(as_text(item) for item in value))


def as_text(value: Any) -> str:
    """A value as it is written behind `=` in an override; text is taken to be that already."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def grid(space: Space) -> Iterator[dict[str, str]]:
    """Every combination of choices, the last key changing fastest.

    Raises:
        UserError: for an interval, which has no end of values.
    """
    for key, values in space.items():
        if isinstance(values, Interval):
            raise UserError(f"{key}: a grid needs choices ({key}=a,b,c); an interval is for sweep=optuna_pareto")
    lists = [values for values in space.values() if isinstance(values, list)]
    for combination in itertools.product(*lists):
        yield dict(zip(space, combination, strict=True))
