"""Conversion: a trained fake-quantized model becomes one whose weights *are* integers.

Codes come from `Quantizer.quantize`, as in training. A BatchNorm behind a layer folds exactly: it multiplies the scale
of each output channel by gamma / sqrt(var + eps) and moves the rest into the bias; the codes stay, mirrored where
gamma is negative. Biases become int32 at the accumulator's scale s_x * s_w, as integer kernels add them (Jacob et al.,
CVPR 2018, section 2.4): the only rounding that conversion adds, of at most half an accumulator step.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qat.convert_sites import convert_sites, give_up_parameters
from qat.copies import copied
from qat.errors import UserError
from qat.grid.formats import FLOATS, round_midrise
from qat.integer import IntegerActivation, IntegerLayer, IntegerTensor, integer_bits, integer_tensor
from qat.layers import QuantizedLayer, TwinMixin, become_twin, drop_mixins, is_computed, mixin_for, original_class
from qat.layers.accumulator import accumulator_scale, bias_codes, folded
from qat.layers.adapted import adapted
from qat.layers.computed import make_ordinary
from qat.planning.plan import Plan
from qat.quantizers import Quantizer, find


@dataclass(frozen=True)
class Holds:
    """Abilities of a file format beyond integers.

    Attributes:
        floats: The floating-point formats of codes.
        blocks: Whether scales of blocks are stored, and activations may be measured as they pass.
    """

    floats: tuple[str, ...] = ()
    blocks: bool = False


INTEGERS, EVERYTHING = Holds(), Holds(tuple(FLOATS), blocks=True)


def conversion_refusal(plan: Plan, holds: Holds = INTEGERS) -> str | None:
    """Why what the plan makes has no form in codes that a file holds; `None` if it has one."""
    if experts := next((name for name, site in plan.parameters.items() if site.stacked), None):
        return f"'{experts}' is a product of experts, which has no integer file"
    named = [(f"weight of '{n}'", s) for n, s in plan.weights.items()]
    for name, spec in [*named, *((f"'{n}'", s) for n, s in plan.activations.items())]:
        cls = find(spec.quantizer)
        if not spec.integer and spec.format not in holds.floats:
            elsewhere = "packed has its numbers, and export=compressed_tensors for models of transformers"
            return f"{name} is {spec.short}: format={spec.format} has no integers ({elsewhere})"
        if integer_bits(spec) > 16:
            return f"{name} is {spec.short}: integer files hold at most 16 bits"
        if spec.rounding is round_midrise and name.startswith("'"):
            return f"{name} is {spec.short}: runtimes round activations to whole numbers, and it has odd ones only"
        if spec.scale in ("e8m0", "e4m3") and not holds.blocks:
            return f"{name} is {spec.short}: scale={spec.scale} belongs to block formats, which no integer file has"
        if not cls.uniform:
            return f"{name} has quantizer={spec.quantizer}, whose thresholds are no equal steps"
        if not cls.static and not (holds.blocks and name.startswith("'")):
            return f"{name} has quantizer={spec.quantizer}, whose scale is measured as it passes and is in no file"
    return None


def what_holds(plan: Plan) -> str:
    """The value of `export` for a plan that some format has no codes for."""
    return "packed" if conversion_refusal(plan, EVERYTHING) is None else "none"


def is_converted(model: nn.Module) -> bool:
    """Whether a model holds integers already."""
    return any(isinstance(m, IntegerTensor | IntegerActivation) for m in model.modules())


@torch.no_grad()
def convert(model: nn.Module, plan: Plan, holds: Holds = INTEGERS) -> nn.Module:
    """Returns the integer form of a calibrated model; the model itself is left as it is.

    Args:
        model: A model with quantizers, on any device.
        plan: The plan its quantizers were made from.
        holds: What else than integers may come out.

    Returns:
        A copy in evaluation mode on the CPU, its quantized weights held as codes (`IntegerTensor`) and its activation
        grids frozen.

    Raises:
        UserError: if it is converted already, a grid was never calibrated, adapters are not merged, or a full-range
            8-bit weight cannot be mirrored for a negative gamma.
    """
    if reason := conversion_refusal(plan, holds):
        raise UserError(f"there is no integer form of it: {reason}; use export={what_holds(plan)}")
    if is_converted(model):
        raise UserError(f"{original_class(model).__name__} is converted already: its weights are integers")
    if name := next(iter(adapted(model)), None):
        raise UserError(
            f"'{name}' holds an adapter that trains in float beside its quantized layer: merge first, with "
            "qat.merge_adapters(model)"
        )
    for name, module in model.named_modules():
        if isinstance(module, Quantizer) and module.enabled and not module.initialised:
            raise UserError(f"'{name}' was never calibrated, so there is nothing to convert yet")
    converted = copied(model).cpu().eval()
    modules = dict(converted.named_modules())
    shared: dict[Any, IntegerTensor] = {}
    parameters = convert_sites(modules, plan, shared)
    for name in plan.layers:
        module = modules[name]
        if not isinstance(module, QuantizedLayer):
            raise UserError(
                f"'{name}' has no quantizers any more; qat.remove(model) before the whole model is quantized anew"
            )
        quantizer = module.weight_quantizer
        if quantizer is not None and quantizer.enabled:
            norm = modules[plan.batch_norms[name]] if name in plan.batch_norms else None
            tied = quantizer if norm is None and not is_computed(module) else name
            weight = shared.setdefault(tied, integer_tensor(module.weight, quantizer))
            left = module.weight if plan.layers[name].read else None
            _install(name, module, weight, norm)
            if left is not None:
                module.weight = left
    give_up_parameters(converted, plan, parameters)
    _freeze_activations(converted)
    return converted


def _install(name: str, module: Any, weight: IntegerTensor, norm: nn.Module | None) -> None:
    """Puts codes in the place of a layer's weight, and of its bias where its accumulator has one scale."""
    bias, scale = getattr(module, "bias", None), accumulator_scale(module)
    module.computes_in = module.weight.dtype
    if norm is not None:
        factor, bias = folded(norm, bias)  # pyright: ignore[reportArgumentType]
        kept = _fold(name, module, weight, factor)
        scale = None if scale is None else scale * kept
        _vanish(norm)
    if is_computed(module):
        make_ordinary(module, mixin_for(module))  # pyright: ignore[reportArgumentType]
    del module.weight_quantizer
    module.release()
    module.integer_weight, module.integer_bias = weight, None
    module.bias = None if bias is None else nn.Parameter(bias.detach().to(module.computes_in), requires_grad=False)
    if bias is not None and scale is not None:
        codes, axis = bias_codes(bias, scale).to(torch.int32), None if len(scale) == 1 else 0
        module.integer_bias = IntegerTensor(codes, scale.float(), torch.zeros_like(scale), 32, axis)
        module.bias = None
    become_twin(module, IntegerLayer)


def _fold(name: str, layer: Any, weight: IntegerTensor, factor: Tensor) -> Tensor:
    """Multiplies a BatchNorm's `factor` per output channel into the weight's scale in place; returns what the scale was
    multiplied with.
    """
    if weight.group_size is None:
        _one_scale_per_output(layer, weight)
    elif layer.channel_axis == 1 and len(weight.scale) % layer.groups:
        raise UserError(
            f"'{name}': its {layer.groups} groups of channels do not consist of whole groups of {weight.group_size} "
            "weights, so the BatchNorm behind it cannot fold; use granularity: channel"
        )
    if (factor < 0).any():
        _mirror(name, weight, *(_along_outputs(layer, factor < 0, t) for t in (weight.codes, weight.scale)))
    # A channel with gamma = 0 is constant: its codes are zero, and any positive scale will do.
    dead = _along_outputs(layer, factor == 0, weight.codes)
    weight.codes = torch.where(dead, weight.spread(weight.zero_point), weight.codes)
    kept = torch.where(factor == 0, 1, factor.abs())
    weight.scale = (weight.scale.double() * _along_outputs(layer, kept, weight.scale)).float()
    return kept


def _one_scale_per_output(layer: Any, weight: IntegerTensor) -> None:
    """Gives every output channel a scale of its own. In a transposed convolution with groups these are blocks of the
    weight `[in, out / groups, ...]`: one group's inputs, one column.
    """
    outputs = weight.codes.shape[layer.channel_axis]
    scale, zero = (t.expand(outputs) for t in (weight.scale, weight.zero_point))
    groups = layer.groups if layer.channel_axis == 1 else 1
    if groups == 1:
        weight.scale, weight.zero_point, weight.axis = scale.contiguous(), zero.contiguous(), layer.channel_axis
        return
    shape = (groups, *weight.codes.shape[1:])
    blocks = (t.view(1, -1, *[1] * (len(shape) - 2)).expand(shape).contiguous() for t in (scale, zero))
    weight.scale, weight.zero_point = blocks
    weight.axis, weight.group_size = 0, len(weight.codes) // groups


def _along_outputs(layer: Any, values: Tensor, like: Tensor) -> Tensor:
    """One value per output channel, so that it broadcasts against `like`: a weight, or scales of one."""
    if like.ndim == 1:
        return values
    if layer.channel_axis == 0:
        return values.view(-1, *[1] * (like.ndim - 1))
    groups = layer.groups
    return values.view(groups, -1, *[1] * (like.ndim - 2)).repeat_interleave(len(like) // groups, 0)


def _mirror(name: str, weight: IntegerTensor, codes: Tensor, scales: Tensor) -> None:
    """Negates the values of the channels that the masks `codes` and `scales` name, by their codes."""
    if weight.number is not None:
        weight.codes = torch.where(codes, weight.codes ^ 2 ** (weight.bits - 1), weight.codes)
        return
    if weight.codes.dtype in (torch.uint8, torch.int32):
        top = 2**weight.bits - 1
        weight.codes = torch.where(codes, top - weight.codes, weight.codes)
        weight.zero_point = torch.where(scales, top - weight.zero_point, weight.zero_point)
        return
    kind = weight.codes.dtype
    mirrored = torch.where(codes, -weight.codes.to(torch.int32), weight.codes)
    if mirrored.max() >= 2 ** (weight.bits - 1):
        if weight.bits == torch.iinfo(kind).bits:
            raise UserError(
                f"'{name}': code {torch.iinfo(kind).min} cannot be mirrored for a BatchNorm with a negative gamma; "
                "train it with narrow: true"
            )
        weight.bits += 1
    weight.codes = mirrored.to(kind)


def _vanish(norm: nn.Module) -> None:
    """Makes a folded BatchNorm an identity where it is, for everybody who holds it under whatever name."""
    norm.undo_twin()  # pyright: ignore[reportCallIssue]
    drop_mixins(norm, TwinMixin)
    for name in [*norm._parameters, *norm._buffers]:
        delattr(norm, name)
    norm.__class__ = nn.Identity


def _freeze_activations(model: nn.Module) -> None:
    frozen: dict[Quantizer, nn.Module] = {}
    for module in list(model.modules()):
        for child, quantizer in list(module._modules.items()):
            if isinstance(quantizer, Quantizer):
                if quantizer not in frozen:
                    frozen[quantizer] = _frozen(quantizer)
                module._modules[child] = frozen[quantizer]


def _frozen(quantizer: Quantizer) -> nn.Module:
    if not quantizer.enabled:
        return nn.Identity()
    return IntegerActivation(quantizer) if quantizer.static else quantizer
