"""A `Plan`: which tensor gets which grid, as plain data. It travels in checkpoints and manifests and rebuilds the same
quantizers without the policy, the data or a second look at the model.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from qat.grid.spec import QuantSpec
from qat.planning.functions import FUNCTIONS, PROBABILITIES
from qat.policies.renamed import renamed

OUTPUTS = {function.kind for function in FUNCTIONS.values() if function.output}
"""Kinds of sites that quantize what they return."""


@dataclass
class PlannedLayer:
    """The grids of one layer.

    Attributes:
        weight: The owner of its weight's grid, or `None`.
        input: The activation grids its input passes in turn.
        input_1: The grids of its second input, if it has one (`Bilinear`) and that has any.
        parameter: Path of an owner's weight, if that is not `<layer>.weight`.
        rows: The first of the parameter's rows that are an owner's weight, and how many, if not all are.
        axis: Axis of the output channels of an owner's weight.
        read: Whether functions around the layer read its float weight, too.
    """

    weight: str | None
    input: list[str]
    input_1: list[str] | None = None
    parameter: str | None = None
    rows: list[int] | None = None
    axis: int = 0
    read: bool = False

    @property
    def inputs(self) -> list[list[str]]:
        """The activation grids that each input passes."""
        return [self.input, self.input_1 or []]


@dataclass
class SiteWeight:
    """The parameter that a functional site multiplies by.

    Attributes:
        parameter: Path of the parameter.
        axis: Axis of its output channels.
        weight: The owner of its grid, or `None`.
        alone: Whether nothing else in the model reads it, so that conversion may drop its float values.
        stacked: Order of the last two axes of experts' weights.
    """

    parameter: str
    axis: int
    weight: str | None
    alone: bool
    stacked: str | None = None


@dataclass
class SiteOperand:
    """The parameter that a sum, a difference or an elementwise product reads. Its grid is among `Plan.sites`, as of any
    operand.

    Attributes:
        parameter: Path of the parameter.
        index: Index of the operand that it is.
        alone: Whether nothing else in the model reads it, so that conversion may drop its float values.
    """

    parameter: str
    index: int
    alone: bool


@dataclass
class Plan:
    """Which quantizers a model gets, in plain containers (`to_dict`, `from_dict`).

    Attributes:
        weights: Spec of each weight's grid, by the layer that owns the quantizer.
        activations: Spec of each activation's grid, by the first place that reads it (`conv1.input`,
            `layer1.0.add_0.input_1`).
        layers: The grids of each layer.
        sites: Per functional site: for each operand (or for the output), the activation grids it passes in turn.
        parameters: Weight of each functional site that has one (`F.linear(x, self.w)`), by site.
        operands: Parameter that each sum, difference or elementwise product reads on a grid, by site.
        owners: Per module whose forward runs functional sites of quantized kinds: the kinds of those that are its
            own, in order.
        batch_norms: Per layer, the BatchNorm that folds into it.
        residuals: Per addition whose operands have grids: what each comes straight from (`Engine.accumulated`).
        engine: The one whose rules hold.
        round_bias: When biases are rounded; see `QuantPolicy`.
        policy: The policy it was made from.
    """

    weights: dict[str, QuantSpec] = field(default_factory=dict)
    activations: dict[str, QuantSpec] = field(default_factory=dict)
    layers: dict[str, PlannedLayer] = field(default_factory=dict)
    sites: dict[str, list[list[str]]] = field(default_factory=dict)
    parameters: dict[str, SiteWeight] = field(default_factory=dict)
    operands: dict[str, SiteOperand] = field(default_factory=dict)
    owners: dict[str, list[str]] = field(default_factory=dict)
    batch_norms: dict[str, str] = field(default_factory=dict)
    residuals: dict[str, list[str]] = field(default_factory=dict)
    engine: str | None = None
    round_bias: str = "eval"
    policy: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        entries = {"layers": self.layers, "parameters": self.parameters, "operands": self.operands}
        return dataclasses.asdict(self) | {
            key: {name: _stored(entry) for name, entry in found.items()} for key, found in entries.items()
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Plan":
        values = renamed({**values, "policy": renamed(values.get("policy", {}))})
        plan = cls(**values)
        plan.weights = {n: QuantSpec.from_dict(s, n) for n, s in values["weights"].items()}
        plan.activations = {n: QuantSpec.from_dict(s, n) for n, s in values["activations"].items()}
        plan.layers = {n: PlannedLayer(**layer) for n, layer in values.get("layers", {}).items()}
        plan.parameters = {n: SiteWeight(**weight) for n, weight in values.get("parameters", {}).items()}
        plan.operands = {n: SiteOperand(**operand) for n, operand in values.get("operands", {}).items()}
        return plan


def _stored(entry: PlannedLayer | SiteWeight | SiteOperand) -> dict[str, Any]:
    """An entry without the attributes that have their default."""
    values = dataclasses.asdict(entry)
    return {f.name: values[f.name] for f in dataclasses.fields(entry) if values[f.name] != f.default}


def operand_spec(plan: Plan, site: str) -> QuantSpec:
    """The grid of a parameter among `Plan.operands`."""
    return plan.activations[plan.sites[site][plan.operands[site].index][-1]]


def grids_of(plan: Plan, name: str) -> tuple[QuantSpec | None, list[list[QuantSpec]]]:
    """The grid of a layer's or a site's weight, and those that each of its inputs with a grid passes in turn."""
    layer, site = plan.layers.get(name), plan.parameters.get(name)
    reader = layer or site
    weight = plan.weights[reader.weight] if reader and reader.weight is not None else None
    chains = layer.inputs if layer else plan.sites.get(name, [])
    specs = [[plan.activations[label] for label in chain] for chain in chains if chain]
    return operand_spec(plan, name) if name in plan.operands else weight, specs


def owner_of(site: str) -> str:
    """The module whose forward runs a site."""
    return site.removesuffix(f".{PROBABILITIES}").rpartition(".")[0]


def kind_of(site: str) -> str:
    """`layer1.0.add_0` -> `add`."""
    return site.removesuffix(f".{PROBABILITIES}").rpartition(".")[2].rpartition("_")[0]
