"""A ReLU and the rounding of what it returns, in one pass over memory: values and gradients are those of both in turn,
bit for bit.

Apart, the ReLU reads and writes its tensor once more, and so does its gradient.
"""

from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.grid.formats import Rounding
from qat.kernels.gradient import Gradient, Grads


def _relu6(x: Tensor) -> Tensor:
    return F.hardtanh(x, 0.0, 6.0)


def _relu_stops(x: Tensor) -> Tensor:
    return x <= 0


def _relu6_stops(x: Tensor) -> Tensor:
    return (x <= 0) | (x >= 6)


RECTIFIERS: dict[type[nn.Module], tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    nn.ReLU: (F.relu, _relu_stops),
    nn.ReLU6: (_relu6, _relu6_stops),
}
"""Rectifiers: the function that each computes, and where its gradient is zero."""


def is_rectifier(module: nn.Module) -> bool:
    """Whether it computes what `RECTIFIERS` says: the limits of a ReLU6 are attributes that anybody may set."""
    limited = type(module) is nn.ReLU6 and (module.min_val, module.max_val) != (0.0, 6.0)
    return type(module) in RECTIFIERS and not limited


@cache
def behind(rectifier: type[nn.Module], gradient: Gradient) -> Gradient:
    """The fake quantization of what a ReLU makes of a tensor.

    Args:
        rectifier: One of `RECTIFIERS`.
        gradient: The fake quantization.
    """
    forward, backward, rounding = gradient.parts
    rectify, stops = RECTIFIERS[rectifier]
    return Gradient(partial(_forward, forward, rectify), partial(_backward, backward, rectify, stops), rounding)


def _forward(
    forward: Callable[..., Tensor], rectify: Callable[[Tensor], Tensor], rounding: Rounding, x: Tensor, *grid: Tensor
) -> Tensor:
    return forward(rounding, rectify(x), *grid)


def _backward(
    backward: Callable[..., Grads], rectify: Callable[[Tensor], Tensor], stops: Callable[[Tensor], Tensor],
    rounding: Rounding, grad: Tensor, x: Tensor, *grid: Tensor,
) -> Grads:  # fmt: skip
    grad_x, *others = backward(rounding, grad, rectify(x), *grid)
    assert grad_x is not None
    return torch.where(stops(x), 0, grad_x), *others
