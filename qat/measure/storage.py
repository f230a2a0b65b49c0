"""Bytes that a packed file will store of each layer, before there is one (see `qat.export.packed`).

    codes     ceil(weights x bits / 8), ternary ones ceil(weights / 5)
    scales    4 bytes each (2 of float16, 1 of pow2, e8m0 and e4m3, unless a BatchNorm folds into them), and of
              integers one for the zero point (of more than 8 bits two, or four if it is affine)
    biases    12 bytes each (int32 code, scale, zero point), or 4 in float

A parameter that is added or multiplied elementwise has codes and one scale, too.

What no layer owns comes on top in the file: 8 bytes for each activation grid, and the header that names the tensors.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from qat.grid.formats import round_midrise
from qat.grid.spec import QuantSpec
from qat.integer import integer_bits
from qat.layers import mixin_for
from qat.layers.accumulator import accumulates
from qat.measure.cost import code_bytes, trit_bytes
from qat.planning.audit import AuditRow
from qat.planning.plan import Plan, operand_spec
from qat.quantizers import find

FLOAT_BYTES = 4
SCALE_BYTES = {"float16": 2, "pow2": 1, "e8m0": 1, "e4m3": 1}


def with_bytes(rows: Sequence[AuditRow], model: nn.Module, plan: Plan) -> list[AuditRow]:
    """The rows of an audit with their packed bytes filled in."""
    return [dataclasses.replace(row, bytes=_row_bytes(row, model, plan)) for row in rows]


def _row_bytes(row: AuditRow, model: nn.Module, plan: Plan) -> int:
    if row.folds:
        return 0
    if row.name in plan.layers:
        owner = plan.layers[row.name].weight
        if owner is not None and not is_layer(model, row.name):
            return _code_bytes(row.params, plan.weights[owner], plan.weights[owner].width)
        if owner is not None:
            return layer_bytes(model, plan, row.name, plan.weights[owner])
        return FLOAT_BYTES * row.params
    if row.name in plan.operands and row.params:
        spec = operand_spec(plan, row.name)
        codes = _code_bytes(row.params, spec, spec.width) + SCALE_BYTES.get(spec.scale, FLOAT_BYTES) + _zero_bytes(spec)
        return codes + (0 if plan.operands[row.name].alone else FLOAT_BYTES * row.params)
    module = dict(model.named_modules()).get(row.name)
    kept = () if module is None or not isinstance(module, nn.modules.batchnorm._NormBase) else module.buffers(False)
    return FLOAT_BYTES * row.params + sum(b.numel() * b.element_size() for b in kept)


def is_layer(model: nn.Module, name: str) -> bool:
    """Whether a name of a plan is that of a module with a weight of its own, and not of one weight of several."""
    module = dict(model.named_modules()).get(name)
    return isinstance(getattr(module, "weight", None), Tensor)


def layer_bytes(model: nn.Module, plan: Plan, name: str, spec: QuantSpec) -> int:
    """Packed bytes of the layer `name` of the plan if its weight has the grid `spec`.

    Of one that shares its weight with an earlier layer, those of its own bias.
    """
    layer: Any = model.get_submodule(name)
    channels = _channels(layer)
    if spec.granularity == "group":
        scales = layer.weight.numel() // (spec.group_size or 1)
    else:
        scales = channels if spec.granularity == "channel" or name in plan.batch_norms else 1
    scale_bytes = FLOAT_BYTES if name in plan.batch_norms else SCALE_BYTES.get(spec.scale, FLOAT_BYTES)
    codes = _code_bytes(layer.weight.numel(), spec, packed_bits(model, plan, name, spec))
    codes += (scale_bytes + _zero_bytes(spec)) * scales
    shared = plan.layers[name].weight != name
    return (0 if shared else codes) + _bias_bytes(layer, plan, name, channels, scales, spec)


def _code_bytes(count: int, spec: QuantSpec, bits: int) -> int:
    return trit_bytes(count) if spec.trits else code_bytes(count, bits)


def _zero_bytes(spec: QuantSpec) -> int:
    """Bytes of a zero point, which has the type of the codes."""
    if not spec.integer or integer_bits(spec) <= 8:
        return int(spec.integer)
    return 2 if spec.symmetric and spec.signed is not False else 4


def packed_bits(model: nn.Module, plan: Plan, name: str, spec: QuantSpec) -> int:
    """Bits of a packed code: those of the grid, but where a BatchNorm makes a channel constant and there is no zero."""
    norm: Any = model.get_submodule(plan.batch_norms[name]) if name in plan.batch_norms else None
    constant = norm is not None and norm.weight is not None and bool((norm.weight == 0).any())
    return spec.width if spec.rounding is round_midrise and not constant else engine_bits(model, plan, name, spec)


def engine_bits(model: nn.Module, plan: Plan, name: str, spec: QuantSpec) -> int:
    """Bits of a code as engines store it: one more than the grid's where it has no zero, and where a negative gamma may
    mirror the lowest code of a full-range grid (see `qat.convert`)."""
    norm: Any = model.get_submodule(plan.batch_norms[name]) if name in plan.batch_norms else None
    mirrors = norm is not None and norm.weight is not None and bool((norm.weight < 0).any())
    full = spec.format == "int" and spec.signed is not False and not spec.narrow and spec.width not in (8, 16)
    return integer_bits(spec) + (mirrors and full)


def _bias_bytes(layer: Any, plan: Plan, name: str, channels: int, scales: int, spec: QuantSpec) -> int:
    if name not in plan.batch_norms and not isinstance(getattr(layer, "bias", None), Tensor):
        return 0
    mixin: Any = mixin_for(layer)
    inputs = [plan.activations[label] for label in plan.layers[name].input]
    if not inputs or plan.round_bias == "never" or mixin.inputs > 1:
        return FLOAT_BYTES * channels
    static = find(inputs[-1].quantizer).static and find(spec.quantizer).static
    return 4 * channels + 8 * scales if accumulates(inputs[-1], spec, static) else FLOAT_BYTES * channels


def _channels(layer: Any) -> int:
    mixin = mixin_for(layer)
    assert mixin is not None and mixin.channel_axis is not None
    return layer.weight.shape[mixin.channel_axis]
