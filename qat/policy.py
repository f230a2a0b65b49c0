"""`QuantPolicy`: which grid every weight and every activation gets, as ordered, *named* rules. A pure function of names
and types.

A policy has defaults for weights and activations and rules that change them for the layers they match, later rules
winning, like a style sheet:

    weight: {bits: 4, granularity: channel}
    act: {bits: 4}
    sites: {bits: 8}
    rules:
      stem: {match: "@first", weight: {bits: 8}, act: {bits: 8}}
      no_attention: {match: ["h.*.attn.*"], act: off}

`act` is for the inputs of layers with weights; `sites`, on top of it, for the inputs of operations without (residual
additions, average pooling). `match` is a glob over module paths (`*` crosses dots), or `@first` / `@last`, the first
and last layer with weights in execution order; `type` narrows it to a class name (`Conv2d`) or a kind of site (`add`).
`weight: off` / `act: off` leaves that tensor float.
"""

import fnmatch
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from qat import quantizers, ranges
from qat.errors import UserError, nearest
from qat.spec import QuantSpec

ROLES = ("weight", "act")
RULE_KEYS = ("match", "type", *ROLES)
RANGES = tuple(
    name
    for name, f in vars(ranges).items()
    if inspect.isfunction(f)
    and f.__module__ == ranges.__name__
    and name != "scale_and_zero_point"
    and not name.startswith("_")
)


@dataclass(frozen=True)
class Target:
    """Something a rule can match: a layer or a functional site.

    Attributes:
        name: Module path, or owner, kind and order of a site: `layer1.0.add_0`.
        type: Class name of the layer, or kind of the site.
        has_weight: Whether it owns a weight (so `@first` and `@last` count it).
    """

    name: str
    type: str
    has_weight: bool


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
        settings = {role: _role(values[role], f"{where}.{role}") for role in ROLES if values.get(role) is not None}
        if not settings:
            raise UserError(f"{where}: it changes nothing; give it weight or act, such as {{act: off}}, or remove it")
        return cls(name, patterns, kind, settings)


def _role(value: Any, where: str) -> Mapping[str, Any] | bool:
    if value is False or value == "off":
        return False
    if not isinstance(value, Mapping):
        raise UserError(f"{where}={value!r}: must be off or settings such as {{bits: 8}}")
    return dict(value)


def _merge(base: Mapping[str, Any] | bool, own: Mapping[str, Any] | bool) -> Mapping[str, Any] | bool:
    """`own` on top of `base`; either may be off."""
    return {**(base if isinstance(base, Mapping) else {}), **own} if isinstance(own, Mapping) else False


class QuantPolicy:
    """Defaults plus named rules; build it with `from_dict`.

    Attributes:
        settings: The policy as plain containers, as given (what checkpoints and manifests store).
    """

    def __init__(
        self, defaults: Mapping[str, Mapping[str, Any] | bool], rules: Sequence[Rule], settings: dict[str, Any]
    ) -> None:
        self.defaults = defaults
        self.rules = tuple(rules)
        self.settings = settings

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any], where: str = "quant") -> "QuantPolicy":
        """Builds a policy from plain containers, checking every key and value.

        Raises:
            UserError: naming the key under `where`, the value, and the nearest valid one.
        """
        if "modules" in settings:  # several networks, a policy for each
            return import_module("qat.networks").NetworkPolicies.from_dict(settings, where)
        allowed = (*ROLES, "sites", "rules")
        for key in settings:
            if key not in allowed:
                raise UserError(f"{where}.{key}: no such setting{nearest(str(key), allowed)}")
        defaults = {r: _role(settings[r], f"{where}.{r}") if settings.get(r) is not None else False for r in ROLES}
        own = _role(settings["sites"], f"{where}.sites") if settings.get("sites") is not None else {}
        defaults["sites"] = defaults["act"] if own == {} else _merge(defaults["act"], own)
        rules = settings.get("rules") or {}
        if not isinstance(rules, Mapping):
            raise UserError(f"{where}.rules={rules!r}: must map a name to each rule")
        parsed = [Rule.from_dict(str(n), r, f"{where}.rules.{n}") for n, r in rules.items() if r is not None]
        policy = cls(defaults, parsed, _plain(settings))
        policy._check_specs(where)
        return policy

    @property
    def is_off(self) -> bool:
        """Whether it leaves every model float: no default and no rule asks for a grid."""
        asked = [*self.defaults.values(), *(s for rule in self.rules for s in rule.settings.values())]
        return not any(isinstance(settings, Mapping) for settings in asked)

    def _check_specs(self, where: str) -> None:
        """Every default and every rule on top of it must make a valid spec, whether or not it will match."""
        for key, base in self.defaults.items():
            role = "act" if key == "sites" else key
            _spec(base, f"{where}.{key}", role)
            for rule in self.rules:
                _spec(_merge(base, rule.settings.get(role, False)), f"{where}.rules.{rule.name}.{role}", role)

    def resolve(self, targets: Sequence[Target]) -> dict[str, dict[str, tuple[QuantSpec | None, str]]]:
        """Decides the grid of every target's weight and inputs.

        Args:
            targets: In execution order.

        Returns:
            For each target name and each role (`weight`, `act`): the spec, or `None` for float, and the rule that
            decided (or `default`).

        Raises:
            UserError: if a rule matches no target, naming the closest, or sets the weights of targets that have none.
        """
        matched = {rule.name: self._matches(rule, targets) for rule in self.rules}
        result: dict[str, dict[str, tuple[QuantSpec | None, str]]] = {}
        for target in targets:
            result[target.name] = {}
            for role in ROLES:
                current = self.defaults["sites" if role == "act" and not target.has_weight else role]
                by = "default"
                for rule in self.rules:
                    own = rule.settings.get(role)
                    if own is None or target.name not in matched[rule.name]:
                        continue
                    by, current = rule.name, _merge(current, own)
                result[target.name][role] = _spec(current, f"quant.{role} for {target.name}", role), by
        return result

    def _matches(self, rule: Rule, targets: Sequence[Target]) -> set[str]:
        weighted = [t.name for t in targets if t.has_weight]
        special = {"@first": weighted[:1], "@last": weighted[-1:]}
        pool = [t.name for t in targets if rule.type in (None, t.type)]
        if not pool:
            hint = nearest(str(rule.type), sorted({t.type for t in targets}))
            raise UserError(f"quant.rules.{rule.name}.type: nothing is a '{rule.type}'{hint}")
        found: set[str] = set()
        for pattern in rule.match:
            if pattern.startswith("@") and pattern not in special:
                raise UserError(f"quant.rules.{rule.name}.match: no selector '{pattern}'{nearest(pattern, special)}")
            hits = [
                n for n in pool if (n in special[pattern] if pattern in special else fnmatch.fnmatchcase(n, pattern))
            ]
            if not hits:
                raise UserError(
                    f"quant.rules.{rule.name}.match: no layer matches '{pattern}'{_nearest_pattern(pattern, pool)}"
                )
            found.update(hits)
        if "weight" in rule.settings and rule.settings["weight"] and not found.intersection(weighted):
            raise UserError(
                f"quant.rules.{rule.name}.weight: nothing that it matches has a weight: {', '.join(sorted(found))}"
            )
        return found


def _spec(values: Mapping[str, Any] | bool, where: str, role: str) -> QuantSpec | None:
    if not isinstance(values, Mapping):
        return None
    spec = QuantSpec.from_dict(values, where)
    if spec.quantizer not in quantizers.names():
        raise UserError(
            f"{where}.quantizer={spec.quantizer}: no such quantizer{nearest(spec.quantizer, quantizers.names())}"
        )
    if spec.range not in RANGES:
        raise UserError(f"{where}.range={spec.range}: no such estimator{nearest(spec.range, RANGES)}")
    if role == "act":
        try:  # which granularities an activation can have is the quantizer's to say
            quantizers.create(spec.resolved(nonnegative=False, weight=False))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    return spec


def _nearest_pattern(pattern: str, names: Sequence[str]) -> str:
    """Suggests a pattern that matches: the same wildcard behind the closest existing prefix, or else a name."""
    if pattern.endswith(".*"):
        prefixes = dict.fromkeys(n.rsplit(".", depth)[0] for n in names for depth in range(1, n.count(".") + 1))
        return nearest(pattern, [f"{p}.*" for p in prefixes] or names)
    return nearest(pattern, names)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
