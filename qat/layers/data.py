"""Convolutions of data: of an input that needs no gradient, whose step learns nevertheless.

By the chain rule, the gradient of the step would come by way of the data's, which nobody else wants and which is a
transposed convolution to few channels, slow everywhere. With y = W * x_q(s) it is also

    d loss / d s = < d loss / d y,  W * (d x_q / d s) >

one forward convolution of the slopes of the rounding (LSQ, equation 3).
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from qat.formats import Rounding
from qat.kernels import Kernel
from qat.layers.products import looked_at
from qat.layers.sources import innermost_hooks
from qat.layers.twin import ours
from qat.quantizers.lsq import LSQ, slopes


def reads_data(layer: Any, x: Tensor) -> bool:
    """Whether a convolution's input learns its step and nothing else."""
    if x.requires_grad or not (layer.training and torch.is_grad_enabled()) or torch.compiler.is_dynamo_compiling():
        return False
    grid, weight = layer._modules["input_quantizer"], layer._modules["weight_quantizer"]
    if type(grid) is not LSQ or not (grid.on and grid.scale.requires_grad) or getattr(grid, "readers", 1) != 1:
        return False
    random = grid._dithers or (weight is not None and weight._dithers)  # what is drawn once cannot be made again
    return not (random or looked_at(grid) or innermost_hooks() is not None)


def convolved(layer: Any, function: Callable[..., Tensor], x: Tensor) -> Tensor:
    """`layer.run(function, x)` for who `reads_data`, with the gradient of the step in another order of sums."""
    grid = layer.input_quantizer
    grid.scale.requires_grad_(False)
    try:
        y = layer.run(function, x)
    finally:
        grid.scale.requires_grad_(True)
    with torch.no_grad(), ours():
        quantizer = layer.weight_quantizer
        weight = layer.weight if quantizer is None else quantizer(layer.weight, follow=False)
    return _StepOfData.apply(y, grid.scale, x, weight, grid, function)  # pyright: ignore[reportReturnType]


@cache
def _slopes(rounding: Rounding) -> Kernel:
    return Kernel(partial(slopes, rounding), 1)


class _StepOfData(torch.autograd.Function):
    """The output as it is; backward gives the input's step its gradient."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, scale: Tensor, x: Tensor, weight: Tensor, grid: LSQ, function: Callable[..., Tensor]
    ) -> Tensor:
        ctx.save_for_backward(*grid.grid(x), x, weight)
        ctx.grid, ctx.function = grid, function
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, (scale, low, high, x, weight) = grads[0], ctx.saved_tensors
        slope = _slopes(ctx.grid.spec.rounding).large((x, scale, low, high))
        product = ctx.function(slope.to(grad.dtype), weight.to(grad.dtype), None)
        step = (product * grad).sum(dtype=torch.float32) * ctx.grid.gradient_scale(x)
        return grad, step.view(scale.shape).to(scale.dtype), None, None, None, None
