"""Conversion: a trained fake-quantized model becomes one whose weights *are* integers.

Codes come from `Quantizer.quantize`, as in training. A BatchNorm behind a layer folds exactly: it multiplies the scale
of each output channel by gamma / sqrt(var + eps) and moves the rest into the bias; the codes stay, mirrored where
gamma is negative. Biases become int32 at the accumulator's scale s_x * s_w, as integer kernels add them (Jacob et al.,
CVPR 2018, section 2.4): the only rounding that conversion adds, of at most half an accumulator step.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import UserError
from qat.formats import round_midrise
from qat.functions import PROBABILITIES
from qat.insert import Plan
from qat.integer import IntegerActivation, IntegerLayer, IntegerTensor
from qat.layers import QuantizedLayer, Site, become_twin
from qat.layers.accumulator import bias_codes, folded, input_grid
from qat.plan import kind_of
from qat.quantizers import Quantizer, find
from qat.spec import QuantSpec


def storage_bits(spec: QuantSpec) -> int:
    """Bits of the integers that stand for a grid's levels: odd numbers -(2^b - 1) .. 2^b - 1 take one more than b."""
    return spec.width + (spec.rounding is round_midrise)


def inconvertible(plan: Plan) -> str | None:
    """Why there is no integer form of what the plan makes; `None` if there is one."""
    if experts := next((name for name, site in plan.parameters.items() if "stacked" in site), None):
        return f"'{experts}' is a product of experts, which has no integer file"
    named = [(f"weight of '{n}'", s) for n, s in plan.weights.items()]
    for name, spec in [*named, *((f"'{n}'", s) for n, s in plan.activations.items())]:
        cls = find(spec.quantizer)
        if not spec.integer:
            return f"{name} is {spec.short}: format={spec.format} has no integers"
        if storage_bits(spec) > 8:
            return f"{name} is {spec.short}: integer files hold at most 8 bits"
        if spec.rounding is round_midrise and name.startswith("'"):
            return f"{name} is {spec.short}: runtimes round activations to whole numbers, and it has odd ones only"
        if spec.scale in ("e8m0", "e4m3"):
            return f"{name} is {spec.short}: scale={spec.scale} belongs to block formats, which no integer file has"
        if not cls.uniform:
            return f"{name} has quantizer={spec.quantizer}, whose thresholds are no equal steps"
        if not cls.static:
            return f"{name} has quantizer={spec.quantizer}, whose scale is measured as it passes and cannot be stored"
    return None


@torch.no_grad()
def convert(model: nn.Module, plan: Plan) -> nn.Module:
    """Returns the integer form of a calibrated model; the model itself is left as it is.

    Args:
        model: A model with quantizers, on any device.
        plan: The plan its quantizers were made from.

    Returns:
        A copy in evaluation mode on the CPU, its quantized weights held as codes (`IntegerTensor`) and its activation
        grids frozen.

    Raises:
        UserError: if a grid was never calibrated, or a full-range 8-bit weight cannot be mirrored for a negative gamma.
    """
    if reason := inconvertible(plan):
        raise UserError(f"there is no integer form of it: {reason}; use export=none")
    for name, module in model.named_modules():
        if isinstance(module, Quantizer) and module.enabled and not module.initialised:
            raise UserError(f"'{name}' was never calibrated, so there is nothing to convert yet")
    converted = copy.deepcopy(model).cpu().eval()
    modules = dict(converted.named_modules())
    parameters = _convert_sites(modules, plan)
    for name in plan.layers:
        module = modules[name]
        assert isinstance(module, QuantizedLayer)
        quantizer = module.weight_quantizer
        if quantizer is not None and quantizer.enabled:
            weight = _integer_weight(module, quantizer)
            bias = module._parameters.get("bias")
            if name in plan.batch_norms:
                bias = _fold(name, weight, bias, modules[plan.batch_norms[name]])
                _replace(converted, plan.batch_norms[name], nn.Identity())
            _install(module, weight, bias)
    _give_up_parameters(converted, plan, parameters)
    _freeze_activations(converted)
    return converted


def _convert_sites(modules: dict[str, nn.Module], plan: Plan) -> dict[str, nn.Parameter]:
    """Gives functional sites integer weights, and fused functions the products that integer kernels compute.

    Returns:
        The parameters that became integers, by path.
    """
    for name in dict.fromkeys(site.removesuffix(f".{PROBABILITIES}") for site in plan.sites):
        modules[name].explicit = kind_of(name) in ("attention", "matmul")  # pyright: ignore[reportArgumentType]
    parameters = {}
    for name, described in plan.parameters.items():
        site = modules.get(name)
        if isinstance(site, Site) and site.weight_quantizer is not None and site.weight_quantizer.enabled:
            parameters[described["parameter"]] = site.weight
            integer: Any = site
            integer.integer_weight, integer.integer_bias = _integer_weight(site, site.weight_quantizer), None
            del integer.weight_quantizer
            become_twin(site, IntegerLayer)
    return parameters


def _give_up_parameters(model: nn.Module, plan: Plan, parameters: dict[str, nn.Parameter]) -> None:
    """Drops the float originals of the integer weights of sites, once tied layers are converted, too.

    The caller of the function still names them, so a tensor without memory stays in their place; they stay themselves
    where others read them.
    """
    float_readers = {d["parameter"] for d in plan.parameters.values() if d["weight"] is None or not d["alone"]}
    for path, parameter in parameters.items():
        owner, _, name = path.rpartition(".")
        module = model.get_submodule(owner)
        module._parameters.pop(name, None)
        left = (
            torch.zeros((), dtype=parameter.dtype).expand(parameter.shape) if path not in float_readers else parameter
        )
        setattr(module, name, left)


def _integer_weight(module: QuantizedLayer | Site, quantizer: Quantizer) -> IntegerTensor:
    weight, spec = module.weight, quantizer.spec
    axis = {"tensor": None, "channel": quantizer.axis, "group": 1 - quantizer.axis}[spec.granularity]
    return IntegerTensor(
        quantizer.quantize(weight),
        quantizer.step(),
        quantizer.zero_point.detach().clone(),
        storage_bits(spec),
        axis,
        spec.group_size,
    )


def _fold(name: str, weight: IntegerTensor, bias: Tensor | None, norm: nn.Module) -> Tensor:
    """Multiplies the BatchNorm into the weight's scale in place; returns the bias of both. Float64, rounded once at
    the end."""
    factor, both = folded(norm, bias)  # pyright: ignore[reportArgumentType]
    if weight.group_size is None and weight.axis is None:
        weight.scale, weight.zero_point, weight.axis = (
            weight.scale.repeat(len(factor)),
            weight.zero_point.repeat(len(factor)),
            0,
        )
    mirror, dead = factor < 0, factor == 0
    if mirror.any():
        _mirror(name, weight, mirror)
    # A channel with gamma = 0 is constant: its codes are zero, and any positive scale will do.
    weight.codes[dead] = weight.spread(weight.zero_point).expand_as(weight.codes)[dead]
    factor = torch.where(dead, 1, factor.abs())
    weight.scale = (weight.scale.double() * factor.view(-1, *[1] * (weight.scale.ndim - 1))).float()
    return both


def _mirror(name: str, weight: IntegerTensor, channels: Tensor) -> None:
    """Negates the values of `channels` by their codes."""
    if weight.codes.dtype == torch.uint8:
        top = 2**weight.bits - 1
        weight.codes[channels] = top - weight.codes[channels]
        weight.zero_point[channels] = top - weight.zero_point[channels]
        return
    codes = weight.codes[channels].to(torch.int16).neg()
    if codes.max() >= 2 ** (weight.bits - 1):
        if weight.bits == 8:
            raise UserError(
                f"'{name}': code -128 cannot be mirrored for a BatchNorm with a negative gamma; "
                "train it with narrow: true"
            )
        weight.bits += 1
    weight.codes[channels] = codes.to(torch.int8)


def _install(module: Any, weight: IntegerTensor, bias: Tensor | None) -> None:
    del module.weight, module.weight_quantizer
    module._parameters.pop("bias", None)
    module.integer_weight, module.integer_bias = weight, None
    module.bias = None if bias is None else nn.Parameter(bias.detach().float(), requires_grad=False)
    grid = input_grid(module.input_quantizer)
    if bias is not None and grid is not None and weight.group_size is None:
        scale = grid.step().double() * weight.scale.double()
        codes, axis = bias_codes(bias, scale).to(torch.int32), None if weight.axis is None else 0
        module.integer_bias = IntegerTensor(codes, scale.float(), torch.zeros_like(scale), 32, axis)
        module.bias = None
    become_twin(module, IntegerLayer)


def _freeze_activations(model: nn.Module) -> None:
    frozen: dict[Quantizer, nn.Module] = {}
    for module in list(model.modules()):
        for child, quantizer in list(module._modules.items()):
            if isinstance(quantizer, Quantizer):
                if quantizer not in frozen:
                    frozen[quantizer] = IntegerActivation(quantizer) if quantizer.enabled else nn.Identity()
                module._modules[child] = frozen[quantizer]


def _replace(root: nn.Module, path: str, module: nn.Module) -> None:
    owner, _, leaf = path.rpartition(".")
    root.get_submodule(owner)._modules[leaf] = module
