"""A `Plan`: which tensor gets which grid, as plain data. It travels in checkpoints and manifests and rebuilds the same
quantizers without the policy, the data or a second look at the model.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from qat.planning.functions import FUNCTIONS, PROBABILITIES
from qat.spec import QuantSpec

OUTPUTS = {function.kind for function in FUNCTIONS.values() if function.output}
"""Kinds of sites that quantize what they return."""


@dataclass
class Plan:
    """Which quantizers a model gets, in plain containers (`to_dict`, `from_dict`).

    Attributes:
        weights: Spec of each weight's grid, by the layer that owns the quantizer.
        activations: Spec of each activation's grid, by the first place that reads it (`conv1.input`,
            `layer1.0.add_0.input_1`).
        layers: Per layer: `weight`, the owner of its weight's grid (or `None`), and `input`, the activation grids its
            input passes in turn (`input_1`: its second input; `Bilinear` has one). `read` is there if functions
            around the layer read its float weight, too. An owner whose weight is not `<layer>.weight` with its output
            channels along axis 0 also has `parameter`, its path, and `rows`, the first of them and how many, or `axis`.
        sites: Per functional site: for each operand (or for the output), the activation grids it passes in turn.
        parameters: Per functional site whose second operand is a parameter: `parameter`, its path, `axis`, its output
            channels, `weight`, the owner of its grid (or `None`), and `alone`, whether only such sites read it; of
            experts also `stacked`, the order of its last two axes.
        operands: Per sum, difference or elementwise product with a parameter: `parameter`, its path, `index`, which
            operand it is, and `alone`, whether only such sites read it. Its grid is among `sites`, as of any operand.
        owners: Per module whose forward runs functional sites of quantized kinds: the kinds of those that are its
            own, in order.
        batch_norms: Per layer, the BatchNorm that folds into it.
        residuals: Per addition whose operands have grids: what each comes straight from (`Engine.accumulated`).
        target: The engine whose rules hold.
        round_bias: When biases are rounded; see `QuantPolicy`.
        policy: The policy it was made from.
    """

    weights: dict[str, QuantSpec] = field(default_factory=dict)
    activations: dict[str, QuantSpec] = field(default_factory=dict)
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    sites: dict[str, list[list[str]]] = field(default_factory=dict)
    parameters: dict[str, dict[str, Any]] = field(default_factory=dict)
    operands: dict[str, dict[str, Any]] = field(default_factory=dict)
    owners: dict[str, list[str]] = field(default_factory=dict)
    batch_norms: dict[str, str] = field(default_factory=dict)
    residuals: dict[str, list[str]] = field(default_factory=dict)
    target: str | None = None
    round_bias: str = "eval"
    policy: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Plan":
        plan = cls(**values)
        plan.weights = {n: QuantSpec.from_dict(s, n) for n, s in values["weights"].items()}
        plan.activations = {n: QuantSpec.from_dict(s, n) for n, s in values["activations"].items()}
        return plan


def operand_spec(plan: Plan, site: str) -> QuantSpec:
    """The grid of a parameter among `Plan.operands`."""
    return plan.activations[plan.sites[site][plan.operands[site]["index"]][-1]]


def owner_of(site: str) -> str:
    """The module whose forward runs a site."""
    return site.removesuffix(f".{PROBABILITIES}").rpartition(".")[0]


def kind_of(site: str) -> str:
    """`layer1.0.add_0` -> `add`."""
    return site.removesuffix(f".{PROBABILITIES}").rpartition(".")[2].rpartition("_")[0]
