"""What became integer and what stayed float, and why: no layer is left out of quantization without a word.

In execution order, one row for each layer with parameters or arithmetic, each functional site (`layer1.0.add_0`), each
other function that computes (`attn.matmul_0`) and each parameter that is in no layer. Rectifiers, dropout,
reshaping and max-pooling are not listed: they have no parameters, and an integer engine runs them on codes as they are.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from qat.cost import bit_operations
from qat.functions import COMPUTES
from qat.plan import Plan
from qat.probe import Call, Recording, macs
from qat.reasons import FOLDS, Reasons, layers, type_name


@dataclass(frozen=True)
class AuditRow:
    """One layer, site, function call or lone parameter.

    Attributes:
        name: Module path; for calls, the owner's path, the kind and the order.
        type: Class of the layer, or kind of the call.
        weight: Label of the weight's grid.
        act: Labels of the input's grids: `uint8 > uint4` one after the other, `int8 + uint8` of two inputs.
        weight_bits, act_bits: Their widths; of several activation grids, the narrowest.
        macs: Multiply-accumulates for one sample; 0 where the recording can't tell (recurrence, attention, einsum).
        params: Weights and biases, counted where they appear first.
        bytes: What a packed file stores of them (`qat.storage.with_bytes` fills it in).
        reason: Why it is not integer throughout; `None` if it is.
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

    @property
    def bops(self) -> int:
        """Bit operations for one sample: MACs x weight bits x input bits, where float counts 32."""
        return bit_operations(self.macs, self.weight_bits, self.act_bits)

    @property
    def folds(self) -> bool:
        """Whether it vanishes into its neighbour, which leaves nothing to quantize."""
        return self.reason is not None and self.reason.startswith(FOLDS)


def audit(model: nn.Module, plan: Plan, recording: Recording) -> list[AuditRow]:
    """Accounts for every part of `model`.

    Args:
        model: The model after `apply_plan(model, plan)`.
        plan: What `make_plan` returned.
        recording: What it returned beside.
    """
    return _Auditor(model, plan, recording).rows()


def coverage(rows: Sequence[AuditRow]) -> tuple[float, float]:
    """The share of counted MACs with integer operands, and the share of parameters in layers with integer weights.

    Biases count with their layer, in whose accumulator they are integers too. What folds is in neither share.
    """
    counted = [r for r in rows if not r.folds]
    integer = sum(r.macs for r in counted if r.weight and r.act)
    stored = sum(r.params for r in counted if r.weight)
    total, params = sum(r.macs for r in counted), sum(r.params for r in counted)
    return (integer / total if total else 1.0), (stored / params if params else 1.0)


def bops(rows: Sequence[AuditRow]) -> int:
    """Bit operations of the whole model for one sample; what folds has none of its own."""
    return sum(row.bops for row in rows if not row.folds)


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
        self.position = {id(call): i for i, call in enumerate(recording.order)}
        self.counted: set[int] = set()

    def rows(self) -> list[AuditRow]:
        """In execution order; what did not run follows what is registered before it."""
        reasons = self.reasons
        own: dict[str, list[Call]] = {}
        for call in reasons.functions:
            if not call.site:
                own.setdefault(call.name, []).append(call)
        placed: list[tuple[int, AuditRow]] = []
        latest = -1
        for name, module in layers(self.model):
            functions = own.pop(name, [])
            calls = [*reasons.modules.get(name, ()), *functions]
            latest = self.position[id(calls[0])] if calls else latest
            placed.append((latest, self._layer(name, module, functions)))
        placed += ((self.position[id(c)], self._site(c)) for c in reasons.functions if c.site)
        placed += ((self.position[id(c)], row) for calls in own.values() for c, row in self._functions(calls))
        rows: dict[str, AuditRow] = {}
        for _, row in sorted(placed, key=lambda place: place[0]):
            rows.setdefault(row.name, row)  # a site whose owner runs twice is one site
        return [*rows.values(), *self._lone_parameters()]

    def _layer(self, name: str, module: nn.Module, functions: list[Call]) -> AuditRow:
        count = sum(macs(c) for c in self.reasons.modules.get(name, ()))
        count += sum(self._function_macs(c) for c in functions)
        labels = self._labels(name) if name in self.reasons.calls else {}
        reason = self.reasons.of_layer(name, module)
        return AuditRow(name, type_name(module), **labels, macs=count, params=self._count(module), reason=reason)

    def _site(self, call: Call) -> AuditRow:
        assert call.site and call.kind
        return AuditRow(call.site, call.kind, **self._labels(call.site), reason=self.reasons.of_site(call))

    def _functions(self, calls: list[Call]) -> Iterator[tuple[Call, AuditRow]]:
        """The calls that one owner's forward makes, numbered by kind."""
        seen: dict[str, int] = {}
        for call in calls:
            kind = COMPUTES[call.what]
            index = seen[kind] = seen.get(kind, -1) + 1
            # Parameters of layers have been counted there; what is left belongs to no layer.
            operands = (self.reasons.parameters.get(key[0]) for key in call.inputs)
            params = sum(self._once(p) for p in operands if p is not None)
            name, count = f"{call.name}.{kind}_{index}".lstrip("."), self._function_macs(call)
            yield call, AuditRow(name, kind, macs=count, params=params, reason=self.reasons.of_function(call))

    def _lone_parameters(self) -> Iterator[AuditRow]:
        for name, parameter in self.model.named_parameters():
            if id(parameter) in self.reasons.parameters and (count := self._once(parameter)):
                yield AuditRow(name, "Parameter", params=count, reason=self.reasons.of_parameter(name))

    def _labels(self, name: str) -> dict[str, Any]:
        layer = self.plan.layers.get(name, {"weight": None, "input": []})
        weight = None if layer["weight"] is None else self.plan.weights[layer["weight"]]
        chains = self.plan.sites.get(name, [layer["input"]])
        specs = [[self.plan.activations[label] for label in chain] for chain in chains if chain]
        labels = dict.fromkeys(" > ".join(s.short for s in chain) for chain in specs)
        return {
            "weight": weight.short if weight else None,
            "act": " + ".join(labels) or None,
            "weight_bits": weight.width if weight else None,
            "act_bits": min((s.width for chain in specs for s in chain), default=None),
        }

    def _count(self, module: nn.Module) -> int:
        """Own parameters, with those that a parametrization keeps in a child."""
        computed = module._modules.get("parametrizations")
        own = [*module._parameters.values(), *(computed.parameters() if computed is not None else ())]
        return sum(self._once(p) for p in own if p is not None)

    def _once(self, parameter: nn.Parameter) -> int:
        new = id(parameter) not in self.counted
        self.counted.add(id(parameter))
        return parameter.numel() if new else 0

    def _function_macs(self, call: Call) -> int:
        """MACs of a function for one sample; 0 where the shapes of output and first operand don't tell."""
        kind = COMPUTES[call.what]
        if kind in ("linear", "matmul", "bmm", "mm") and call.what is not Tensor.__rmatmul__:
            return math.prod(call.shape[1:]) * call.input_shape[-1]
        operands = (self.reasons.parameters.get(key[0]) for key in call.inputs[1:])
        weight = next((p for p in operands if p is not None and p.ndim > 1), None)
        if not kind.startswith("conv") or weight is None:
            return 0
        positions = call.input_shape if kind.startswith("conv_transpose") else call.shape
        return math.prod(positions[1:]) * math.prod(weight.shape[1:])
