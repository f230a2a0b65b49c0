"""Fake quantization as an autograd function: a forward and a backward kernel, which save nothing but their inputs.

Which of the four functions runs depends on who calls:

    compilers, functorch   `_Plain`      made of torch's operations, for them to fuse or to transform
    small tensors          `_Small`      the same with fewer Python calls
    large ones             `_Large`      with compiled kernels where they pay
    products of codes      `_Unwritten`  the values stay unwritten, since codes are computed from the recipe

A large tensor that was fake-quantized carries its recipe as the attribute `made` (`qat.kernels.recipes`).
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from qat.grid.formats import Rounding
from qat.kernels import dispatch
from qat.kernels.dispatch import Kernel
from qat.kernels.launch import PLAIN
from qat.kernels.layout import dense
from qat.kernels.recipes import Recipe, here

SAVED = 1 << 17
"""Fake-quantized tensors below this many elements are saved for backward as they are: making them anew
(`qat.layers.sources`) would take longer than half a megabyte is worth."""

Grads = tuple[Tensor | None, ...]


class Gradient:
    """A fake quantization and its gradient, as two kernels. Get one from `gradient`, which makes one for all quantizers
    that share it.
    """

    def __init__(self, forward: Callable[..., Tensor], backward: Callable[..., Grads], rounding: Rounding) -> None:
        self.parts = forward, backward, rounding
        self.forward, self.backward = Kernel(partial(forward, rounding), 1), Kernel(partial(backward, rounding), 2)

    def __call__(
        self, x: Tensor, scale: Tensor, low: Tensor, high: Tensor, *extra: Tensor, grad_scale: float = 1.0
    ) -> Tensor:
        """Fake-quantizes `x`; gradients of `scale` and `extra` are multiplied by `grad_scale`."""
        tensors = x, scale, low, high, *extra
        if torch.compiler.is_dynamo_compiling() or torch._C._are_functorch_transforms_active():
            y: Any = _Plain.apply(self, grad_scale, *tensors)
            if here.recipes:
                here.recipes[-1].append((y, Recipe(self, tensors)))
            return y
        count, learning = x.numel(), torch.is_grad_enabled()
        if (
            type(count) is not int
            or count < (dispatch.SMALL if learning else dispatch.SMALL_FORWARD)
            or type(x) not in PLAIN
        ):
            # Sizes are symbols and tensors have no address while somebody exports.
            return _small(self, grad_scale, *tensors) if learning else self.forward.function(*tensors)
        if not learning:
            return self.forward.large(tensors)
        if not (x.is_contiguous() or dense(x)):  # one copy for forward and backward
            x = x.contiguous()
            tensors = x, *tensors[1:]
        if count < SAVED or x.is_inference():  # which has no version that a recipe could be checked by
            return _large(self, grad_scale, *tensors)
        left = here.left
        y = (_large if left is None else _unwritten)(self, grad_scale, *tensors)
        y.made = Recipe(self, tensors, x._version, y._version)
        if left is not None:
            left.append(y)
        return y

    def __reduce__(self) -> Any:
        return gradient, self.parts


@cache
def gradient(forward: Callable[..., Tensor], backward: Callable[..., Grads], rounding: Rounding) -> Gradient:
    """The gradient of these two module-level functions.

    Args:
        forward: `(rounding, x, scale, low, high, *extra) -> y`.
        backward: `(rounding, grad, x, scale, low, high, *extra) -> (grad_x, grad_scale or None, *grad_extra)`.
        rounding: How a ratio becomes a level (`QuantSpec.rounding`).
    """
    return Gradient(forward, backward, rounding)


class _Plain(torch.autograd.Function):
    """The autograd function that compilers and functorch see. It saves the inputs and nothing else; backward recomputes
    the rest.
    """

    @staticmethod
    def forward(ctx: Any, gradient: Gradient, grad_scale: float, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.gradient, ctx.grad_scale = gradient, grad_scale
        y = gradient.forward.function(*tensors)
        # Compilers up to torch 2.11 lose the gradient of what was computed in place; fused, the copy costs nothing.
        return y.clone() if torch.compiler.is_dynamo_compiling() else y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        function, tensors = ctx.gradient.backward.function, ctx.saved_tensors
        if torch.compiler.is_dynamo_compiling() and _is_part(*tensors[:2]):
            function = partial(_in_memory, function)
        grad_x, *others = function(grads[0], *tensors)
        return _returned(ctx.grad_scale, grad_x, others)


def _is_part(x: Tensor, scale: Tensor) -> bool:
    """Whether `x`, which has one scale, is a view of a larger tensor."""
    return scale.numel() == 1 and x.untyped_storage().size() > x.numel() * x.element_size()


def _in_memory(function: Callable[..., Grads], grad: Tensor, x: Tensor, *parameters: Tensor) -> Grads:
    """`function(grad, x, *parameters)` for compilers, which are to write the gradient of `x` to memory.

    The gradient of a tensor is the sum of those of its views (queries, keys and values of one projection), each filled
    up with zeros. Fused with what makes them, every element of that sum would compute the gradients of all the views.
    """
    order: list[int] = []  # of the axes in memory, the outermost first
    for axis in range(x.ndim):  # not sorted(): strides may be symbols
        at = 0
        while at < len(order) and x.stride(order[at]) >= x.stride(axis):
            at += 1
        order.insert(at, axis)
    grad_x, *others = function(grad.permute(order), x.permute(order), *parameters)
    assert grad_x is not None
    grad_x = grad_x.contiguous()
    grad_x = grad_x.as_strided(grad_x.shape, grad_x.stride())  # speaks of memory
    return grad_x.permute([order.index(axis) for axis in range(x.ndim)]), *others


class _Small(_Plain):
    """`_Plain` for eager mode: without the Python call to `save_for_backward`."""

    @staticmethod
    def forward(ctx: Any, gradient: Gradient, grad_scale: float, *tensors: Tensor) -> Tensor:
        ctx.to_save = tensors  # all that save_for_backward does
        ctx.gradient, ctx.grad_scale = gradient, grad_scale
        return gradient.forward.function(*tensors)


class _Large(_Plain):
    """`_Plain` for eager mode, with compiled kernels where they pay."""

    @staticmethod
    def forward(ctx: Any, gradient: Gradient, grad_scale: float, *tensors: Tensor) -> Tensor:
        ctx.to_save = tensors
        ctx.gradient, ctx.grad_scale = gradient, grad_scale
        return gradient.forward.large(tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative: backward is made of operations that torch can differentiate
            grad_x, *others = ctx.gradient.backward.function(grads[0], *tensors)
            return _returned(ctx.grad_scale, grad_x, others)
        grad_x, *others = ctx.gradient.backward.large(tensors, grads[0])
        parameters = (tensors[1], *tensors[4:])
        others = [
            g if g is None or g.shape == p.shape else g.view(p.shape) for g, p in zip(others, parameters, strict=True)
        ]
        return _returned(ctx.grad_scale, grad_x, others)


class _Unwritten(_Large):
    """`_Large` for products that compute codes from the recipe and never read the values: returns an uninitialised
    tensor.
    """

    @staticmethod
    def forward(ctx: Any, gradient: Gradient, grad_scale: float, *tensors: Tensor) -> Tensor:
        ctx.to_save = tensors
        ctx.gradient, ctx.grad_scale = gradient, grad_scale
        return torch.empty_like(tensors[0])


def _returned(grad_scale: float, grad_x: Tensor | None, others: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    if grad_scale != 1.0:
        others = [g if g is None else g * grad_scale for g in others]
    return None, None, grad_x, others[0], None, None, *others[1:]


_small = super(torch.autograd.Function, _Small).apply  # pyright: ignore[reportAttributeAccessIssue]
_large = super(torch.autograd.Function, _Large).apply  # pyright: ignore[reportAttributeAccessIssue]
_unwritten = super(torch.autograd.Function, _Unwritten).apply  # pyright: ignore[reportAttributeAccessIssue]
"""Their `apply` without the dozen Python calls that prepare it for functorch and compilers."""
