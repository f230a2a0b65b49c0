"""The named rules of a policy, and what they match; `qat.policies.policy` applies them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qat.errors import UserError, nearest

ROLES = ("weight", "act")
RULE_KEYS = ("match", "type", *ROLES)


@dataclass(frozen=True)
class Place:
    """Something a rule can match: a layer or a functional site.

    Attributes:
        name: Module path, or owner, kind and order of a site: `layer1.0.add_0`.
        type: Class name of the layer, or kind of the site.
        has_weight: Whether it owns a weight (so `@first` and `@last` count it).
        is_site: Whether it is a call of a function.
    """

    name: str
    type: str
    has_weight: bool
    is_site: bool = False


@dataclass(frozen=True)
class Rule:
    """One named rule; `None` for a role means "as before", `False` means off."""

    name: str
    match: tuple[str, ...]
    type: str | None = None
    settings: Mapping[str, Mapping[str, Any] | bool] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, name: str, values: Any, where: str) -> "Rule":
        if not isinstance(values, Mapping):
            raise UserError(
                f"{where}={values!r}: a rule is a mapping such as {{match: 'layer1.*', weight: {{bits: 8}}}}"
            )
        for key in values:
            if key not in RULE_KEYS:
                raise UserError(f"{where}.{key}: no such setting{nearest(str(key), RULE_KEYS)}")
        match = values.get("match")
        patterns = (match,) if isinstance(match, str) else tuple(match) if isinstance(match, Sequence) else ()
        if not patterns or not all(isinstance(p, str) for p in patterns):
            raise UserError(
                f"{where}.match={match!r}: must be a pattern such as 'layer1.*', '@first' or '@last', or a list of them"
            )
        kind = values.get("type")
        if not isinstance(kind, str | None):
            raise UserError(f"{where}.type={kind!r}: must be a class name such as Conv2d or a site kind such as add")
        settings = {role: read_role(values[role], f"{where}.{role}") for role in ROLES if values.get(role) is not None}
        if not settings:
            raise UserError(f"{where}: it changes nothing; give it weight or act, such as {{act: off}}, or remove it")
        return cls(name, patterns, kind, settings)


def read_role(value: Any, where: str) -> Mapping[str, Any] | bool:
    """Settings, or `False` for off.

    Raises:
        UserError: naming `where`, if it is neither.
    """
    if value is False or value == "off":
        return False
    if not isinstance(value, Mapping):
        raise UserError(f"{where}={value!r}: must be off or settings such as {{bits: 8}}")
    return dict(value)


def merge(base: Mapping[str, Any] | bool, own: Mapping[str, Any] | bool) -> Mapping[str, Any] | bool:
    """`own` on top of `base`; either may be off."""
    return {**(base if isinstance(base, Mapping) else {}), **own} if isinstance(own, Mapping) else False
