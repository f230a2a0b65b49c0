"""Insertion: a float model and a policy become a plan, and a plan becomes quantizers in the model.

A `Plan` is plain data: it travels in checkpoints and manifests and rebuilds the same quantizers without the policy, the data or a second look at the
model. `make_plan` derives it from one recorded forward pass, `apply_plan` turns layers into twins in place, `remove` turns them back.

A quantizer belongs to a *tensor*. All integer readers of a tensor share one quantizer where their specs agree. Where they differ (a residual add at 8
bits beside a convolution at 4), the coarser reader reads what the finest grid left of the tensor, as an integer engine does, which stores it once.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from qat import quantizers
from qat.errors import UserError
from qat.layers import (
    FoldingNorm, QuantizedLayer, Site, SiteOwner, TwinMixin, become_twin, drop_mixins, mixin_for, owner_mixin,
)  # fmt: skip
from qat.policy import QuantPolicy, Target
from qat.probe import MEAN, Call, Key, Recording, record
from qat.quantizers import Quantizer
from qat.spec import QuantSpec

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


@dataclass
class Plan:
    """Which quantizers a model gets, in plain containers (`to_dict`, `from_dict`).

    Attributes:
        weights: Spec of each weight's grid, by the layer that owns the quantizer.
        activations: Spec of each activation's grid, by the first place that reads it (`conv1.input`, `layer1.0.add_0.input_1`).
        layers: Per layer: `weight`, the owner of its weight's grid (or `None`), and `input`, the activation grids its input passes in turn.
        sites: Per functional site: for each tensor input, the activation grids it passes in turn.
        owners: Per module whose forward runs functional sites, how many of each kind.
        batch_norms: Per layer, the BatchNorm that folds into it.
        policy: The policy it was made from.
    """

    weights: dict[str, QuantSpec] = field(default_factory=dict)
    activations: dict[str, QuantSpec] = field(default_factory=dict)
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    sites: dict[str, list[list[str]]] = field(default_factory=dict)
    owners: dict[str, dict[str, int]] = field(default_factory=dict)
    batch_norms: dict[str, str] = field(default_factory=dict)
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


def has_plain_weight(module: nn.Module) -> bool:
    """Whether the weight is an ordinary parameter, not one computed by a parametrization or by pruning."""
    return isinstance(module._parameters.get("weight"), nn.Parameter)


def targets(model: nn.Module, recording: Recording) -> dict[str, list[Call]]:
    """What a policy can address, in execution order: for each layer or site, its calls."""
    found: dict[str, list[Call]] = {}
    for call in recording.order:
        if isinstance(call.what, nn.Module):
            mixin = mixin_for(call.what)
            if mixin and (mixin.channel_axis is None or has_plain_weight(call.what)):
                found.setdefault(call.name, []).append(call)
        elif call.site and not call.parameter and _is_pooling_or_sum(call):
            found.setdefault(call.site, []).append(call)
    return found


def _is_pooling_or_sum(call: Call) -> bool:
    """Leaves out means that are not over the pixels of an image."""
    pixels = call.input_shape[:2] == call.shape[:2] and call.shape[2:] in ((), (1, 1))
    return call.what not in MEAN or pixels


def make_plan(model: nn.Module, policy: QuantPolicy, run: Callable[[], Any]) -> tuple[Plan, Recording]:
    """Decides every grid from one pass of `run()` (see `probe.record`); the model is left as it is.

    Raises:
        UserError: if a rule matches nothing or nothing can be quantized.
    """
    recording = record(model, run, is_leaf)
    calls = targets(model, recording)
    if not calls:
        raise UserError(
            f"{type(model).__name__} has no layer that can be quantized: the probe batch passed no Linear, Conv or Embedding"
        )
    described = [
        Target(name, type(c[0].what).__name__ if c[0].kind is None else c[0].kind, _has_weight(c[0]))
        for name, c in calls.items()
    ]
    decisions = policy.resolve(described)
    plan = Plan(policy=policy.settings, owners=recording.site_counts(), batch_norms=_batch_norm_pairs(recording))
    _plan_weights(plan, calls, decisions)
    _plan_activations(plan, recording, calls, decisions)
    if not plan.weights and not plan.activations:
        raise UserError(
            "the policy leaves everything float: give quant.weight or quant.act settings, or a rule that does"
        )
    return plan, recording


def _has_weight(call: Call) -> bool:
    mixin = mixin_for(call.what) if isinstance(call.what, nn.Module) else None
    return mixin is not None and mixin.channel_axis is not None


def _plan_weights(plan: Plan, calls: dict[str, list[Call]], decisions: dict[str, Any]) -> None:
    owner_of: dict[int, str] = {}
    for name, (call, *_) in calls.items():
        if call.site:
            continue
        spec = decisions[name]["weight"][0] if _has_weight(call) else None
        owner = owner_of.setdefault(id(call.what.weight), name) if spec else None
        if spec and owner == name:
            plan.weights[name] = spec.resolved(nonnegative=False, weight=True)
        elif spec and owner and spec.resolved(nonnegative=False, weight=True) != plan.weights[owner]:
            raise UserError(
                f"'{name}' and '{owner}' are one weight, but the policy gives them different grids; add a rule that matches both"
            )
        plan.layers[name] = {"weight": owner, "input": []}


def _plan_activations(
    plan: Plan, recording: Recording, calls: dict[str, list[Call]], decisions: dict[str, Any]
) -> None:
    edges: list[tuple[str, int, Key, QuantSpec]] = []
    for name, (first, *more) in calls.items():
        spec = decisions[name]["act"][0]
        if spec is None:
            continue
        for index, key in enumerate(first.inputs[: 2 if first.kind == "add" else 1]):
            keys = [key, *(c.inputs[index] for c in more)]
            nonnegative = all(recording.root(k) in recording.nonnegative for k in keys)
            edges.append((name, index, recording.root(key), spec.resolved(nonnegative=nonnegative, weight=False)))
    grids: dict[Key, dict[QuantSpec, str]] = {}
    for name, index, tensor, spec in edges:
        label = f"{name}.input_{index}" if name not in plan.layers else f"{name}.input"
        grids.setdefault(tensor, {}).setdefault(spec, label)
    for name, index, tensor, spec in edges:
        finest = max(grids[tensor], key=lambda s: s.bits)
        chain = [spec] if spec.bits == finest.bits else [finest, spec]
        plan.activations.update((grids[tensor][s], s) for s in chain)
        labels = [grids[tensor][s] for s in chain]
        if name in plan.layers:
            plan.layers[name]["input"] = labels
        else:
            plan.sites.setdefault(name, [[], []] if calls[name][0].kind == "add" else [[]])[index] = labels


def _batch_norm_pairs(recording: Recording) -> dict[str, str]:
    """Layers whose output is read by one BatchNorm and nothing else, each called once."""
    times: dict[str, int] = {}
    for call in recording.modules:
        times[call.name] = times.get(call.name, 0) + 1
    producers = {
        call.output: call.name
        for call in recording.modules
        if _has_weight(call) and not isinstance(call.what, nn.Embedding)
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


def apply_plan(model: nn.Module, plan: Plan) -> None:
    """Inserts the plan's quantizers in place: layers become twins, float keys stay as they are.

    Raises:
        UserError: if the model has quantizers already, or lacks a module that the plan names.
    """
    if any(isinstance(m, Quantizer) for m in model.modules()):
        raise UserError(f"{type(model).__name__} holds quantizers already; qat.remove(model) takes them out")
    modules = dict(model.named_modules())
    missing = [n for n in (*plan.layers, *plan.owners) if n not in modules]
    if missing:
        raise UserError(
            f"the quantization plan was made for another model: there is no module '{missing[0]}' in {type(model).__name__}"
        )
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    activations = {label: quantizers.create(spec).to(device) for label, spec in plan.activations.items()}
    for name, layer in plan.layers.items():
        module = modules[name]
        mixin = mixin_for(module)
        if mixin is None:
            raise UserError(f"the quantization plan was made for another model: '{name}' is a {type(module).__name__}")
        become_twin(module, mixin)
        module.register_module("input_quantizer", _chain(layer["input"], activations))
        module.register_module("weight_quantizer", _weight_quantizer(name, layer["weight"], plan, modules, mixin))
        if name in plan.batch_norms and layer["weight"] is not None:
            norm = modules[plan.batch_norms[name]]
            become_twin(norm, FoldingNorm)
            norm.host = (module,)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
            module.folds = True  # pyright: ignore[reportAttributeAccessIssue]
    for name, counts in plan.owners.items():
        become_twin(modules[name], owner_mixin(modules[name]))
        modules[name].site_counts = dict(counts)  # pyright: ignore[reportAttributeAccessIssue]
    for site, inputs in plan.sites.items():
        owner, _, leaf = site.rpartition(".")
        modules[owner].add_module(leaf, Site([_chain(labels, activations) for labels in inputs]))


def _chain(labels: list[str], activations: dict[str, Quantizer]) -> nn.Module | None:
    if not labels:
        return None
    return activations[labels[0]] if len(labels) == 1 else nn.Sequential(*(activations[label] for label in labels))


def _weight_quantizer(
    name: str, owner: str | None, plan: Plan, modules: dict[str, nn.Module], mixin: type[QuantizedLayer]
) -> nn.Module | None:
    if owner is None:
        return None
    if owner != name:
        return modules[owner].weight_quantizer  # pyright: ignore[reportReturnType]
    weight = modules[name].weight
    assert isinstance(weight, torch.Tensor) and mixin.channel_axis is not None
    try:
        return quantizers.create(plan.weights[name], weight.shape, mixin.channel_axis).to(weight.device)
    except UserError as error:
        raise UserError(f"layer '{name}': {error}") from None


def remove(model: nn.Module) -> None:
    """Takes the quantizers out: the model is what it was before, with the weights it has now."""
    for module in list(model.modules()):
        if isinstance(module, TwinMixin):
            for child in [n for n, m in module.named_children() if isinstance(m, Site)]:
                delattr(module, child)
            if isinstance(module, SiteOwner):
                del module.site_counts
            if isinstance(module, QuantizedLayer):
                del module.input_quantizer, module.weight_quantizer
                for name in ("_weight_cache", "folds"):
                    module.__dict__.pop(name, None)
            if isinstance(module, FoldingNorm):
                del module.host
            for mixin in (QuantizedLayer, SiteOwner, FoldingNorm):
                drop_mixins(module, mixin)


def named_quantizers(model: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """Every quantizer once, under its first name."""
    for name, module in model.named_modules():
        if isinstance(module, Quantizer):
            yield name, module
