"""Codes of what layers multiply: linear layers and convolutions run on int8 kernels (`qat.kernels.onednn`), as they
will where the model is deployed.

Fake quantization multiplies in float32 what stands for codes of at most 8 bits. The codes have the same sums, without
float32's rounding errors and several times as fast where the processor has instructions for them, in training
(`qat.layers.products_training`) and in evaluation (`qat.layers.products_evaluation`).

NaN has no code: the scale becomes NaN with it, and so does all of the output.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from qat.grid.formats import Rounding
from qat.grid.functional import levels, positive, values
from qat.kernels import dispatch, onednn
from qat.kernels.dispatch import Kernel
from qat.kernels.onednn import Geometry
from qat.kernels.recipes import Recipe
from qat.layers.accumulator import INT32_MAX
from qat.quantizers import Quantizer
from qat.quantizers.fixed import forward as plain_rounding

CODES = 256
"""How many codes an input may have; those of a weight have to fit int8."""


def have_codes(terms: int, grid: Quantizer, weight: Quantizer) -> bool:
    """Whether both grids have integer codes that the kernels take, `terms` products of which they can add up in int32
    (beyond it they would wrap around in silence), with scales that stand outside the sums.
    """
    for q in (grid, weight):
        if not (q.on and q.static and q.uniform and q.spec.integer and q.spec.granularity != "group"):
            return False
        if type(q).forward is not Quantizer.forward or "forward" in q.__dict__:  # it may return a mixture of grids
            return False
    fits = weight.quant_min >= -128 and weight.quant_max <= 127 and weight.spec.symmetric
    span, most = grid.quant_max - grid.quant_min, max(-weight.quant_min, weight.quant_max)
    return fits and span < CODES and terms * span * most <= INT32_MAX


def codes_of(
    function: Callable[..., Any], x: Tensor, quantizer: Quantizer, recipe: Recipe | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes and scale (one axis) of `x`, and the level that code 0 of an input stands for.

    Args:
        function: `input_codes` or `weight_levels`.
        x: Fake-quantized, so that rounding it again changes nothing, or what the quantizer is about to round.
        quantizer: Its grid.
        recipe: How `x` was made, where `x.made` cannot say so.
    """
    if hasattr(x, "made"):
        recipe = x.made  # pyright: ignore[reportAttributeAccessIssue]
    rounded = recipe is not None and recipe.gradient.parts[0] is plain_rounding
    tensors = recipe.tensors[:4] if recipe and rounded else (x, *quantizer.grid(x))
    rounding = quantizer.spec.rounding
    if torch.compiler.is_dynamo_compiling() or tensors[0].numel() < dispatch.SMALL:
        codes, scale = function(rounding, *tensors)
    else:
        codes, scale = _kernel(function, rounding).large(tensors)
    return codes, scale.reshape(-1), tensors[2]


def input_codes(rounding: Rounding, x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of `x` as uint8, the lowest being 0, and the scale that acts."""
    level = levels(x, scale, low, high, rounding)
    return (level - low).to(torch.uint8), _or_nan(scale, x)


def weight_levels(rounding: Rounding, x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Levels of a weight as int8, and the scale that acts."""
    level = levels(x, scale, low, high, rounding)
    return level.to(torch.int8), _or_nan(scale, x)


def _values(codes: Tensor, scale: Tensor, low: Tensor) -> Tensor:
    return values(codes + low, scale, torch.float32)


decoded = Kernel(_values, 1)
"""Values that an input's codes stand for, from `codes, scale, low`; code 0 is the level `low`."""


def _or_nan(scale: Tensor, x: Tensor) -> Tensor:
    """The scale that acts on `x`, NaN if that holds one: its codes cannot say so."""
    # Compilers take 0 * x.sum() for 0, and need several times as long for x.isnan().any().
    return torch.where((x != x).any(), torch.nan, positive(scale))


@cache
def _kernel(function: Callable[..., Any], rounding: Rounding) -> Kernel:
    return Kernel(partial(function, rounding), 1)


# -- where -------------------------------------------------------------------------------------------------------------


def runs_here(x: Tensor, weight: Tensor) -> bool:
    """Whether both are float32 and on a processor with int8 instructions, and nobody follows each operation."""
    if not x.dtype == weight.dtype == torch.float32 or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    if not (dispatch.products() and onednn.exact()):
        return False
    if torch.compiler.is_dynamo_compiling():
        return not torch.compiler.is_exporting()
    plain = type(x) is Tensor and type(weight) in (Tensor, nn.Parameter)
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    return plain and not (transformed or torch._C._len_torch_dispatch_stack())


def positions(x: Tensor, geometry: Geometry) -> int:
    """About how many outputs a channel has; none if `x` is not what the layer usually gets."""
    if not geometry:
        return x.numel() // x.shape[-1] if x.ndim and x.shape[-1] else 0
    rows, columns = geometry[0]
    return x.shape[0] * (x.shape[2] // rows) * (x.shape[3] // columns) if x.ndim == 4 else 0


def lies_channels_last(x: Tensor) -> bool:
    """Whether images lie in that order, and in no other."""
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
