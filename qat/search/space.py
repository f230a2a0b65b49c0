"""The choices of a search: for every layer the pairs of (weight bits, input bits), and which layers must agree.

Grids belong to tensors, and so do bits: layers with one weight share its bits, layers that read one tensor share those
of its grid. A candidate width is one more rule on top of the user's policy, in the sensitivities as in the YAML that
comes out, so that what is measured is what will be trained. Operations without weights (residual additions, pooling)
keep the grids that the policy gives them.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from torch import nn

from qat.errors import UserError
from qat.measure.storage import is_layer, with_bytes
from qat.planning.addressable import has_weight
from qat.planning.audit import AuditRow, audit
from qat.planning.plan import Plan
from qat.planning.planner import make_plan
from qat.policies.networks import KEY, Policy, policy_of
from qat.policies.patterns import ends, matching
from qat.search.settings import Search

Pair = tuple[int, int | None]
"""(weight bits, input bits); `None` for an input that stays as the policy has it."""
FORMATS = ("int", "midrise")
"""Formats whose bits are free."""
PREFIX = "searched_"
"""Prefix of the names of rules that a search makes."""


@dataclass(frozen=True)
class Layer:
    """One layer to choose for.

    Attributes:
        name: Module path.
        weight: Name of its weight's grid, shared with the layers that have the same weight.
        act: Name of its input's grid, shared with the layers that read the same tensor; `None` if it is not chosen.
        options: The pairs to choose from.
    """

    name: str
    weight: str
    act: str | None
    options: tuple[Pair, ...]


@dataclass
class Space:
    """The layers to choose for, and what is known of the model under the policy as it is.

    Attributes:
        model, policy: The float model, and the policy that candidates are rules on top of.
        layers: In execution order.
        tied: Groups of layers (by name) that get the same pair.
        plan, rows: Plan and audit under the policy as it is.
        parts: Integer weights that keep the bits that the policy gives them: a module has several (those of a GRU).
        plans: The plan with every chosen grid at one width, by width.
    """

    model: nn.Module
    policy: Policy
    layers: list[Layer]
    tied: list[list[str]]
    plan: Plan
    rows: dict[str, AuditRow]
    parts: list[str]
    plans: dict[int, Plan] = field(default_factory=dict)

    @property
    def tensors(self) -> dict[str, list[str]]:
        """Every grid to choose for, and the layers that read through it, the first of which names it."""
        readers: dict[str, list[str]] = {}
        for layer in self.layers:
            for grid in (layer.weight, layer.act):
                if grid is not None:
                    readers.setdefault(grid, []).append(layer.name)
        return readers

    def widths(self, tensor: str) -> list[int]:
        """The widths that some option gives a grid."""
        found = {w for layer in self.layers for w, _ in layer.options if layer.weight == tensor}
        found |= {a for layer in self.layers for _, a in layer.options if a is not None and layer.act == tensor}
        return sorted(found)


def make_space(model: nn.Module, policy: Policy, search: Search, run: Callable[[], Any]) -> Space:
    """Finds what can be chosen from one pass of `run()` (see `qat.planning.probe.record`); the model is left as it is.

    Raises:
        UserError: if the policy quantizes no weight, a pattern matches nothing, or a layer has no option left.
    """
    plan, recording = make_plan(model, policy, run)
    rows = {row.name: row for row in with_bytes(audit(model, plan, recording), model, plan)}
    real = [n for n in plan.layers if is_layer(model, n)]
    free = [n for n, layer in plan.layers.items() if _free(plan.weights.get(layer.weight or ""))]
    weights, parts = [n for n in free if n in real], [n for n in free if n not in real]
    if not weights:
        but = f" but to {kept_bits(parts)}" if parts else ""
        raise UserError(f"search: the policy gives no weight an integer grid{but}, so there is nothing to choose")
    acts = [n for n in weights if (grid := plan.layers[n].input) and _free(plan.activations[grid[-1]])]
    widths = sorted({*search.weight_bits, *search.act_bits})
    plans = {
        bits: make_plan(model, with_bits(policy, dict.fromkeys(weights, bits), dict.fromkeys(acts, bits)), run)[0]
        for bits in widths
    }
    weighted = [n for n in real if policy.covers(n) and has_weight(model.get_submodule(n))]
    least = _least(search.least, weighted)
    shared = plans[widths[-1]]
    layers = [
        Layer(
            name,
            f"{shared.layers[name].weight}.weight",
            shared.layers[name].input[-1] if name in acts else None,
            _options(search, name, least.get(name, 1), name in acts),
        )
        for name in weights
    ]
    ties = [matching(p, weighted, "search.tie", "layer", ends(weighted)) for p in search.tie]
    tied = [[n for n in weights if n in tie] for tie in ties]
    return Space(model, policy, layers, tied, plan, rows, parts, plans)


def kept_bits(parts: Sequence[str]) -> str:
    """Names the parts whose bits are not chosen, and says why."""
    return f"{', '.join(parts)} (modules of several weights keep the bits that rules give them)"


def _free(spec: Any) -> bool:
    return spec is not None and spec.format in FORMATS


def with_bits(policy: Policy, weights: Mapping[str, int], acts: Mapping[str, int]) -> Policy:
    """The policy with rules on top that give layers their bits."""
    pairs = {name: (weights.get(name), acts.get(name)) for name in (*weights, *acts)}
    return policy_of(with_bit_rules(policy.settings, pairs))


def with_bit_rules(settings: Mapping[str, Any], pairs: Mapping[str, tuple[int | None, int | None]]) -> dict[str, Any]:
    """A policy's settings, without the rules of an earlier search, and then one for each pair in use:
    `searched_w4a8: {match: [conv1, conv2], weight: {bits: 4}, act: {bits: 8}}`; of networks, each has its own."""
    if KEY in settings:
        return {
            KEY: {
                path: with_bit_rules(own, {n[len(path) + 1 :]: p for n, p in pairs.items() if n.startswith(f"{path}.")})
                for path, own in settings[KEY].items()
            }
        }
    rules = {n: r for n, r in (settings.get("rules") or {}).items() if not n.startswith(PREFIX)}
    for name, (weight, act) in pairs.items():
        label = PREFIX + (f"w{weight}" if weight else "") + (f"a{act}" if act else "")
        rule = rules.setdefault(label, {"match": []})
        rule["match"].append(name)
        rule |= {"weight": {"bits": weight}} if weight else {}
        rule |= {"act": {"bits": act}} if act else {}
    return {**settings, "rules": rules}


def _least(patterns: Mapping[str, int], weighted: Sequence[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for pattern, bits in patterns.items():
        for name in matching(pattern, weighted, "search.least", "layer", ends(weighted)):
            found[name] = max(bits, found.get(name, 0))
    return found


def _options(search: Search, name: str, least: int, has_act: bool) -> tuple[Pair, ...]:
    pairs: Iterable[Pair] = search.pairs or product(search.weight_bits, search.act_bits)
    if not has_act:
        pairs = [(w, None) for w, _ in pairs]
    options = tuple(dict.fromkeys((w, a) for w, a in pairs if w >= least and (a is None or a >= least)))
    if not options:
        raise UserError(
            f"search.least: '{name}' gets at least {least} bits, but no weight_bits and act_bits (or pairs) allow it"
        )
    return options
