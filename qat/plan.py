"""Planning: a float model and a policy become a `Plan`: which tensor gets which grid.

A plan is plain data: it travels in checkpoints and manifests and rebuilds the same quantizers without the policy, the
data or a second look at the model. `make_plan` derives it from one recorded forward pass; `qat.insert` carries it out.

A quantizer belongs to a *tensor*. All integer readers of a tensor share one quantizer where their specs agree. Where
they differ (a residual add at 8 bits beside a convolution at 4), the coarser reader reads what the finest grid left of
the tensor, as an integer engine does, which stores it once.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from qat.edges import activation_grids
from qat.engines import engine_of
from qat.errors import UserError
from qat.functions import EXPERTS, FUNCTIONS, KV_CACHE, MEAN, PROBABILITIES
from qat.layers import BoundPart, Composite, QuantizedLayer, is_computed, mixin_for, original_class, sites_changed
from qat.layers.adapted import inside_adapters
from qat.policy import QuantPolicy, Target
from qat.probe import Call, Recording, record
from qat.spec import QuantSpec

OUTPUTS = {function.kind for function in FUNCTIONS.values() if function.output}
"""Kinds of sites that quantize what they return."""
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass
class Plan:
    """Which quantizers a model gets, in plain containers (`to_dict`, `from_dict`).

    Attributes:
        weights: Spec of each weight's grid, by the layer that owns the quantizer.
        activations: Spec of each activation's grid, by the first place that reads it (`conv1.input`,
            `layer1.0.add_0.input_1`).
        layers: Per layer: `weight`, the owner of its weight's grid (or `None`), and `input`, the activation grids its
            input passes in turn (`input_1`: its second input; `Bilinear` has one). `read` is there if functions
            around the layer read its float weight, too.
        sites: Per functional site: for each operand (or for the output), the activation grids it passes in turn.
        parameters: Per functional site whose second operand is a parameter: `parameter`, its path, `axis`, its output
            channels, `weight`, the owner of its grid (or `None`), and `alone`, whether only such sites read it; of
            experts also `stacked`, the order of its last two axes.
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


def is_leaf(module: nn.Module) -> bool:
    return mixin_for(module) is not None or isinstance(module, NORMS)


def inside_of(module: nn.Module, *call: Any) -> list[Call] | None:
    """The calls of parts that the call of a layer with several weights stands for (see `probe.record`)."""
    mixin = mixin_for(module)
    return mixin.calls(module, *call) if mixin is not None and issubclass(mixin, Composite) else None


def computed(module: nn.Module) -> str | None:
    """Which of weight and bias is neither an ordinary parameter nor a weight that a parametrization makes, but computed
    by pruning and the like; `None` if neither is.
    """
    if isinstance(module, BoundPart):
        return None
    if not is_computed(module) and not isinstance(module._parameters.get("weight"), nn.Parameter):
        return "weight"
    return "bias" if "bias" not in module._parameters and hasattr(module, "bias") else None


def has_weight(module: Any) -> bool:
    """Whether it is a layer (not a function, a pool or a norm) with a weight that can be quantized."""
    mixin = mixin_for(module) if isinstance(module, nn.Module) else None
    real = mixin is not None and mixin.channel_axis is not None and not is_complex(module)
    return real and computed(module) is None


def is_complex(module: nn.Module) -> bool:
    """Whether its weight is of complex numbers, for which there are no grids."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.is_complex()


def targets(model: nn.Module, recording: Recording) -> dict[str, list[Call]]:
    """What a policy can address, in execution order: for each layer or site, its calls."""
    found: dict[str, list[Call]] = {}
    floating = set(inside_adapters(model))
    for call in recording.order:
        if call.name in floating:
            continue
        if isinstance(call.what, nn.Module):
            mixin = mixin_for(call.what)
            if mixin and (mixin.channel_axis is None or has_weight(call.what)):
                quantizable = call.inputs[: mixin.inputs] if issubclass(mixin, QuantizedLayer) else []
                found.setdefault(call.name, []).append(dataclasses.replace(call, operands=quantizable))
        elif call.site and is_addressable(call):
            found.setdefault(call.site, []).append(call)
            if call.kind == "attention":
                found.setdefault(f"{call.site}.{PROBABILITIES}", []).append(_probabilities(call))
                cached = dataclasses.replace(call, kind=KV_CACHE, operands=call.operands[1:])
                found.setdefault(f"{call.site}.{KV_CACHE}", []).append(cached)
    return found


def is_addressable(call: Call) -> bool:
    """Leaves out means that are not over the pixels of an image, what is computed from no data (but attentions, as of
    DETR's learned queries), and sums and products with a parameter that is no weight.
    """
    pixels = call.input_shape[:2] == call.shape[:2] and call.shape[2:] in ((), (1, 1))
    if call.what in MEAN and not pixels:
        return False
    if call.constant and not call.weight and call.kind != "attention":
        return False
    return call.weight or call.parameter is None or call.kind in ("cat", "attention")


def _probabilities(call: Call) -> Call:
    """The tensor between the two products of an attention, as a target: it is >= 0 and nobody else reads it."""
    key = (-id(call), 0)  # ids are positive, so it is no tensor's
    return dataclasses.replace(call, site=f"{call.site}.{PROBABILITIES}", kind=PROBABILITIES, operands=[key])


def make_plan(model: nn.Module, policy: QuantPolicy, run: Callable[[], Any]) -> tuple[Plan, Recording]:
    """Decides every grid from one pass of `run()` (see `probe.record`); the model is left as it is.

    Raises:
        UserError: if a rule matches nothing or nothing can be quantized.
    """
    recording = record(model, run, is_leaf, inside_of)
    check_shapes_known(model)
    _check_names(model, recording)
    calls = targets(model, recording)
    if not calls:
        raise UserError(
            f"{type(model).__name__} has no layer that can be quantized: "
            "the probe batch passed no Linear, Conv, Embedding, LSTM or the like"
        )
    decisions = policy.resolve(described(calls))
    plan = Plan(policy=policy.settings, target=policy.target, round_bias=policy.round_bias)
    _plan_weights(plan, model, recording, calls, decisions)
    plan.batch_norms = {
        layer: norm for layer, norm in _batch_norm_pairs(recording).items() if plan.layers[layer]["weight"] is not None
    }
    plan.residuals = _residuals(plan, recording, calls, decisions)
    floating = {
        (name, operand)
        for name, products in plan.residuals.items()
        if (operand := engine_of(policy.target).accumulated(products)) is not None
    }
    plan.activations, chains = activation_grids(recording, calls, decisions, policy.concat == "shared", floating)
    for name, operands in chains.items():
        if name in plan.layers:
            plan.layers[name].update(zip(("input", "input_1"), operands, strict=False))
        else:
            plan.sites[name] = operands
    _plan_owners(plan, model, recording)
    if not plan.weights and not plan.activations:
        raise UserError(
            "the policy leaves everything float: give quant.weight or quant.act settings, or a rule that does"
        )
    return plan, recording


def _residuals(
    plan: Plan, recording: Recording, calls: dict[str, list[Call]], decisions: dict[str, Any]
) -> dict[str, list[str]]:
    """Additions of two tensors with grids, one at least of which is the output of a layer that multiplies integers (of
    a BatchNorm that folds into it) and that nobody else reads.
    """
    norms = {norm: layer for layer, norm in plan.batch_norms.items()}
    products: dict[Any, str] = {}
    for call in recording.modules:
        layer = norms.get(call.name, call.name)
        if call.output is None or recording.readers.get(call.output) != 1 or layer not in plan.layers:
            continue
        original = type_of(calls[layer][0].what)
        kind = "conv" if issubclass(original, CONVOLUTIONS) else "linear" if issubclass(original, nn.Linear) else ""
        if plan.layers[layer]["weight"] is not None and decisions[layer]["act"][0] is not None:
            products[call.output] = kind
    found = {
        name: [products.get(key, "") for key in first.operands]
        for name, (first, *more) in calls.items()
        if first.kind == "add" and not more and decisions[name]["act"][0] is not None
    }
    return {name: kinds for name, kinds in found.items() if any(kinds) and len(kinds) == 2}


def check_shapes_known(model: nn.Module) -> None:
    """Raises if a lazy layer has not seen a batch yet."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():  # pyright: ignore
            raise UserError(
                f"'{name}' ({type(module).__name__}) does not know its shape yet, because no batch has reached it: "
                "run the model once on a batch first, or give it the number of its input features"
            )


def weight_identity(layer: Any) -> Any:
    """Equal for layers that share their weight, of which there may be another tensor each time one asks."""
    if isinstance(layer, BoundPart):
        return layer.identity()
    return id(layer) if is_computed(layer) else id(layer.weight)


def _check_names(model: nn.Module, recording: Recording) -> None:
    for site in [call.site for call in recording.functions if call.site]:
        owner, _, leaf = site.rpartition(".")
        if hasattr(model.get_submodule(owner), leaf):
            raise UserError(f"'{site}' names a functional site, but the model has an attribute of that name: rename it")


def described(calls: dict[str, list[Call]]) -> list[Target]:
    """The targets as a policy sees them; layers may have become twins since."""
    return [
        Target(
            name,
            first.kind or type_of(first.what).__name__,
            first.weight or has_weight(first.what),
            is_site=first.site is not None,
        )
        for name, (first, *_) in calls.items()
    ]


def type_of(module: nn.Module) -> type[nn.Module]:
    """The float class of a layer; parts go by that of the layer they are in."""
    return original_class(module.owner[0] if isinstance(module, BoundPart) else module)


def _plan_weights(
    plan: Plan, model: nn.Module, recording: Recording, calls: dict[str, list[Call]], decisions: dict[str, Any]
) -> None:
    owner_of: dict[Any, str] = {}
    for name, (call, *_) in calls.items():
        if call.site and not call.weight:
            continue
        weight = model.get_parameter(call.parameter) if call.weight and call.parameter else None
        spec = decisions[name]["weight"][0] if call.weight or has_weight(call.what) else None
        identity = id(weight) if call.weight else weight_identity(call.what) if spec else None
        owner = owner_of.setdefault(identity, name) if spec else None
        if spec and owner == name:
            plan.weights[name] = spec.resolved(nonnegative=False, weight=True)
        elif spec and owner and spec.resolved(nonnegative=False, weight=True) != plan.weights[owner]:
            raise UserError(
                f"'{name}' and '{owner}' are one weight, but the policy gives them different grids; "
                "add a rule that matches both"
            )
        if call.weight:
            assert weight is not None and call.parameter is not None
            axis = (FUNCTIONS[call.what].channel_axis or 0) % weight.ndim
            if spec and spec.granularity == "group" and axis > 1 and call.kind != EXPERTS:
                raise UserError(
                    f"'{name}': granularity=group needs a weight matrix, but '{call.parameter}' is a stack of them "
                    f"{list(weight.shape)}; use granularity: channel or tensor there"
                )
            alone = recording.only_sites_read(call.parameter)
            plan.parameters[name] = {"parameter": call.parameter, "axis": axis, "weight": owner, "alone": alone}
            if call.kind == EXPERTS:
                transposed = call.operands[1][0] != id(weight)  # then the parameter is [experts, out, in]
                plan.parameters[name].update(axis=0, stacked="out_in" if transposed else "in_out")
        else:
            plan.layers[name] = {"weight": owner, "input": []}
            if owner and recording.read_by_functions(call.what._parameters.get("weight"), f"{name}.weight"):
                plan.layers[name]["read"] = True


def _plan_owners(plan: Plan, model: nn.Module, recording: Recording) -> None:
    """Modules that run sites become owners even where theirs stay float, or those around would count them as theirs.

    An owner counts the kinds that it has grids for, and no others: what it leaves float may come and go.
    """
    quantized = {*plan.sites, *(name for name, site in plan.parameters.items() if site["weight"] is not None)}
    kinds = {kind_of(site) for site in quantized}
    own: dict[str, set[str]] = {}
    for site in quantized:
        own.setdefault(owner_of(site), set()).add(kind_of(site))
    for name, orders in recording.site_orders().items():
        first, *others = ([kind for kind in order if kind in own.get(name, ())] for order in orders)
        different = next((order for order in others if order != first), None)
        if different is not None:
            raise UserError(sites_changed(name, model.get_submodule(name), first, different))
        if any(kind in kinds for order in orders for kind in order):
            plan.owners[name] = first


def owner_of(site: str) -> str:
    """The module whose forward runs a site."""
    return site.removesuffix(f".{PROBABILITIES}").rpartition(".")[0]


def kind_of(site: str) -> str:
    """`layer1.0.add_0` -> `add`."""
    return site.removesuffix(f".{PROBABILITIES}").rpartition(".")[2].rpartition("_")[0]


def _batch_norm_pairs(recording: Recording) -> dict[str, str]:
    """Layers whose output is read by one BatchNorm and nothing else, each called once."""
    times: dict[str, int] = {}
    for call in recording.modules:
        times[call.name] = times.get(call.name, 0) + 1
    producers = {
        call.output: call.name
        for call in recording.modules
        if has_weight(call.what)
        and call.output is not None
        and not isinstance(call.what, nn.Embedding | nn.EmbeddingBag | nn.Bilinear)
        and len(call.shape) == call.what.weight.ndim  # then dimension 1 is the channel for both
    }
    return {
        producers[call.inputs[0]]: call.name
        for call in recording.modules
        if isinstance(call.what, NORMS)
        and call.what.track_running_stats
        and call.inputs
        and call.inputs[0] in producers
        and recording.readers[call.inputs[0]] == 1
        and times[call.name] == times[producers[call.inputs[0]]] == 1
    }
