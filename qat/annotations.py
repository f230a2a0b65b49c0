"""Checking that a value from YAML fits a parameter's annotation, for simple types only; whatever else is annotated
fits.

Simple are int, float, bool, str, None, Literal, their unions, and list, tuple, Sequence, dict and Mapping of them. YAML
knows no tuple, so a list fits one; an int fits a float; a bool is no number.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, Unpack, get_args, get_origin, get_type_hints

ANYTHING = object()
"""Stands for a value that is not known yet, and so fits."""


def hints_of(target: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of a function's or class's parameters, strings resolved; empty where they cannot be."""
    function = target.__init__ if inspect.isclass(target) else target
    try:
        hints = get_type_hints(function)
    except (NameError, TypeError, AttributeError):
        return {}  # names imported under TYPE_CHECKING only
    for name, hint in list(hints.items()):
        if get_origin(hint) is Unpack:  # `**options: Unpack[Options]` stands for the keys of a TypedDict
            del hints[name]
            hints |= get_type_hints(get_args(hint)[0])
    return hints


def accepts(hint: Any, value: Any) -> bool:
    """Whether `value` (plain containers and scalars, or `ANYTHING` in place of one) fits.

    >>> accepts(float, 1), accepts(int, True), accepts(int | None, "4"), accepts(list[int], [1, "2"])
    (True, False, False, False)
    """
    origin, args = get_origin(hint), get_args(hint)
    if value is ANYTHING:
        return True
    if origin is Annotated:
        return accepts(args[0], value)
    if origin in (Union, UnionType):
        return any(accepts(arg, value) for arg in args)
    if origin is Literal:
        return any(value == option and type(value) is type(option) for option in args)
    if hint in (None, NoneType):
        return value is None
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    if hint in (bool, str):
        return isinstance(value, hint)
    container = origin or hint
    if container in (list, tuple, Sequence):
        return isinstance(value, (list, tuple)) and _accepts_items(container, args, value)
    if container in (dict, Mapping):
        return isinstance(value, container) and (not args or all(accepts(args[1], item) for item in value.values()))
    return True


def _accepts_items(container: Any, args: tuple[Any, ...], value: Sequence[Any]) -> bool:
    if not args:
        return True
    if container is tuple and args[-1] is not Ellipsis:
        return len(args) == len(value) and all(map(accepts, args, value))
    return all(accepts(args[0], item) for item in value)


def literals(hint: Any) -> list[Any]:
    """All options of the Literals in an annotation, unions included."""
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    return [option for arg in get_args(hint) for option in literals(arg)]


def in_words(hint: Any) -> str:
    """An annotation as one would say it: `int or None`, `'sum' or 'mean'`, `list[int]`."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(in_words(arg) for arg in args))
    if origin is Literal:
        return " or ".join(repr(option) for option in args)
    if hint in (None, NoneType):
        return "None"
    if args and origin is not None:
        inner = ", ".join("..." if arg is Ellipsis else in_words(arg) for arg in args)
        return f"{origin.__name__}[{inner}]"
    return getattr(hint, "__name__", str(hint))
