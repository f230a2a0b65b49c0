"""What a target takes, read once off its signature."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from qat.annotations import hints_of


@dataclass(frozen=True)
class Signature:
    """The parameters of a class or function, as far as it tells; some that are written in C do not.

    Attributes:
        takes: Names that it takes as keywords.
        required: Those of them without a default.
        order: All names, in the order that arguments without a name fill.
        any_other: Whether it takes keywords of any other name.
        hints: Annotations, by name.
    """

    takes: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    order: tuple[str, ...] = ()
    any_other: bool = True
    hints: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, target: Callable[..., Any]) -> "Signature":
        try:
            parameters = inspect.signature(target).parameters
        except (TypeError, ValueError):
            return cls()
        named = {n: p for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        hints = hints_of(target)
        unpacked = [n for n in hints if n not in parameters and n != "return"]  # of `**options: Unpack[Options]`
        return cls(
            takes=(*named, *unpacked),
            required=tuple(n for n, p in named.items() if p.default is p.empty),
            order=tuple(parameters),
            any_other=not unpacked and any(p.kind is p.VAR_KEYWORD for p in parameters.values()),
            hints=hints,
        )
