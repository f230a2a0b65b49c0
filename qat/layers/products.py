"""Products of codes: linear layers and convolutions run on int8 kernels (`qat.kernels.onednn`), as they will where the
model is deployed.

Fake quantization multiplies in float32 what stands for codes of at most 8 bits. The codes have the same sums, without
float32's rounding errors and several times as fast where the processor has instructions for them.

In training, forward alone multiplies codes. Backward is that of the float product of the fake-quantized tensors, which
are made for there (`qat.layers.sources`), an input of its codes; in forward nobody writes them. In evaluation the
weight is packed once.

NaN has no code: the scale becomes NaN with it, and so does all of the output.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules

from qat.formats import Rounding
from qat.functional import levels, positive, values
from qat.kernels import dispatch, onednn
from qat.kernels.dispatch import Kernel
from qat.kernels.gradient import Recipe, unwritten, with_recipe
from qat.kernels.onednn import Geometry
from qat.layers.accumulator import grids
from qat.layers.sources import from_sources, innermost_hooks
from qat.layers.twin import ours
from qat.quantizers import Quantizer
from qat.quantizers.fixed import forward as plain_rounding

MIN_ELEMENTS = 1 << 15
"""Elements of the input below which nobody asks whether codes pay in training."""
MIN_POSITIONS = 768
"""Outputs per channel from which codes pay in training: with fewer, packing the weight takes as long as multiplying."""
MIN_TERMS = 64
"""Products per output from which they pay there: the sums of a depthwise convolution are too short."""
MIN_PRODUCTS = {"linear": 1 << 20, "conv2d": 1 << 24}
"""Products in all from which they pay in evaluation. Few rows of a linear layer wait for its weight, which is a quarter
as large in codes."""
CODES = 256
"""How many codes an input may have; those of a weight have to fit int8."""


def trained_on_codes(layer: Any, x: Tensor, around: Callable[..., Tensor] | None = None) -> Tensor | None:
    """The output of a quantized layer, with its gradients; `None` where float arithmetic has to do it. See
    `QuantizedLayer.run` for `around`.
    """
    geometry = layer.geometry()
    if geometry is None or not (torch.is_grad_enabled() and _runs_here(x, layer.weight)):
        return None
    pays = _positions(x, geometry) >= MIN_POSITIONS and layer.weight.shape[1:].numel() >= MIN_TERMS
    grid, weight_grid = grids(layer)
    if not pays or grid is None or weight_grid is None or not _have_codes(grid, weight_grid):
        return None
    if looked_at(grid) or looked_at(weight_grid):  # hooks may return what has no codes
        return None
    compiling = torch.compiler.is_dynamo_compiling()
    if not compiling and innermost_hooks() is not None:  # somebody wants the tensors that are saved
        return None
    alone = layer.input_quantizer is grid and grid.readers == 1
    with ours():
        if compiling:
            return _compiled(layer, geometry, grid if alone else layer.quantized_input, x, grid, weight_grid)
        x = _quantized(grid, x) if alone else layer.quantized_input(x)
        weight = _quantized(weight_grid, layer.weight)
        with torch.no_grad():
            codes = *_codes(input_codes, x, grid), *_codes(weight_codes, weight, weight_grid)[:2]
        if hasattr(x, "made"):  # backward is to read a byte an element, not four
            x.made = x.made._replace(decoded=partial(_decoded.large, codes[:3]))  # pyright: ignore

        def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return _product(geometry, x, weight, bias, *codes)

        function = multiply if around is None else partial(around, multiply)
        return from_sources((x, weight), function, x, weight, layer.quantized_bias())


def _compiled(
    layer: Any, geometry: Geometry, quantize: Callable[[Tensor], Tensor], x: Tensor,
    grid: Quantizer, weight_grid: Quantizer,
) -> Tensor:  # fmt: skip
    """The same for compilers: codes are computed from what was quantized, so that both are one rounding to them."""
    x, recipe = with_recipe(quantize, x)
    weight, weight_recipe = with_recipe(weight_grid, layer.weight)
    with torch.no_grad():
        codes = *_codes(input_codes, x, grid, recipe), *_codes(weight_codes, weight, weight_grid, weight_recipe)[:2]
    args = geometry, x, weight, layer.quantized_bias(), *codes
    return _Product.apply(*args)  # pyright: ignore[reportReturnType]


def evaluated_on_codes(layer: Any, x: Tensor) -> Tensor | None:
    """The output of a quantized layer in evaluation, without gradients; `None` where float arithmetic has to do it."""
    if torch.compiler.is_dynamo_compiling() or type(x) is not Tensor:  # sizes may be symbols
        return None
    weight = layer._parameters.get("weight")
    if weight is None:
        if layer.geometry() is None:  # converted, it has none
            return None
        weight = layer.weight  # computed
    # Small layers are to lose no time: at most so many products, before anybody asks what kind of layer it is.
    if x.numel() * weight.numel() < MIN_PRODUCTS["linear" if weight.ndim == 2 else "conv2d"] * weight.shape[1]:
        return None
    geometry = layer.geometry()
    if geometry is None or _positions(x, geometry) * weight.numel() < MIN_PRODUCTS["conv2d" if geometry else "linear"]:
        return None
    if not _runs_here(x, weight):
        return None
    grid, weight_grid = grids(layer)
    if grid is None or weight_grid is None:
        return None
    with ours():
        both = grid, weight_grid
        kept = layer.once_per_change("packed", (weight,), both, lambda: _packed(layer, *both, x.shape, geometry))
        if kept is None or looked_at(grid) or looked_at(weight_grid):
            return None
        packed, scale = kept
        for quantizer in list(layer.input_quantizer)[:-1] if layer.input_quantizer is not grid else ():
            x = quantizer(x)
        with torch.no_grad():
            codes, x_scale, low = _codes(input_codes, x, grid)
        channels_last = _lies_channels_last(x) or _lies_channels_last(weight)
        bias = layer.quantized_bias()
        return onednn.multiply(geometry, codes, x_scale, low, packed, scale, bias, channels_last)


def _packed(
    layer: Any, grid: Quantizer, weight_grid: Quantizer, shape: torch.Size, geometry: Geometry
) -> tuple[Tensor, Tensor] | None:
    """The packed weight and its scale; `None` if the layer's grids have no codes."""
    if not _have_codes(grid, weight_grid):
        return None
    with torch.no_grad():
        codes, scale, _ = _codes(weight_codes, layer.quantized_weight(), weight_grid)
        _, low, _ = grid.grid(codes)
    return onednn.pack(geometry, codes, low, shape), scale


# -- where -------------------------------------------------------------------------------------------------------------


def _runs_here(x: Tensor, weight: Tensor) -> bool:
    """Whether both are float32 and on a processor with int8 instructions, and nobody follows each operation."""
    if not x.dtype == weight.dtype == torch.float32 or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    if not (dispatch.products() and onednn.exact()):
        return False
    if torch.compiler.is_dynamo_compiling():
        return not torch.compiler.is_exporting()
    plain = type(x) is Tensor and type(weight) in (Tensor, nn.Parameter)
    return plain and not (torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active())


def _positions(x: Tensor, geometry: Geometry) -> int:
    """About how many outputs a channel has; none if `x` is not what the layer usually gets."""
    if not geometry:
        return x.numel() // x.shape[-1] if x.ndim and x.shape[-1] else 0
    rows, columns = geometry[0]
    return x.shape[0] * (x.shape[2] // rows) * (x.shape[3] // columns) if x.ndim == 4 else 0


def _have_codes(grid: Quantizer, weight: Quantizer) -> bool:
    """Whether both grids have integer codes that the kernels take, with scales that stand outside the sums."""
    for q in (grid, weight):
        if not (q.on and q.static and q.uniform and q.spec.integer and q.spec.granularity != "group"):
            return False
        if type(q).forward is not Quantizer.forward or "forward" in q.__dict__:  # it may return a mixture of grids
            return False
    fits = weight.quant_min >= -128 and weight.quant_max <= 127 and weight.spec.symmetric
    return fits and grid.quant_max - grid.quant_min < CODES


# -- codes -------------------------------------------------------------------------------------------------------------


def input_codes(rounding: Rounding, x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of `x` as uint8, the lowest being 0, and the scale that acts."""
    level = levels(x, scale, low, high, rounding)
    return (level - low).to(torch.uint8), _acting(scale, x)


def weight_codes(rounding: Rounding, x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Levels of a weight as int8, and the scale that acts."""
    level = levels(x, scale, low, high, rounding)
    return level.to(torch.int8), _acting(scale, x)


def _values(codes: Tensor, scale: Tensor, low: Tensor) -> Tensor:
    return values(codes + low, scale, torch.float32)


_decoded = Kernel(_values, 1)
"""What an input's codes stand for: `codes, scale, low`, code 0 being the level `low`."""


def _acting(scale: Tensor, x: Tensor) -> Tensor:
    """The scale that acts on `x`, NaN if that holds one: its codes cannot say so."""
    # Compilers take 0 * x.sum() for 0, and need several times as long for x.isnan().any().
    return torch.where((x != x).any(), torch.nan, positive(scale))


@cache
def _kernel(function: Callable[..., Any], rounding: Rounding) -> Kernel:
    return Kernel(partial(function, rounding), 1)


def looked_at(module: nn.Module) -> bool:
    """Whether somebody else sees what the module gets and returns, or its gradients."""
    m = module
    hooks = m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
    return bool(hooks or modules._has_any_global_hook())


def _quantized(quantizer: Quantizer, x: Tensor) -> Tensor:
    """`quantizer(x)`, its values left unwritten if they can be made from a recipe."""
    y = unwritten(quantizer, x)
    return y if y is not None and _rounds(y) else quantizer(x, follow=False)


def _rounds(x: Tensor) -> bool:
    """Whether the recipe of `x`, if it has one, is a plain rounding."""
    return not hasattr(x, "made") or x.made.gradient.parts[0] is plain_rounding  # pyright: ignore


def _codes(
    function: Callable[..., Any], x: Tensor, quantizer: Quantizer, recipe: Recipe | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes and scale (one axis) of `x`, and the level that code 0 of an input stands for.

    Args:
        function: `input_codes` or `weight_codes`.
        x: Fake-quantized, so that rounding it again changes nothing, or what the quantizer is about to round.
        quantizer: Its grid.
        recipe: How `x` was made, where `x.made` cannot say so.
    """
    if hasattr(x, "made"):
        recipe = x.made.gradient, x.made.tensors  # pyright: ignore[reportAttributeAccessIssue]
    rounded = recipe is not None and recipe[0].parts[0] is plain_rounding
    tensors = recipe[1][:4] if recipe and rounded else (x, *quantizer.grid(x))
    rounding = quantizer.spec.rounding
    if torch.compiler.is_dynamo_compiling() or tensors[0].numel() < dispatch.SMALL:
        codes, scale = function(rounding, *tensors)
    else:
        codes, scale = _kernel(function, rounding).large(tensors)
    return codes, scale.reshape(-1), tensors[2]


# -- gradients ---------------------------------------------------------------------------------------------------------


def _lies_channels_last(x: Tensor) -> bool:
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


class _Product(torch.autograd.Function):
    """Forward on codes; backward, of the fake-quantized tensors, as ever."""

    @staticmethod
    def forward(
        ctx: Any, geometry: Geometry, x: Tensor, weight: Tensor, bias: Tensor | None,
        x_codes: Tensor, x_scale: Tensor, low: Tensor, codes: Tensor, scale: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.geometry, ctx.bias = geometry, bias is not None
        ctx.compiling = torch.compiler.is_dynamo_compiling()
        channels_last = _lies_channels_last(x) or _lies_channels_last(weight)
        if not ctx.compiling:
            ctx.save_for_backward(x, weight)
            packed = onednn.pack(geometry, codes, low, x.shape)
            return onednn.multiply(geometry, x_codes, x_scale, low, packed, scale, bias, channels_last)
        # Codes are a quarter of what they stand for, which compiled code then makes in backward alone.
        ctx.save_for_backward(x_codes, x_scale, low, codes, scale)
        args = x_codes, x_scale, low, codes, scale, bias
        return onednn.conv2d(*args, *geometry, channels_last) if geometry else onednn.linear(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        if ctx.compiling:
            x_codes, x_scale, low, codes, scale = ctx.saved_tensors
            x, weight = (x_codes + low) * x_scale, codes * scale.view(-1, *[1] * (codes.ndim - 1))
        else:
            x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1:4]
        if ctx.geometry:
            *where, groups = ctx.geometry
            sizes = [len(weight)] if ctx.bias else None
            of = torch.ops.aten.convolution_backward(grad, x, weight, sizes, *where, False, [0, 0], groups, wanted)
        else:
            rows = grad.reshape(-1, grad.shape[-1])
            of = (
                (rows @ weight).view(x.shape) if wanted[0] else None,
                rows.t() @ x.reshape(-1, x.shape[-1]) if wanted[1] else None,
                rows.sum(0) if wanted[2] else None,
            )
        return None, *of, None, None, None, None, None


_product = super(torch.autograd.Function, _Product).apply  # pyright: ignore[reportAttributeAccessIssue]
"""Its `apply` without the Python calls that prepare it for functorch and compilers."""
