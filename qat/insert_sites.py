"""Insertion of functional sites: owners get their twins, and below them one `Site` for each quantized call."""

from typing import Any

from torch import nn

from qat.layers import Site, become_twin, owner_mixin
from qat.layers.chain import chain
from qat.layers.experts import QuantExperts
from qat.planning.functions import EXPERTS, PROBABILITIES
from qat.planning.plan import OUTPUTS, Plan, kind_of, owner_of
from qat.quantizers import Quantizer


def insert_sites(
    plan: Plan, modules: dict[str, nn.Module], activations: dict[str, Quantizer], weights: dict[str, Quantizer]
) -> None:
    """Carries out `owners`, `sites` and `parameters` of a plan.

    Args:
        plan: Its names fit the model.
        modules: The model's, by path.
        activations, weights: The quantizers by label.
    """
    holders: dict[str, list[tuple[nn.Module, str]]] = {}
    for site, weight in plan.parameters.items():
        holders.setdefault(owner_of(site), []).append(_holder(modules, weight.parameter))
    for name, order in plan.owners.items():
        owner: Any = modules[name]
        become_twin(owner, owner_mixin(owner))
        counted = [kind for kind in order if kind != EXPERTS]
        owner.site_order, owner.site_kinds, owner.site_owner = counted, frozenset(counted), name
        if EXPERTS in order:
            become_twin(owner, QuantExperts)
        owner.site_weights = tuple(holders.get(name, ()))
    sites = (*plan.sites, *(site for site, weight in plan.parameters.items() if weight.weight is not None))
    for name in dict.fromkeys(site.removesuffix(f".{PROBABILITIES}") for site in sites):
        modules[owner_of(name)].add_module(name.rpartition(".")[2], _site(name, plan, modules, activations, weights))


def _site(
    name: str,
    plan: Plan,
    modules: dict[str, nn.Module],
    activations: dict[str, Quantizer],
    weights: dict[str, Quantizer],
) -> Site:
    weight, (between,) = plan.parameters.get(name), plan.sites.get(f"{name}.{PROBABILITIES}", [[]])
    holder = _holder(modules, weight.parameter) if weight else None
    float_operands = [[]] * (2 if weight else 3)  # only its weight, or only its probabilities are quantized
    return Site(
        [chain([activations[label] for label in labels]) for labels in plan.sites.get(name, float_operands)],
        output=kind_of(name) in OUTPUTS,
        probabilities=chain([activations[label] for label in between]),
        weight=weights[weight.weight] if weight and weight.weight is not None else None,
        parameter=holder,
        stacked=weight.stacked if weight else None,
        output_axis=1 - getattr(*holder).ndim if holder and kind_of(name).startswith("conv") else -1,
    )


def _holder(modules: dict[str, nn.Module], parameter: str) -> tuple[nn.Module, str]:
    path, _, name = parameter.rpartition(".")
    return modules[path], name
