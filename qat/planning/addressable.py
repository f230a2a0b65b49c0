"""Places that a rule can match in a model: its layers, the parts of layers with several weights, and the functional
sites that one recorded forward pass found.
"""

import dataclasses
from typing import Any

from torch import nn

from qat.errors import UserError
from qat.layers import BoundPart, Composite, QuantizedLayer, is_computed, mixin_for, original_class
from qat.layers.adapted import inside_adapters
from qat.planning.functions import ELEMENTWISE, FUNCTIONS, KV_CACHE, MEAN, PROBABILITIES
from qat.planning.recording import Call, Recording
from qat.policies.rules import Place

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def is_leaf(module: nn.Module) -> bool:
    return mixin_for(module) is not None or is_norm(module)


def is_norm(module: Any) -> bool:
    """Whether it is a BatchNorm, of whatever dimension, that does nothing else; some subclasses also activate."""
    return isinstance(module, nn.Module) and original_class(module).forward is nn.BatchNorm2d.forward


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


def places(model: nn.Module, recording: Recording) -> dict[str, list[Call]]:
    """Layers and sites that a policy can address, in execution order, each with its calls."""
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
    DETR's learned queries), masks that are added (nothing between a product and its softmax has a grid, either, where
    they are filled in), and parameters that are no weights of a product but vectors: one value for each channel, a
    bias or the scale of a norm, is for the accumulator of the layer before it, or stays in float with the norm.
    """
    pixels = call.input_shape[:2] == call.shape[:2] and call.shape[2:] in ((), (1, 1))
    if call.what in MEAN and not pixels:
        return False
    if call.constant and not call.weight and call.kind != "attention":
        return False
    if call.infinite:
        return False
    alike = call.kind in ("cat", "attention") or (call.kind in ELEMENTWISE and not call.vector)
    return call.weight or call.parameter is None or alike


def _probabilities(call: Call) -> Call:
    """The tensor between the two products of an attention, as a place: it is >= 0 and nobody else reads it."""
    key = (-id(call), 0)  # ids are positive, so it is no tensor's
    return dataclasses.replace(call, site=f"{call.site}.{PROBABILITIES}", kind=PROBABILITIES, operands=[key])


def described(calls: dict[str, list[Call]]) -> list[Place]:
    """The places as a policy sees them; layers may have become twins since."""
    return [
        Place(
            name,
            first.kind or type_of(first.what).__name__,
            first.weight or has_weight(first.what),
            is_site=first.site is not None,
        )
        for name, (first, *_) in calls.items()
    ]


def summed_axis(call: Call) -> int:
    """Which axis of its first input a layer or a product sums over (a convolution over channels, and pixels beside),
    counted from the end; the last of what does not multiply.
    """
    if isinstance(call.what, nn.Module):
        mixin = mixin_for(call.what)
        return mixin.output_axis if mixin is not None and issubclass(mixin, QuantizedLayer) else -1
    return FUNCTIONS[call.what].summed if call.what in FUNCTIONS else -1


def type_of(module: nn.Module) -> type[nn.Module]:
    """The float class of a layer; parts go by that of the layer they are in."""
    return original_class(module.owner[0] if isinstance(module, BoundPart) else module)


def check_shapes_known(model: nn.Module) -> None:
    """Raises if a lazy layer has not seen a batch yet."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():  # pyright: ignore
            raise UserError(
                f"'{name}' ({type(module).__name__}) does not know its shape yet, because no batch has reached it: "
                "run the model once on a batch first, or give it the number of its input features"
            )
