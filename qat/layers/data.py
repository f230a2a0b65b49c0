"""Convolutions of data: of an input that needs no gradient, whose step learns nevertheless.

By the chain rule, the gradient of the step would come by way of the data's, which nobody else wants and which is a
transposed convolution to few channels, slow everywhere. With y = W * x_q(s) it is also

    d loss / d s = < d loss / d y,  W * (d x_q / d s) >

one forward convolution of the slopes of the rounding (LSQ, equation 3).

The product sees the quantized data cut off from their step. Second derivatives would miss what goes that way, so a
backward pass that is itself differentiated runs the convolution again, whole.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from qat.grid.formats import Rounding
from qat.grid.functional import wide
from qat.kernels.dispatch import Kernel
from qat.layers.hooks import innermost_hooks, looked_at
from qat.layers.twin import ours
from qat.quantizers.lsq import LSQ, slopes


def reads_data(layer: Any, x: Tensor) -> bool:
    """Whether a convolution's input learns its step and nothing else."""
    if x.requires_grad or not (layer.training and torch.is_grad_enabled()) or torch.compiler.is_compiling():
        return False
    grid = layer._modules["input_quantizer"]
    if type(grid) is not LSQ or not (grid.on and grid.scale.requires_grad) or grid.readers != 1:
        return False
    if getattr(layer._conv_forward, "__func__", None) is not layer.serves._conv_forward:  # it may not be linear
        return False
    # What is drawn once cannot be made again; a forward that was replaced (by learned widths) learns more than a step.
    return not (grid.dithers or "forward" in vars(grid) or looked_at(grid) or innermost_hooks() is not None)


def convolved(layer: Any, function: Callable[..., Tensor], x: Tensor) -> Tensor:
    """`layer.run(function, x)` where `reads_data(layer, x)`. The step's gradient is summed in another order, so it may
    differ in the last bits.
    """
    return layer.run(function, x, partial(_learning, layer.input_quantizer, function, x))


def _learning(
    grid: LSQ, function: Callable[..., Tensor], data: Tensor,
    multiply: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None,
) -> Tensor:  # fmt: skip
    with ours():
        x = x.detach()
    y = multiply(x, weight, bias)
    with ours():
        tensors = *grid.grid(data), data, weight, bias
        return _StepOfData.apply(y, *tensors, grid, function)  # pyright: ignore[reportReturnType]


@cache
def _slopes(rounding: Rounding) -> Kernel:
    return Kernel(partial(slopes, rounding), 1)


class _StepOfData(torch.autograd.Function):
    """The output as it is; backward gives the input's step its gradient."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, scale: Tensor, low: Tensor, high: Tensor,
        x: Tensor, weight: Tensor, bias: Tensor | None, grid: LSQ, function: Callable[..., Tensor],
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(scale, low, high, x, weight, bias)
        ctx.grid, ctx.function = grid, function
        return torch.ops.aten._unsafe_view(y, y.shape)  # a view could not be written to, as by nn.ReLU(inplace=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        if torch.is_grad_enabled():
            return None, *_whole(ctx, grad), None, None
        scale, low, high, x, weight, _ = ctx.saved_tensors
        slope = _slopes(ctx.grid.spec.rounding).large((x, scale, low, high))
        product = ctx.function(slope.to(grad.dtype), weight.to(grad.dtype), None)
        step = (wide(product) * grad).sum() * ctx.grid.gradient_scale(x)
        return grad, step.view(scale.shape).to(scale.dtype), None, None, None, None, None, None, None


def _whole(ctx: Any, grad: Tensor) -> list[Tensor | None]:
    """The gradients of all saved tensors by way of the data's, as functions of them."""
    scale, low, high, x, weight, bias = tensors = ctx.saved_tensors
    args = ctx.grid.fake_quantize(x, scale, low, high), weight, bias
    y = ctx.function(*[t if t is None else t.to(grad.dtype) for t in args])
    learned = [t is not None and t.requires_grad for t in tensors]
    wanted = [t for t, learns in zip(tensors, learned, strict=True) if learns]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
    return [next(found) if learns else None for learns in learned]
