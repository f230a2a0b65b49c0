"""A converted model as the program that int8 runtimes look for: what torch calls the reference representation.

Every grid is a `quantized_decomposed` pair with its scale and zero point written out as numbers, activations are codes
of one type, and a tensor that several layers read on one grid is quantized once. Runtimes have int8 (or uint8) kernels
alone: a grid whose codes have the other sign is moved by 128, which changes no value, and a narrower one clips before
it is quantized (rounding is monotone, so that gives the same codes).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram

from qat.copies import copied
from qat.errors import UserError
from qat.export.int8_graph import DEQUANTIZE, DEQUANTIZE_CHANNELS, QUANTIZE, settle
from qat.export.torch.trace import traced
from qat.integer import Eager, IntegerActivation, IntegerLayer, IntegerTensor, emitting
from qat.planning.plan import Plan


def int8_refusal(plan: Plan, runtime: str) -> str | None:
    """Why int8 kernels have no form for a plan's weights; `None` if they have one."""
    for name, spec in plan.weights.items():
        if spec.granularity == "group":
            return f"'{name}' has scales for groups of weights, which {runtime} cannot read; use granularity: channel"
        if not (spec.symmetric and spec.signed):
            return f"'{name}' has weights with a zero point, which {runtime} cannot read; use symmetric: true"
    return None


class Int8Emitter(Eager):
    """Writes the operations while a model is traced.

    Args:
        model: A converted model, which is changed: its grids get the numbers that the trace will show.
        dtype: Type of the activation codes, `torch.int8` or `torch.uint8`.
        float_bias: Biases as float constants (runtimes divide them by s_x * s_w themselves, which gives back the codes)
            and not as int32 codes.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, float_bias: bool) -> None:
        self.dtype = dtype
        written: set[IntegerTensor] = set()
        for module in list(model.modules()):
            if isinstance(module, IntegerActivation):
                signed = module.quant_min < 0
                offset = {torch.int8: 0 if signed else -128, torch.uint8: 128 if signed else 0}[dtype]
                self._write_out(module, module.scale, module.zero_point + offset)
                module.code_range = module.quant_min + offset, module.quant_max + offset  # pyright: ignore[reportArgumentType]
            elif isinstance(module, IntegerLayer):
                if module.integer_weight not in written:  # tied layers have one
                    self._weight(module.integer_weight, getattr(module, "channel_axis", None))
                    written.add(module.integer_weight)
                if module.integer_bias is not None:
                    self._bias(module, float_bias)

    @staticmethod
    def _write_out(module: Any, scale: Tensor, zero_point: Tensor) -> None:
        """Makes numbers of a grid, whose tensors nobody reads then: a file would hold them all the same."""
        module.numbers = float(scale), int(zero_point)
        del module.scale, module.zero_point

    def _weight(self, weight: IntegerTensor, axis: int | None) -> None:
        """One scale becomes one per output channel, which every runtime has kernels for."""
        if weight.axis is None and axis is not None:
            outputs = weight.codes.shape[axis]
            weight.scale, weight.axis = weight.scale.expand(outputs).contiguous(), axis
            weight.zero_point = weight.zero_point.expand(outputs).contiguous()
        elif weight.axis is None:
            self._write_out(weight, weight.scale, weight.zero_point)
            return
        weight.zero_point = weight.zero_point.long()

    def _bias(self, layer: IntegerLayer, as_float: bool) -> None:
        assert layer.integer_bias is not None
        if as_float:
            layer.bias = nn.Parameter(Eager.dequantize(self, layer.integer_bias), requires_grad=False)
            layer.integer_bias = None
        else:
            layer.integer_bias.zero_point = layer.integer_bias.zero_point.long()
            if layer.integer_bias.axis is None:
                self._write_out(layer.integer_bias, layer.integer_bias.scale, layer.integer_bias.zero_point)

    def dequantize(self, tensor: IntegerTensor) -> Tensor:
        codes, limits = tensor.codes, torch.iinfo(tensor.codes.dtype)
        if tensor.axis is None:
            scale, zero_point = tensor.numbers  # pyright: ignore[reportGeneralTypeIssues]
            return DEQUANTIZE(codes, scale, zero_point, limits.min, limits.max, codes.dtype)
        low = max(limits.min, -limits.max)  # symmetric; XNNPACK takes -8 .. 7 for packed int4
        return DEQUANTIZE_CHANNELS(codes, tensor.scale, tensor.zero_point, tensor.axis, low, limits.max, codes.dtype)

    def quantize_dequantize(self, x: Tensor, grid: Any) -> Tensor:
        limits, (scale, zero), (low, high) = torch.iinfo(self.dtype), grid.numbers, grid.code_range
        if (low, high) != (limits.min, limits.max):
            x = F.hardtanh(x, (low - zero) * scale, (high - zero) * scale)
        arguments = scale, zero, limits.min, limits.max, self.dtype
        return DEQUANTIZE(QUANTIZE(x, *arguments), *arguments)


def int8_program(
    model: nn.Module,
    example: Tensor,
    dtype: torch.dtype = torch.int8,
    *,
    float_bias: bool = True,
    max_batch: int | None = None,
) -> ExportedProgram:
    """Traces a converted model, which is left as it is.

    Args:
        model: The model, whose forward takes one tensor `[N, ...]` and returns one.
        example: An input of at least two samples.
        dtype: Type of the activation codes.
        float_bias: See `Int8Emitter`.
        max_batch: The largest batch; any, if `None`.

    Raises:
        UserError: if it takes or returns something else, or cannot be traced, with torch's reason.
    """
    if not isinstance(example, Tensor):
        raise UserError(f"{type(model).__name__} is called with {type(example).__name__}, and not with one tensor")
    model = copied(model).eval()
    with emitting(Int8Emitter(model, dtype, float_bias)):
        program = traced(model, example.clone(), max_batch)
    if len(program.graph_signature.user_outputs) != 1:
        raise UserError(
            f"{type(model).__name__} returns several values: this format needs a forward that returns one tensor"
        )
    settle(program.graph)
    program.graph_module.recompile()
    return program
