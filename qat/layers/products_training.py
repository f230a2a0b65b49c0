"""Products of codes in training (see `qat.layers.codes`): forward alone multiplies codes.

Backward is that of the float product of the fake-quantized tensors, which are made for there (`qat.layers.sources`), an
input of its codes; in forward nobody writes them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qat.kernels import onednn
from qat.kernels.onednn import Geometry
from qat.kernels.recipes import unwritten, with_recipe
from qat.layers.accumulator import grids
from qat.layers.codes import (
    codes_of,
    decoded,
    have_codes,
    input_codes,
    lies_channels_last,
    positions,
    runs_here,
    weight_levels,
)
from qat.layers.hooks import innermost_hooks, looked_at
from qat.layers.sources import from_sources
from qat.layers.twin import ours
from qat.quantizers import Quantizer
from qat.quantizers.fixed import forward as plain_rounding

MIN_ELEMENTS = 1 << 15
"""Elements of the input below which nobody asks whether codes pay in training."""
MIN_POSITIONS = 768
"""Outputs per channel from which codes pay in training: with fewer, packing the weight takes as long as multiplying."""
MIN_TERMS = 64
"""Products per output from which they pay there: the sums of a depthwise convolution are too short."""


def trained_on_codes(layer: Any, x: Tensor, around: Callable[..., Tensor] | None = None) -> Tensor | None:
    """The output of a quantized layer, with its gradients; `None` where float arithmetic has to do it. See
    `QuantizedLayer.run` for `around`.
    """
    geometry = layer.geometry()
    if geometry is None or not (torch.is_grad_enabled() and runs_here(x, layer.weight)):
        return None
    terms = layer.weight.shape[1:].numel()
    pays = positions(x, geometry) >= MIN_POSITIONS and terms >= MIN_TERMS
    grid, weight_grid = grids(layer)
    if not pays or grid is None or weight_grid is None or not have_codes(terms, grid, weight_grid):
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
            codes = *codes_of(input_codes, x, grid), *codes_of(weight_levels, weight, weight_grid)[:2]
        if hasattr(x, "made"):  # backward is to read a byte an element, not four
            x.made = x.made._replace(decoded=partial(decoded.large, codes[:3]))  # pyright: ignore[reportAttributeAccessIssue]

        def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return _product(geometry, x, weight, bias, *codes)

        function = multiply if around is None else partial(around, multiply)
        return from_sources((x, weight), function, x, weight, layer.quantized_bias())


def _compiled(
    layer: Any, geometry: Geometry, quantize: Callable[[Tensor], Tensor], x: Tensor,
    grid: Quantizer, weight_grid: Quantizer,
) -> Tensor:  # fmt: skip
    """A product of codes for compilers. Codes are computed from the quantized tensors, so that to compilers both are
    one rounding.
    """
    x, recipe = with_recipe(quantize, x)
    weight, weight_recipe = with_recipe(weight_grid, layer.weight)
    with torch.no_grad():
        codes = codes_of(input_codes, x, grid, recipe)
        levels = codes_of(weight_levels, weight, weight_grid, weight_recipe)[:2]
    args = geometry, x, weight, layer.quantized_bias(), *codes, *levels
    return _Product.apply(*args)  # pyright: ignore[reportReturnType]


def _quantized(quantizer: Quantizer, x: Tensor) -> Tensor:
    """`quantizer(x)`, its values left unwritten if they can be made from a recipe."""
    y = unwritten(quantizer, x)
    return y if y is not None and _rounds(y) else quantizer(x, follow=False)


def _rounds(x: Tensor) -> bool:
    """Whether the recipe of `x`, if it has one, is a plain rounding."""
    return not hasattr(x, "made") or x.made.gradient.parts[0] is plain_rounding  # pyright: ignore[reportAttributeAccessIssue]


class _Product(torch.autograd.Function):
    """Forward on codes; backward, of the fake-quantized tensors, as ever."""

    @staticmethod
    def forward(
        ctx: Any, geometry: Geometry, x: Tensor, weight: Tensor, bias: Tensor | None,
        x_codes: Tensor, x_scale: Tensor, low: Tensor, codes: Tensor, scale: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.geometry, ctx.bias = geometry, bias is not None
        ctx.compiling = torch.compiler.is_dynamo_compiling()
        channels_last = lies_channels_last(x) or lies_channels_last(weight)
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
"""`_Product.apply` without the Python calls that prepare it for functorch and compilers."""
