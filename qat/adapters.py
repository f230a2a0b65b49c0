"""Adapters of `peft` (LoRA, Hu et al. 2022) on quantized layers: the frozen base weight is on its grid, the adapter
beside it trains in float, and conversion takes both as one weight.

    training      y = FQ(W) x + s B A x
    merged        y = FQ(W + s B A) x

The two differ by a rounding: the adapter's part joins the grid only when it is merged. `merge_adapters` fits the grid
to the merged weight and leaves the plain quantized layer in the place of peft's; measure the model again behind it.
"""

import copy
from typing import Any

import torch
from torch import nn

from qat.errors import UserError
from qat.insert import plan_of, remember
from qat.layers import QuantizedLayer
from qat.layers.adapted import adapted
from qat.planning.plan import Plan, PlannedLayer


@torch.no_grad()
def merge_adapters(model: nn.Module, plan: Plan | None = None) -> Plan:
    """Adds every adapter to its base weight in place, and puts the base layer where peft's stood.

    Args:
        model: A quantized model with adapters of peft.
        plan: The plan its quantizers were made from; by default the one that it remembers.

    Returns:
        The plan of the model as it is now, which it remembers: `fc.base_layer` has become `fc`.

    Raises:
        UserError: if there is no adapter, or one that has no merged form.
    """
    found = adapted(model)
    if not found:
        raise UserError(f"{type(model).__name__} has no adapters of peft to merge")
    plan = plan or plan_of(model)
    for name, layer in found.items():
        if not hasattr(layer, "merge"):
            raise UserError(f"'{name}' ({type(layer).__name__}) cannot be merged: peft has no merged form of it")
    for name, layer in found.items():
        layer.merge()
        base, (owner, _, leaf) = layer.base_layer, name.rpartition(".")
        if isinstance(base, QuantizedLayer) and base.weight_quantizer is not None:
            base.weight_quantizer.calibrate(base.weight)
        setattr(model.get_submodule(owner), leaf, base)
    merged = _renamed(plan, set(found))
    remember(model, merged)
    return merged


def _renamed(plan: Plan, merged: set[str]) -> Plan:
    def new(name: str) -> str:
        for prefix in merged:
            if name == f"{prefix}.base_layer" or name.startswith(f"{prefix}.base_layer."):
                return prefix + name.removeprefix(f"{prefix}.base_layer")
        return name

    def renamed(value: Any) -> Any:
        if isinstance(value, str):
            return new(value)
        return [renamed(v) for v in value] if isinstance(value, list) else value

    result = copy.deepcopy(plan)
    result.weights = {new(n): spec for n, spec in plan.weights.items()}
    result.activations = {new(n): spec for n, spec in plan.activations.items()}
    result.layers = {
        new(n): PlannedLayer(**{k: renamed(v) for k, v in vars(layer).items()}) for n, layer in plan.layers.items()
    }
    result.sites = {new(n): renamed(chains) for n, chains in plan.sites.items()}
    result.owners = {new(n): counts for n, counts in plan.owners.items() if n not in merged}
    result.batch_norms = {new(n): norm for n, norm in plan.batch_norms.items()}
    return result
