"""Products of codes in evaluation (see `qat.layers.codes`): the weight's codes are packed once per change of it."""

from typing import Any

import torch
from torch import Tensor

from qat.kernels import onednn
from qat.kernels.onednn import Geometry
from qat.layers.accumulator import grids
from qat.layers.codes import codes_of, have_codes, input_codes, lies_channels_last, positions, runs_here, weight_levels
from qat.layers.hooks import looked_at
from qat.layers.twin import ours
from qat.quantizers import Quantizer

MIN_PRODUCTS = {"linear": 1 << 20, "conv2d": 1 << 24}
"""Products in all from which they pay in evaluation. Few rows of a linear layer wait for its weight, which is a quarter
as large in codes."""


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
    if geometry is None or positions(x, geometry) * weight.numel() < MIN_PRODUCTS["conv2d" if geometry else "linear"]:
        return None
    if not runs_here(x, weight):
        return None
    grid, weight_grid = grids(layer)
    if grid is None or weight_grid is None:
        return None
    with ours():
        both, terms = (grid, weight_grid), weight.shape[1:].numel()
        kept = layer.once_per_change("packed", (weight,), both, lambda: _packed(layer, terms, *both, x.shape, geometry))
        if kept is None or looked_at(grid) or looked_at(weight_grid):
            return None
        packed, scale = kept
        for quantizer in list(layer.input_quantizer)[:-1] if layer.input_quantizer is not grid else ():
            x = quantizer(x)
        with torch.no_grad():
            codes, x_scale, low = codes_of(input_codes, x, grid)
        channels_last = lies_channels_last(x) or lies_channels_last(weight)
        bias = layer.quantized_bias()
        return onednn.multiply(geometry, codes, x_scale, low, packed, scale, bias, channels_last)


def _packed(
    layer: Any, terms: int, grid: Quantizer, weight_grid: Quantizer, shape: torch.Size, geometry: Geometry
) -> tuple[Tensor, Tensor] | None:
    """The packed weight and its scale; `None` if the layer's grids have no codes."""
    if not have_codes(terms, grid, weight_grid):
        return None
    with torch.no_grad():
        codes, scale, _ = codes_of(weight_levels, layer.quantized_weight(), weight_grid)
        _, low, _ = grid.grid(codes)
    return onednn.pack(geometry, codes, low, shape), scale
