"""Insertion: a plan becomes quantizers in the model, and back.

`apply_plan` turns layers into twins in place (see `qat.layers.twin`): float parameters, keys, hooks and ties stay where
they are. `remove` turns them back.
"""

from collections.abc import Iterator

import torch
from torch import nn

from qat import quantizers
from qat.errors import UserError, nearest
from qat.insert_sites import chain, insert_sites
from qat.layers import (
    FoldingNorm,
    QuantizedLayer,
    Site,
    SiteOwner,
    TwinMixin,
    become_twin,
    drop_mixins,
    mixin_for,
)  # fmt: skip
from qat.layers.experts import QuantExperts, rows
from qat.plan import Plan, has_weight, make_plan
from qat.quantizers import Quantizer
from qat.spec import QuantSpec

__all__ = ["Plan", "apply_plan", "make_plan", "named_quantizers", "remove"]


def apply_plan(model: nn.Module, plan: Plan) -> None:
    """Inserts the plan's quantizers in place: layers become twins, float keys stay as they are.

    Raises:
        UserError: if the model has quantizers already, or lacks a module that the plan names.
    """
    if any(isinstance(m, Quantizer) for m in model.modules()):
        raise UserError(f"{type(model).__name__} holds quantizers already; qat.remove(model) takes them out")
    modules = dict(model.named_modules())
    _check_fit(model, plan, modules)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    activations = {label: quantizers.create(spec).to(device) for label, spec in plan.activations.items()}
    weights = {name: _weight_quantizer(name, model, plan, spec) for name, spec in plan.weights.items()}
    for name, layer in plan.layers.items():
        module = modules[name]
        become_twin(module, _mixin(module))
        module.register_module("input_quantizer", chain(layer["input"], activations))
        module.register_module("weight_quantizer", weights.get(layer["weight"]))
        if name in plan.batch_norms:
            norm = modules[plan.batch_norms[name]]
            become_twin(norm, FoldingNorm)
            norm.host = (module,)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
            module.folds = True  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    insert_sites(plan, modules, activations, weights)


def _check_fit(model: nn.Module, plan: Plan, modules: dict[str, nn.Module]) -> None:
    """Raises before anything is changed."""
    other = "the quantization plan was made for another model"
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    needed = [(name, "module", list(modules)) for name in (*plan.layers, *plan.owners, *plan.batch_norms.values())]
    needed += [(site["parameter"], "parameter", parameters) for site in plan.parameters.values()]
    for name, what, known in needed:
        if name not in known:
            raise UserError(f"{other}: there is no {what} '{name}' in {type(model).__name__}{nearest(name, known)}")
    for name, layer in plan.layers.items():
        mixin = mixin_for(modules[name])
        if mixin is None or (layer["weight"] is not None and not has_weight(modules[name])):
            raise UserError(f"{other}: '{name}' is a {type(modules[name]).__name__} that cannot be quantized")


def _mixin(module: nn.Module) -> type[QuantizedLayer]:
    mixin = mixin_for(module)
    assert mixin is not None  # _check_fit has seen to it
    return mixin


def _weight_quantizer(name: str, model: nn.Module, plan: Plan, spec: QuantSpec) -> Quantizer:
    if site := plan.parameters.get(name):
        weight, axis = model.get_parameter(site["parameter"]), site["axis"]
        weight = rows(weight, site["stacked"]) if "stacked" in site else weight
    else:
        layer = model.get_submodule(name)
        weight, axis = layer.weight, _mixin(layer).channel_axis
    assert isinstance(weight, torch.Tensor) and axis is not None
    try:
        return quantizers.create(spec, weight.shape, axis).to(weight.device)
    except UserError as error:
        raise UserError(f"layer '{name}': {error}") from None


def remove(model: nn.Module) -> None:
    """Takes the quantizers out: the model is what it was before, with the weights it has now."""
    for module in list(model.modules()):
        if isinstance(module, TwinMixin):
            for child in [n for n, m in module.named_children() if isinstance(m, Site)]:
                delattr(module, child)
            if isinstance(module, SiteOwner):
                del module.site_order, module.site_kinds, module.site_weights, module.site_owner
            if isinstance(module, QuantizedLayer):
                del module.input_quantizer, module.weight_quantizer
                for name in ("_kept", "folds"):
                    module.__dict__.pop(name, None)
            if isinstance(module, FoldingNorm):
                del module.host
            for mixin in (QuantExperts, QuantizedLayer, SiteOwner, FoldingNorm):
                drop_mixins(module, mixin)


def named_quantizers(model: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """Every quantizer once, under its first name."""
    for name, module in model.named_modules():
        if isinstance(module, Quantizer):
            yield name, module
