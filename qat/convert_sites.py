"""Conversion of functional sites: parameters that they read become integers, fused functions the products that integer
kernels compute.
"""

from typing import Any

import torch
from torch import nn

from qat.integer import IntegerLayer, IntegerTensor, integer_tensor
from qat.layers import Site, become_twin
from qat.layers.chain import in_turn
from qat.planning.functions import PROBABILITIES
from qat.planning.plan import Plan, SiteOperand, kind_of
from qat.quantizers import Quantizer


def convert_sites(
    modules: dict[str, nn.Module], plan: Plan, shared: dict[Any, IntegerTensor]
) -> dict[str, nn.Parameter]:
    """Gives functional sites integer weights, and fused functions the products that integer kernels compute.

    Returns:
        The parameters that became integers for all sites that read them, by path.
    """
    for name in dict.fromkeys(site.removesuffix(f".{PROBABILITIES}") for site in plan.sites):
        modules[name].explicit = kind_of(name) in ("attention", "matmul")  # pyright: ignore[reportArgumentType]
    parameters, left_float = {}, set()
    for name, weight in plan.parameters.items():
        site = modules.get(name)
        if isinstance(site, Site) and site.weight_quantizer is not None and site.weight_quantizer.enabled:
            parameters[weight.parameter] = site.weight
            codes = shared.setdefault(site.weight_quantizer, integer_tensor(site.weight, site.weight_quantizer))
            del site.weight_quantizer
            _become_integer(site, codes, site.weight.dtype)
    for name, operand in plan.operands.items():
        parameter, codes = _operand(modules, name, operand, shared)
        if codes is None:
            left_float.add(operand.parameter)
        else:
            parameters[operand.parameter] = parameter
            site: Any = modules[name]
            site.weight_index, site._modules[site.operands[operand.index]] = operand.index, None
            _become_integer(site, codes, parameter.dtype)
    return {path: parameter for path, parameter in parameters.items() if path not in left_float}


def _operand(
    modules: dict[str, nn.Module], name: str, operand: SiteOperand, shared: dict[Any, IntegerTensor]
) -> tuple[nn.Parameter, IntegerTensor | None]:
    """A parameter that a site reads as any other tensor, and its codes, unless its grid is off or not of one scale."""
    path, _, leaf = operand.parameter.rpartition(".")
    parameter: Any = modules[path]._parameters[leaf]
    *finer, last = in_turn(modules[name]._modules[f"input_quantizer_{operand.index}"])
    assert isinstance(last, Quantizer)
    if not (last.enabled and last.static and last.spec.granularity == "tensor"):
        return parameter, None
    values = parameter
    for grid in finer:
        values = grid(values)
    return parameter, shared.setdefault((last, operand.parameter), _signed(integer_tensor(values, last)))


def _signed(tensor: IntegerTensor) -> IntegerTensor:
    """`tensor` with the same values and signed codes: half of their range is taken from unsigned codes and their zero
    point.
    """
    if tensor.number is None and tensor.codes.dtype in (torch.uint8, torch.int32):
        kind = torch.int8 if tensor.bits <= 8 else torch.int16
        half = 2 ** (tensor.bits - 1)
        tensor.codes, tensor.zero_point = ((codes.int() - half).to(kind) for codes in (tensor.codes, tensor.zero_point))
    return tensor


def _become_integer(site: Any, codes: IntegerTensor, dtype: torch.dtype) -> None:
    site.computes_in, site.integer_weight, site.integer_bias = dtype, codes, None
    become_twin(site, IntegerLayer)


def give_up_parameters(model: nn.Module, plan: Plan, parameters: dict[str, nn.Parameter]) -> None:
    """Drops the float originals of the integer weights of sites, once tied layers are converted, too.

    The caller of the function still names them, so a tensor without memory stays in their place; they stay themselves
    where others read them.
    """
    float_readers = {w.parameter for w in plan.parameters.values() if w.weight is None or not w.alone}
    float_readers |= {o.parameter for o in plan.operands.values() if not o.alone}
    floating = (model.get_submodule(name) for name, layer in plan.layers.items() if layer.weight is None)
    in_layers = {id(p) for module in floating for p in module.parameters(recurse=False)}
    for path, parameter in parameters.items():
        owner, _, name = path.rpartition(".")
        module = model.get_submodule(owner)
        module._parameters.pop(name, None)
        needed = path in float_readers or id(parameter) in in_layers
        left = parameter if needed else torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
        setattr(module, name, left)
