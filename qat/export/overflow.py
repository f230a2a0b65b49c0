"""Sums that an engine's integers cannot hold, where training and evaluation have exact ones.

Integer kernels add the products of a layer in int32 and wrap around in silence; verification sees that for its own data
alone. With 8 bits on both sides it takes more than 66,000 terms. Before training, widths say whether it can happen at
all; of a converted model, its codes say whether some input does it. Some kernels add the first two products in int16,
which two products of 8 bits exceed already.
"""

from typing import Any

import torch
from torch import nn

from qat.export.verify import is_integer_layer
from qat.grid.spec import QuantSpec
from qat.integer import integer_bits
from qat.layers import mixin_for
from qat.layers.accumulator import ACCUMULATED_BITS, INT32_MAX, accumulates
from qat.layers.chain import last_grid
from qat.planning.plan import Plan, grids_of
from qat.quantizers import find

INT16_MAX = 2**15 - 1


def overflows(model: nn.Module, plan: Plan) -> list[str]:
    """The layers that may add up more than int32 holds, a line each.

    Args:
        model: With the plan's quantizers, or converted.
        plan: The plan.
    """
    found = []
    for name, layer in model.named_modules():
        if is_integer_layer(layer):
            largest, how = largest_sum(layer), "on some inputs its products add up"
        elif name in plan.layers:
            largest, how = _allowed_sum(name, layer, plan), "its products could add up"
        else:
            continue
        if largest > INT32_MAX:
            found.append(
                f"'{name}': {how} to {largest:,}, and integer kernels wrap around in silence beyond {INT32_MAX:,}; "
                "give it fewer bits, or split it into layers with fewer inputs"
            )
    return found


def saturation(plan: Plan, engine: str, remedy: str) -> list[str]:
    """What to know of an engine on x86 processors without VNNI, which add two products of uint8 and int8 in int16.

    Args:
        plan: The plan.
        engine: The engine's name, as its makers write it.
        remedy: What the user can do.

    Returns:
        A line, if some layer has products of which two could add up to more than int16 holds.
    """
    if not (wide := [name for name in plan.layers if _beyond_int16(plan, name)]):
        return []
    others = f" and {len(wide) - 1} more" if wide[1:] else ""
    return [
        f"'{wide[0]}'{others}: this processor has no VNNI, and there {engine} lets sums of 8-bit products saturate; "
        f"{remedy}"
    ]


def _beyond_int16(plan: Plan, name: str) -> bool:
    weight, inputs = grids_of(plan, name)
    if weight is None or len(inputs) != 1 or not (weight.integer and inputs[0][-1].integer):
        return False
    input = inputs[0][-1]
    widest = max(integer_bits(weight), integer_bits(input))
    return widest <= ACCUMULATED_BITS and 2 * _farthest(weight) * (input.quant_max - input.quant_min) > INT16_MAX


def largest_sum(layer: Any) -> int:
    """The largest sum, of either sign, that an input can give an integer layer: exact, but for padding."""
    grid, weight, bias = last_grid(layer.input_quantizer), layer.integer_weight, layer.integer_bias
    low, high = (code - int(grid.zero_point) for code in (grid.quant_min, grid.quant_max))
    levels = (weight.codes.short() - weight.spread(weight.zero_point).short()).flatten(1)
    up, down = (part.sum(1, dtype=torch.int64) for part in (levels.clamp_min(0), levels.clamp_max(0)))
    added = 0 if bias is None else bias.codes.long()
    return int(torch.maximum(high * up + low * down + added, -(low * up + high * down + added)).max())


def _allowed_sum(name: str, layer: Any, plan: Plan) -> int:
    """The largest sum that the widths of a layer's grids allow; 0 if no int32 adds it up."""
    (weight, inputs), mixin = grids_of(plan, name), mixin_for(layer)
    if weight is None or len(inputs) != 1 or mixin is None or mixin.channel_axis != 0:
        return 0
    input = inputs[0][-1]
    if not accumulates(input, weight, static=find(input.quantizer).static and find(weight.quantizer).static):
        return 0
    return layer.weight[0].numel() * _farthest(weight) * _farthest(input)


def _farthest(spec: QuantSpec) -> int:
    """The largest distance of a code from the zero point, wherever an affine grid has it."""
    return max(-spec.quant_min, spec.quant_max) if spec.symmetric else spec.quant_max - spec.quant_min
