"""`QuantPolicy`: which grid every weight and every activation gets, as ordered, *named* rules. A pure function of names
and types.

A policy has defaults for weights and activations and rules that change them for the layers they match, later rules
winning, like a style sheet:

    weight: {bits: 4, granularity: channel}
    act: {bits: 4}
    sites: {bits: 8}
    kinds: [add, avg_pool, cat, matmul, einsum, attention]
    concat: separate
    engine: ort
    round_bias: eval
    require_coverage: 0.99
    rules:
      stem: {match: "@first", weight: {bits: 8}, act: {bits: 8}}
      no_attention: {match: ["h.*.attn.*"], act: off}

`act` is for the inputs of layers with weights; `sites`, on top of it, for the operands of functions between them
(residual additions, matrix products, pooling) whose kind is one of `kinds` (`all` for every kind). Rules reach the
other kinds only where they name them: by `type: mul`, or by a pattern that ends in such a name (`*.mul_*`).
`concat: shared` gives all that a concatenation joins one grid. `engine` names the one whose rules hold
(`qat.policies.engines`), and `round_bias` says when biases are whole accumulator steps, if not as that engine wants.
`require_coverage` is the least share of multiply-accumulates on integers; less is an error.

`match` is a glob over module paths (`*` crosses dots), or `@first` / `@last`, the first and last layer with weights in
execution order; `type` narrows it to a class name (`Conv2d`) or a kind of site (`add`). `weight: off` / `act: off`
leaves that tensor float.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from qat import quantizers
from qat.errors import UserError, nearest
from qat.grid.ranges import ESTIMATORS
from qat.grid.spec import QuantSpec
from qat.planning.functions import KINDS, KV_CACHE, PROBABILITIES, WEIGHTED
from qat.policies.engines import Biases, engine_of
from qat.policies.patterns import ends, matching
from qat.policies.renamed import FORMERLY
from qat.policies.rules import ROLES, Place, Rule, merge, read_role

DEFAULT_KINDS = ("add", "avg_pool", "cat", "matmul", "einsum", "attention")
"""Kinds that engines compute as integers between layers: sums, concatenations, pooling, products."""
ALL_KINDS = (*(kind for kind in KINDS if kind not in WEIGHTED), PROBABILITIES, KV_CACHE)
CONCAT = ("separate", "shared")
ROUND_BIAS = get_args(Biases)
KEYS = (*ROLES, "sites", "kinds", "concat", "engine", "round_bias", "require_coverage", "rules")


@dataclass(frozen=True)
class QuantPolicy:
    """Defaults plus named rules; build it with `from_dict`.

    Attributes:
        settings: The policy as plain containers, as given (what checkpoints and manifests store).
        where: The key that it was given under, for messages.
        defaults: Settings of weights, of layers' inputs and of other sites' before any rule; `False` for float.
        rules: In order, later ones winning.
        kinds: The kinds of functional sites without weights that are quantized by default.
        concat: Whether what a concatenation joins shares a grid (`shared`) or not (`separate`).
        engine: Name of the engine whose rules hold, or `None`.
        round_bias: When biases are rounded: in `eval`, in `train` too, or `never`.
        required_coverage: Least share of multiply-accumulates on integers, 0 to 1, by the part of the model that it is
            asked of (`""` for all).
    """

    settings: dict[str, Any]
    where: str
    defaults: Mapping[str, Mapping[str, Any] | bool]
    rules: tuple[Rule, ...]
    kinds: tuple[str, ...]
    concat: str
    engine: str | None
    round_bias: str
    required_coverage: dict[str, float]

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any], where: str = "quant") -> "QuantPolicy":
        """Builds a policy from plain containers, checking every key and value.

        Raises:
            UserError: naming the key under `where`, the value, and the nearest valid one.
        """
        if not isinstance(settings, Mapping):
            raise UserError(f"{where}={settings!r}: must be settings such as {{weight: {{bits: 8}}, act: {{bits: 8}}}}")
        for key in settings:
            if key not in KEYS:
                raise UserError(f"{where}.{key}: no such setting{nearest(FORMERLY.get(key, str(key)), KEYS)}")
        engine = engine_of(settings.get("engine"), f"{where}.engine")
        policy = cls(
            settings=_plain(settings),
            where=where,
            defaults=_defaults(settings, where),
            rules=_rules(settings.get("rules") or {}, f"{where}.rules"),
            kinds=_kinds(settings.get("kinds"), f"{where}.kinds"),
            concat=_one_of(CONCAT, settings.get("concat"), CONCAT[0], f"{where}.concat"),
            engine=settings.get("engine"),
            round_bias=_one_of(ROUND_BIAS, settings.get("round_bias"), engine.round_bias, f"{where}.round_bias"),
            required_coverage={"": _share(settings.get("require_coverage") or 0.0, f"{where}.require_coverage")},
        )
        policy._check_specs()
        return policy

    @property
    def is_off(self) -> bool:
        """Whether it leaves every model float: no default and no rule asks for a grid."""
        asked = [*self.defaults.values(), *(s for rule in self.rules for s in rule.settings.values())]
        return not any(isinstance(settings, Mapping) for settings in asked)

    def covers(self, name: str) -> bool:
        """Whether a layer is in the part of the model that it is for."""
        return True

    def _check_specs(self) -> None:
        """Every default and every rule on top of it must make a valid spec, whether or not it will match."""
        for key, base in self.defaults.items():
            role = "act" if key == "sites" else key
            _spec(base, f"{self.where}.{key}", role)
            for rule in self.rules:
                _spec(merge(base, rule.settings.get(role, False)), f"{self.where}.rules.{rule.name}.{role}", role)

    def resolve(self, places: Sequence[Place]) -> dict[str, dict[str, tuple[QuantSpec | None, str]]]:
        """Decides the grid of every place's weight and inputs.

        Args:
            places: In execution order.

        Returns:
            For each place's name and each role (`weight`, `act`): the spec, or `None` for float, and the rule that
            decided (or `default`).

        Raises:
            UserError: if a rule matches no place, naming the closest, or sets the weights of places that have none.
        """
        engine = engine_of(self.engine)
        matched = {rule.name: self._matches(rule, places) for rule in self.rules}
        result: dict[str, dict[str, tuple[QuantSpec | None, str]]] = {}
        for place in places:
            result[place.name] = {}
            for role in ROLES:
                base = self.defaults["sites" if role == "act" and not place.has_weight else role]
                by, current = "default", base if self._is_on(place) else False
                ranged = by  # who chose the quantizer or its range
                for rule in self.rules:
                    own = rule.settings.get(role)
                    if own is None or place.name not in matched[rule.name]:
                        continue
                    by, current = rule.name, merge(base if by == "default" else current, own)
                    if isinstance(own, Mapping) and {"quantizer", "range"} & own.keys():
                        ranged = by
                spec = _spec(current, f"{self.where}.{role} for {place.name}", role)
                if spec is not None and (role == "act" or place.has_weight):
                    _check_range(spec, self._key(ranged, role), role)
                    spec = engine.resolve_spec(spec, self._key(by, role), place.type if role == "weight" else None)
                result[place.name][role] = spec, by
        return result

    def _key(self, by: str, role: str) -> str:
        """The config key of what a rule, or the default, says of a role."""
        return f"{self.where}.{role}" if by == "default" else f"{self.where}.rules.{by}.{role}"

    def _is_on(self, place: Place) -> bool:
        return not place.is_site or place.has_weight or place.type in self.kinds

    def _matches(self, rule: Rule, places: Sequence[Place]) -> set[str]:
        where = f"{self.where}.rules.{rule.name}"
        weighted = [p.name for p in places if p.has_weight]
        typed = [p for p in places if rule.type in (None, p.type)]
        # A rule for `layer1.*` is about layers, not about every function that happens to be called there.
        silent = {p.name for p in typed if rule.type is None and not self._is_on(p)}
        if not typed:
            hint = nearest(str(rule.type), sorted({p.type for p in places}))
            raise UserError(f"{where}.type: nothing is a '{rule.type}'{hint}")
        found: set[str] = set()
        for pattern in rule.match:
            names = [p.name for p in typed if p.name not in silent or _last(pattern).startswith(p.type)]
            found.update(matching(pattern, names, f"{where}.match", "layer", ends(weighted)))
        if "weight" in rule.settings and rule.settings["weight"] and not found.intersection(weighted):
            raise UserError(f"{where}.weight: nothing that it matches has a weight: {', '.join(sorted(found))}")
        return found


def _defaults(settings: Mapping[str, Any], where: str) -> dict[str, Mapping[str, Any] | bool]:
    found = {r: read_role(settings[r], f"{where}.{r}") if settings.get(r) is not None else False for r in ROLES}
    own = read_role(settings["sites"], f"{where}.sites") if settings.get("sites") is not None else {}
    return found | {"sites": found["act"] if own == {} else merge(found["act"], own)}


def _rules(rules: Any, where: str) -> tuple[Rule, ...]:
    if not isinstance(rules, Mapping):
        raise UserError(f"{where}={rules!r}: must map a name to each rule")
    return tuple(Rule.from_dict(str(n), r, f"{where}.{n}") for n, r in rules.items() if r is not None)


def _one_of(options: Sequence[str], value: Any, default: str, where: str) -> str:
    if value is None:
        return default
    if value not in options:  # YAML reads `off` as false
        raise UserError(f"{where}={value!r}: must be one of {', '.join(options)}{nearest(str(value), options)}")
    return value


def _share(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise UserError(f"{where}={value!r}: must be a share between 0 and 1, such as 0.99")
    return value


def _kinds(value: Any, where: str) -> tuple[str, ...]:
    if value is None:
        return DEFAULT_KINDS
    if value == "all":
        return ALL_KINDS
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise UserError(f"{where}={value!r}: must be all or a list such as [add, avg_pool, matmul]")
    for kind in value:
        if kind not in ALL_KINDS:
            raise UserError(f"{where}: no kind of function is called {kind!r}{nearest(str(kind), ALL_KINDS)}")
    return tuple(value)


def _last(pattern: str) -> str:
    return pattern.rpartition(".")[2]


def _spec(values: Mapping[str, Any] | bool, where: str, role: str) -> QuantSpec | None:
    if not isinstance(values, Mapping):
        return None
    spec = QuantSpec.from_dict(values, where)
    if spec.quantizer not in quantizers.names():
        raise UserError(
            f"{where}.quantizer={spec.quantizer}: no such quantizer{nearest(spec.quantizer, quantizers.names())}"
        )
    if spec.range not in ESTIMATORS:
        raise UserError(f"{where}.range={spec.range}: no such estimator{nearest(spec.range, ESTIMATORS)}")
    if role == "weight" and spec.group_axis is not None:
        raise UserError(f"{where}.group_axis={spec.group_axis}: groups of a weight run along its input channels")
    if role == "act":
        try:  # which granularities an activation can have is the quantizer's to say
            quantizers.create(spec.resolved(nonnegative=False, weight=False))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    return spec


def _check_range(spec: QuantSpec, where: str, role: str) -> None:
    """Raises UserError for a range that the quantizer would ignore; the default is what those are left at that have
    none. Only for what is planned: runs that were trained so are read as before.
    """
    heeded = quantizers.find(spec.quantizer).heeds(role == "weight")
    if spec.range not in (QuantSpec.range, *heeded):
        others = f", or set {' or '.join(heeded)}" if heeded else ""
        what = "weights" if role == "weight" else "activations"
        raise UserError(
            f"{where}.range={spec.range}: quantizer={spec.quantizer} has a start of its own for {what}; leave range at "
            f"{QuantSpec.range}, the default{others}"
        )


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def differences(settings: Mapping[str, Any], others: Mapping[str, Any]) -> list[str]:
    """The keys, with dots, that two policies' settings differ in; what is null is as if it were not there."""
    found: list[str] = []
    for key in dict.fromkeys((*settings, *others)):
        one, other = settings.get(key), others.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            found += [f"{key}.{rest}" for rest in differences(one, other)]
        elif one != other:
            found.append(key)
    return found
