"""Insertion: a plan becomes quantizers in the model, and back.

`apply_plan` turns layers into twins in place (see `qat.layers.twin`): float parameters, keys, hooks and ties stay where
they are. `remove` turns them back. In between the model remembers its plan, as a plain attribute: copies and pickles
have it, a state_dict does not.
"""

from collections import Counter
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from qat import quantizers
from qat.errors import UserError, nearest
from qat.grid.spec import QuantSpec
from qat.insert_sites import insert_sites
from qat.layers import (
    FUSED,
    Composite,
    ComputedWeight,
    FoldingNorm,
    Part,
    QuantizedLayer,
    QuantSequential,
    Site,
    SlowPath,
    TwinMixin,
    become_twin,
    drop_mixins,
    is_computed,
    mixin_for,
    original_class,
    rounds_within,
)  # fmt: skip
from qat.layers.chain import chain, in_turn
from qat.layers.experts import rows
from qat.layers.twin import Inserted
from qat.planning.addressable import check_shapes_known, has_weight
from qat.planning.plan import Plan
from qat.quantizers import Quantizer

PLAN = "quantization_plan"
"""The attribute of a quantized model that is its plan."""


def remember(model: nn.Module, plan: Plan) -> None:
    vars(model)[PLAN] = plan


def remembered(model: nn.Module) -> Plan | None:
    """The plan of a model; `None` if it holds no quantizers."""
    return vars(model).get(PLAN)


def plan_of(model: nn.Module) -> Plan:
    """The plan that a model's quantizers were made from: which tensor has which grid.

    Raises:
        UserError: if it has none, naming the module in it that does.
    """
    if (plan := remembered(model)) is not None:
        return plan
    inside = next((f"; '{name}' in it has one" for name, module in model.named_modules() if remembered(module)), "")
    raise UserError(
        f"{original_class(model).__name__} has no quantization plan{inside or ': qat.quantize makes and inserts one'}"
    )


def apply_plan(model: nn.Module, plan: Plan) -> None:
    """Inserts the plan's quantizers in place: layers become twins, float keys stay as they are. See `plan_of`.

    Raises:
        UserError: if the model has quantizers already, or lacks a module that the plan names.
    """
    if any(isinstance(m, Quantizer) for m in model.modules()):
        raise UserError(f"{original_class(model).__name__} holds quantizers already; qat.remove(model) takes them out")
    check_shapes_known(model)
    modules = dict(model.named_modules())
    parts = _parts(plan, modules)
    modules.update(parts)
    _check_fit(model, plan, modules)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    activations = {label: quantizers.create(spec).to(device) for label, spec in plan.activations.items()}
    for label, count in _readers(plan).items():
        activations[label].readers = count  # pyright: ignore[reportArgumentType]
    weights = {name: _weight_quantizer(name, model, plan, modules, spec) for name, spec in plan.weights.items()}
    for name, part in parts.items():
        owner, _, leaf = name.rpartition(".")
        become_twin(modules[owner], mixin_for(modules[owner]))  # pyright: ignore[reportArgumentType]
        modules[owner].add_module(leaf, part)
    for name, layer in plan.layers.items():
        module, mixin = modules[name], _mixin(modules[name])
        if name not in parts:
            become_twin(module, mixin)
        if is_computed(module):
            become_twin(module, ComputedWeight)
        first, *others = (chain([activations[label] for label in labels]) for labels in layer.inputs)
        module.register_module("input_quantizer", first)
        for index in range(1, mixin.inputs):
            module.register_module(f"input_quantizer_{index}", others[index - 1])
        module.register_module("weight_quantizer", None if layer.weight is None else weights[layer.weight])
        if plan.round_bias != mixin.round_bias:
            module.round_bias = plan.round_bias  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    for name, norm in plan.batch_norms.items():
        _fold(modules[norm], modules[name])
    insert_sites(plan, modules, activations, weights)
    for name, module in modules.items():
        if isinstance(module, FUSED) and any(part.startswith(f"{name}." if name else "") for part in plan.layers):
            become_twin(module, SlowPath)
    for module in [m for m in model.modules() if rounds_within(m)]:
        become_twin(module, QuantSequential)
    adopt_modes(model)
    remember(model, plan)


def _fold(norm: nn.Module, layer: nn.Module) -> None:
    become_twin(norm, FoldingNorm)
    norm.host = (layer,)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    layer.folds = True  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]


def fold_again(model: nn.Module) -> None:
    """Makes BatchNorms that somebody (Lightning's `sync_batchnorm`) has put in the places of those that fold their
    twins.
    """
    if (plan := remembered(model)) is None:
        return
    modules = dict(model.named_modules())
    for name, norm in plan.batch_norms.items():
        found, layer = modules.get(norm), modules.get(name)
        if isinstance(found, _BatchNorm) and not isinstance(found, FoldingNorm) and getattr(layer, "folds", False):
            _fold(found, layer)  # pyright: ignore[reportArgumentType]


def adopt_modes(model: nn.Module) -> None:
    """Puts what was inserted in training or evaluation as the module that it is in."""
    for module in model.modules():
        if isinstance(module, TwinMixin):
            for child in module.children():
                if isinstance(next(iter(in_turn(child)), None), Quantizer | Site | Part):
                    child.train(module.training)


def _readers(plan: Plan) -> Counter[str]:
    """How many layers and operands of sites read each activation's grid."""
    layers = (layer.inputs for layer in plan.layers.values())
    return Counter(label for operands in (*layers, *plan.sites.values()) for labels in operands for label in labels)


def _parts(plan: Plan, modules: dict[str, nn.Module]) -> dict[str, Part]:
    """New parts for the planned layers that are no modules of the float model, but matrices inside of one."""
    found: dict[str, Part] = {}
    for name in [n for n in plan.layers if n not in modules]:
        owner = name.rpartition(".")[0]
        mixin = mixin_for(modules[owner]) if owner in modules else None
        if mixin is not None and issubclass(mixin, Composite):
            found.update({f"{owner}.{leaf}".lstrip("."): part for leaf, part in mixin.parts(modules[owner]).items()})
    return found


def _check_fit(model: nn.Module, plan: Plan, modules: dict[str, nn.Module]) -> None:
    """Raises before anything is changed."""
    other = "the quantization plan was made for another model"
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    needed = [(name, "module", list(modules)) for name in (*plan.layers, *plan.owners, *plan.batch_norms.values())]
    needed += [(site.parameter, "parameter", parameters) for site in plan.parameters.values()]
    for name, what, known in needed:
        if name not in known:
            raise UserError(f"{other}: there is no {what} '{name}' in {type(model).__name__}{nearest(name, known)}")
    for name, layer in plan.layers.items():
        mixin = mixin_for(modules[name])
        weightless = layer.weight is not None and not has_weight(modules[name])
        if mixin is None or issubclass(mixin, Composite) or weightless:
            raise UserError(f"{other}: '{name}' is a {type(modules[name]).__name__} that cannot be quantized")


def _mixin(module: nn.Module) -> type[QuantizedLayer]:
    mixin = mixin_for(module)
    assert mixin is not None and issubclass(mixin, QuantizedLayer)  # _check_fit has seen to it
    return mixin


def _weight_quantizer(
    name: str, model: nn.Module, plan: Plan, modules: dict[str, nn.Module], spec: QuantSpec
) -> Quantizer:
    if site := plan.parameters.get(name):
        weight, axis = model.get_parameter(site.parameter), site.axis
        weight = rows(weight, site.stacked) if site.stacked else weight
    else:
        layer = modules[name]
        weight, axis = layer.weight, _mixin(layer).channel_axis
    assert isinstance(weight, torch.Tensor) and axis is not None
    try:
        return quantizers.create(spec, weight.shape, axis).to(weight.device)
    except UserError as error:
        raise UserError(f"layer '{name}': {error}") from None


def remove(model: nn.Module) -> None:
    """Takes the quantizers out: the model is what it was before, with the weights it has now."""
    for module in list(model.modules()):
        vars(module).pop(PLAN, None)
        if isinstance(module, Inserted) and not isinstance(module, Part):
            for child in [n for n, m in module.named_children() if isinstance(m, Site | Part)]:
                delattr(module, child)
            module.undo_twin()
            drop_mixins(module, Inserted)


def named_quantizers(model: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """Every quantizer once, under its first name."""
    for name, module in model.named_modules():
        if isinstance(module, Quantizer):
            yield name, module
