"""How configs name layers, modules and quantizers: a glob (`*` crosses dots), or a selector such as `@first`."""

import fnmatch
from collections.abc import Iterable, Mapping, Sequence

from qat.errors import UserError, nearest

Selectors = Mapping[str, Sequence[str]]


def ends(layers: Sequence[str]) -> Selectors:
    """`@first` and `@last` of layers in execution order."""
    return {"@first": layers[:1], "@last": layers[-1:]}


def matching(
    pattern: str, names: Iterable[str], where: str, what: str, selectors: Selectors | None = None
) -> list[str]:
    """Those of `names` that a pattern matches, in their order.

    Args:
        pattern: A glob, or one of the selectors.
        names: All that could match.
        where: The key that the pattern was given under, for messages.
        what: What the names are of, for messages.
        selectors: What each selector stands for.

    Raises:
        UserError: if there are none, with the nearest pattern that would match.
    """
    names, selectors = list(names), selectors or {}
    if pattern in selectors:
        found = [name for name in names if name in selectors[pattern]]
    elif selectors and pattern.startswith("@"):
        raise UserError(f"{where}: no selector '{pattern}'{nearest(pattern, selectors)}")
    else:
        found = fnmatch.filter(names, pattern)
    if not found:
        raise UserError(f"{where}: no {what} matches '{pattern}'{_nearest(pattern, names)}")
    return found


def _nearest(pattern: str, names: Sequence[str]) -> str:
    """Suggests a pattern that matches: the same wildcard behind the closest existing prefix, or else a name."""
    if pattern.endswith(".*"):
        prefixes = dict.fromkeys(n.rsplit(".", depth)[0] for n in names for depth in range(1, n.count(".") + 1))
        return nearest(pattern, [f"{p}.*" for p in prefixes] or names)
    return nearest(pattern, names)
