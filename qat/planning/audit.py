"""The audit: what became integer and what stayed float, and why. No layer is left out of quantization without a word.

In execution order, one row for each layer with parameters or arithmetic, each functional site (`layer1.0.add_0`), each
other function that computes (`attn.matmul_0`) and each parameter that is in no layer. Rectifiers, dropout,
reshaping and max-pooling are not listed: they have no parameters, and an integer engine runs them on codes as they are.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from qat.errors import UserError
from qat.layers import BoundPart, Part
from qat.layers.parts import part_parameters
from qat.measure.cost import bit_operations
from qat.planning.functions import PROBABILITIES
from qat.planning.plan import OUTPUTS, Plan, grids_of
from qat.planning.planner import make_plan
from qat.planning.reasons import FLOAT_CODES, FOLDS, Reasons, layers, type_name
from qat.planning.recording import Call, Recording
from qat.policies.networks import Policy

SHOWN_GAPS = 5


@dataclass(frozen=True)
class AuditRow:
    """One layer, site, function call or lone parameter.

    Attributes:
        name: Module path; for calls, the owner's path, the kind and the order.
        type: Class of the layer, or kind of the call.
        weight: Label of the weight's grid.
        act: Labels of the input's grids: `uint8 > uint4` one after the other, `int8 + uint8` of two inputs.
        weight_bits, act_bits: Widths of these grids; of several activation grids, the narrowest.
        macs: Multiply-accumulates for one sample; 0 where the recording can't tell (a layer without a twin). Those of
            an attention are in two rows: query with key, and below it `.probabilities` with value.
        params: Weights and biases, counted where they appear first.
        bytes: What a packed file stores of them; 0 until `qat.measure.storage.with_bytes` fills it in, as runs do.
        reason: Why it is not integer throughout, or runs on floats even so; `None` if it is integer.
        integer_weight: Whether the codes of the weight's grid are integers.
    """

    name: str
    type: str
    weight: str | None = None
    act: str | None = None
    weight_bits: int | None = None
    act_bits: int | None = None
    macs: int = 0
    params: int = 0
    bytes: int = 0
    reason: str | None = None
    integer_weight: bool = False

    @property
    def bops(self) -> int:
        """Bit operations for one sample: MACs x bits of one side x bits of the other, where float counts 32."""
        # On grids throughout, but without a weight: a product of two activations.
        on_grids = self.reason is None or self.reason.startswith(FLOAT_CODES)
        other = self.weight_bits or (self.act_bits if on_grids else None)
        return bit_operations(self.macs, other, self.act_bits)

    @property
    def folds(self) -> bool:
        """Whether it vanishes into its neighbour, which leaves nothing to quantize."""
        return self.reason is not None and self.reason.startswith(FOLDS)

    @property
    def integer_macs(self) -> int:
        """Multiply-accumulates with integers on both sides, in an exported file (whose runtime may lack a kernel for
        them).
        """
        return self.macs if self.reason is None else 0


def audit(model: nn.Module, plan: Plan, recording: Recording) -> list[AuditRow]:
    """Accounts for every part of `model`.

    Args:
        model: The model, before or after `apply_plan(model, plan)`.
        plan: The plan that `make_plan` returned.
        recording: The recording that it returned beside.
    """
    return _Auditor(model, plan, recording).rows()


def coverage(rows: Sequence[AuditRow]) -> tuple[float, float]:
    """The share of counted MACs with integer operands, and the share of parameters in layers with integer weights.

    Biases count with their layer, in whose accumulator they are integers too. What folds is in neither share.
    """
    counted = [r for r in rows if not r.folds]
    integer = sum(r.integer_macs for r in counted)
    stored = sum(r.params for r in counted if r.integer_weight)
    total, params = sum(r.macs for r in counted), sum(r.params for r in counted)
    return (integer / total if total else 1.0), (stored / params if params else 1.0)


def bops(rows: Sequence[AuditRow]) -> int:
    """Bit operations of the whole model for one sample; what folds has none of its own."""
    return sum(row.bops for row in rows if not row.folds)


def check_coverage(rows: Sequence[AuditRow], required: Mapping[str, float]) -> None:
    """Makes too many float multiply-accumulates an error.

    Args:
        rows: Rows of the whole model.
        required: Least share on integers, by the part of the model (its path, `""` for all) that it is asked of.

    Raises:
        UserError: if a part falls short, naming the largest gaps and their reasons.
    """
    for part, share in required.items():
        _check_part([row for row in rows if f"{row.name}.".startswith(f"{part}." if part else "")], share)


def checked_plan(model: nn.Module, policy: Policy, run: Callable[[], Any]) -> Plan:
    """`make_plan`, which fails where less is on integers than the policy asks for."""
    plan, recording = make_plan(model, policy, run)
    if any(policy.required_coverage.values()):
        check_coverage(audit(model, plan, recording), policy.required_coverage)
    return plan


def _check_part(rows: Sequence[AuditRow], required: float) -> None:
    share, _ = coverage(rows)
    if share >= required:
        return
    total = sum(row.macs for row in rows if not row.folds)
    gaps = sorted((r for r in rows if r.macs > r.integer_macs), key=lambda r: -r.macs)
    named = "; ".join(f"'{r.name}' {r.macs / total:.1%} ({r.reason})" for r in gaps[:SHOWN_GAPS])
    more = f"; and {len(gaps) - SHOWN_GAPS} more" if len(gaps) > SHOWN_GAPS else ""
    # Rounded down, so that what falls short never looks like enough.
    raise UserError(
        f"quant.require_coverage={required}: {int(share * 1e4) / 1e4:.2%} of the multiply-accumulates are on "
        f"integers; float are {named}{more}"
    )


def to_dict(rows: Sequence[AuditRow]) -> dict[str, Any]:
    """Rows and coverage as plain containers, for `audit.json`."""
    share_macs, share_params = coverage(rows)
    shares = {"macs": share_macs, "params": share_params}
    return {"coverage": shares, "bops": bops(rows), "rows": [asdict(row) for row in rows]}


class _Auditor:
    """Makes the rows, counting each parameter once."""

    def __init__(self, model: nn.Module, plan: Plan, recording: Recording) -> None:
        self.model, self.plan = model, plan
        self.reasons = Reasons(model, plan, recording)
        self.samples = recording.samples
        self.position = {id(call): i for i, call in enumerate(recording.order)}
        self.counted: set[Any] = set()
        twins = [self.reasons.calls[name][0].what for name in plan.layers]
        holders = [twin.owner[0] if isinstance(twin, BoundPart) else twin for twin in twins]
        self.of_twins = {id(p) for holder in holders for p in holder._parameters.values()}
        self.at_sites: set[int] = set()
        self.by_path = dict(model.named_parameters(remove_duplicate=False))

    def rows(self) -> list[AuditRow]:
        """In execution order; what did not run follows what is registered before it."""
        own: dict[str, list[Call]] = {}
        sites: dict[str, list[Call]] = {}
        for call in self.reasons.recording.functions:
            if call.site is None:
                own.setdefault(call.name, []).append(call)
            elif call.kind not in OUTPUTS or call.site in self.plan.sites:
                sites.setdefault(call.site, []).append(call)  # one whose owner runs twice is one site
        placed: list[tuple[int, AuditRow]] = []
        for calls in sites.values():
            placed += ((self.position[id(calls[0])], row) for row in self._sites(calls))
        latest = -1
        for name, module in self._layers():
            functions = own.pop(name, [])
            calls = [*self.reasons.modules.get(name, ()), *functions]
            latest = self.position[id(calls[0])] if calls else latest
            if calls or not self._lives_in_sites(module):
                placed.append((latest, self._layer(name, module, functions)))
        placed += ((self.position[id(c)], row) for calls in own.values() for c, row in self._functions(calls))
        placed.sort(key=lambda place: place[0])
        return [*(row for _, row in placed), *self._lone_parameters()]

    def _layers(self) -> Iterator[tuple[str, nn.Module]]:
        """Layers, and the parts that take the place of some once the plan is applied."""
        parts: dict[int, list[tuple[str, nn.Module]]] = {}
        for name, (call, *_) in self.reasons.calls.items():
            if isinstance(call.what, BoundPart):
                parts.setdefault(id(call.what.owner[0]), []).append((name, call.what))
        for name, module in layers(self.model):
            yield from parts.get(id(module), [(name, module)])

    def _lives_in_sites(self, module: nn.Module) -> bool:
        """Whether the parameters of a module have been counted with the functions that take them."""
        own = {id(p) for p in module._parameters.values() if p is not None}
        return bool(own) and own <= self.at_sites

    def _layer(self, name: str, module: nn.Module, functions: list[Call]) -> AuditRow:
        count = self._macs(*self.reasons.modules.get(name, ()), *functions)
        labels = self._labels(name) if name in self.reasons.calls else {}
        reason = self.reasons.of_layer(name, module)
        return AuditRow(name, type_name(module), **labels, macs=count, params=self._count(module), reason=reason)

    def _sites(self, calls: list[Call]) -> Iterator[AuditRow]:
        """The rows of one site, all of whose calls these are."""
        name, kind, reasons = calls[0].site, calls[0].kind, self.reasons
        assert name and kind
        weighted = [call for call in calls if call.parameter and (call.weight or name in self.plan.operands)]
        taken = {id(p): p for p in (self.by_path[call.parameter] for call in weighted if call.parameter)}
        taken |= {k[0]: p for c in weighted for k in c.inputs if (p := reasons.parameters.get(k[0])) is not None}
        params = sum(self._once(p) for p in taken.values() if id(p) not in self.of_twins)
        self.at_sites |= taken.keys()
        counts = [sum(each) for each in zip(*(c.macs for c in calls), strict=True)]
        if kind != "attention":
            yield AuditRow(
                name, kind, **self._labels(name), macs=self._share(sum(counts)), params=params,
                reason=reasons.of_site(calls[0]),
            )  # fmt: skip
            return
        below = f"{name}.{PROBABILITIES}"
        scores, values = self._labels(name), self._labels(below)
        yield AuditRow(name, kind, **scores, macs=self._share(counts[0]), params=params, reason=reasons.of_place(name))
        reason = reasons.of_place(below) or reasons.of_place(name)
        yield AuditRow(below, PROBABILITIES, **values, macs=self._share(counts[1]), reason=reason)

    def _functions(self, calls: list[Call]) -> Iterator[tuple[Call, AuditRow]]:
        """The calls that one owner's forward makes, numbered by kind."""
        seen: dict[str, int] = {}
        for call in calls:
            kind = call.kind or ""
            index = seen[kind] = seen.get(kind, -1) + 1
            # Parameters of layers have been counted there; what is left belongs to no layer.
            operands = (self.reasons.parameters.get(key[0]) for key in call.inputs)
            params = sum(self._once(p) for p in operands if p is not None)
            name, count = f"{call.name}.{kind}_{index}".lstrip("."), self._macs(call)
            yield call, AuditRow(name, kind, macs=count, params=params, reason=self.reasons.of_function(call))

    def _macs(self, *calls: Call) -> int:
        return self._share(sum(sum(call.macs) for call in calls))

    def _share(self, count: int) -> int:
        """The count for one sample."""
        return count // self.samples

    def _lone_parameters(self) -> Iterator[AuditRow]:
        for name, parameter in self.model.named_parameters():
            if id(parameter) in self.reasons.parameters and (count := self._once(parameter)):
                yield AuditRow(name, "Parameter", params=count, reason=self.reasons.of_parameter(name))

    def _labels(self, name: str) -> dict[str, Any]:
        weight, specs = grids_of(self.plan, name)
        labels = dict.fromkeys(" > ".join(s.short for s in chain) for chain in specs)
        return {
            "weight": weight.short if weight else None,
            "act": " + ".join(labels) or None,
            "weight_bits": weight.width if weight else None,
            "act_bits": min((s.width for chain in specs for s in chain), default=None),
            "integer_weight": weight is not None and weight.integer,
        }

    def _count(self, module: nn.Module) -> int:
        """Own parameters, with those that a parametrization keeps in a child."""
        computed = module._modules.get("parametrizations")
        own = [*module._parameters.values(), *(computed.parameters() if computed is not None else ())]
        if isinstance(module, Part):
            return sum(self._once(tensor, key) for key, tensor in part_parameters(module))
        return sum(self._once(p) for p in own if p is not None)

    def _once(self, parameter: Tensor, key: Any = None) -> int:
        """Size of a parameter the first time it is asked for, then 0; `key` tells rows of a parameter apart."""
        new = (key or id(parameter)) not in self.counted
        self.counted.update({id(parameter)} if key is None else {key, key[0]})
        return parameter.numel() if new else 0
