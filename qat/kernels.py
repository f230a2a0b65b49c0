"""Running pure tensor functions at the speed of memory: compiled where it pays, plain torch where it does not.

Fake quantization is a handful of arithmetic operations per element. Run one by one, each reads and writes the whole
tensor; fused by torch.compile they read it once and write it once. A `Kernel` is such a function with both ways to
run it:

    inside somebody's torch.compile   inlined, so that it fuses with their code too
    small tensors                     plain torch: calling a compiled region costs 25-50 microseconds
    large tensors                     compiled once for all shapes; where no compiler is found, plain torch, with one
                                      warning

Compiling costs seconds, which a run of a minute never earns back, so it starts once `PATIENCE` elements have passed
(see `configure`). torch keeps the result on disk: the next process loads it.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from types import FunctionType
from typing import Any, Literal

import torch
from torch import Tensor

from qat.formats import Rounding

SMALL = 1 << 16
"""Tensors below this many elements run in plain torch."""

Grads = tuple[Tensor | None, ...]
Mode = Literal["auto", "always", "never"]
_settings: dict[str, Any] = {"mode": "auto", "patience": 4_000_000_000, "broken": False}


def configure(mode: Mode = "auto", patience: int = 4_000_000_000) -> None:
    """Chooses when kernels are compiled.

    Args:
        mode: `auto`: after `patience` elements; `always`: from the first large tensor; `never`.
        patience: Elements that pass through plain torch first (about half a minute of work on two cores).
    """
    _settings.update(mode=mode, patience=patience)


def _worth(x: Tensor) -> bool:
    """Whether a kernel should run compiled on the large tensor `x`; counts down the patience."""
    if _settings["broken"] or _settings["mode"] == "never" or torch.compiler.is_compiling():
        return False
    if _settings["mode"] == "auto" and _settings["patience"] > 0:
        _settings["patience"] -= x.numel()
        return False
    return True


class Kernel:
    """A pure function of tensors and its compiled form, made when first asked for.

    Args:
        function: Positional tensors in, a tensor or a tuple of tensors out; it may work in place on tensors it
            made itself.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self._compiled: Callable[..., Any] | None = None

    def compiled(self, *args: Tensor) -> Any:
        """Runs compiled, or where that fails, and from then on, in plain torch."""
        try:
            if self._compiled is None:
                self._compiled = torch.compile(_own_code(self.function), dynamic=True, fullgraph=True)
            # Part of what torch guards compiled code by: a layer's forward has switched it off already, its backward
            # not.
            with torch._C.DisableTorchFunction():
                return self._compiled(*args)
        except Exception as error:  # a missing compiler surfaces as whatever its build step raises
            _settings["broken"] = True
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            warnings.warn(
                f"quantizers run uncompiled, several times slower: torch.compile failed ({reason})", stacklevel=2
            )
            return self.function(*args)


def _own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` under a code object of its own: torch counts recompilations by code object, and kernels must not use
    up each other's.
    """

    def run(*args: Tensor) -> Any:
        return function(*args)

    return FunctionType(run.__code__.replace(), run.__globals__, run.__name__, None, run.__closure__)


class Gradient:
    """A fake quantization and its gradient, as two kernels. Get one from `gradient`, which makes one for all quantizers
    that share it.
    """

    def __init__(self, forward: Callable[..., Tensor], backward: Callable[..., Grads], rounding: Rounding) -> None:
        self.parts = forward, backward, rounding
        self.forward, self.backward = Kernel(partial(forward, rounding)), Kernel(partial(backward, rounding))

    def __call__(
        self, x: Tensor, scale: Tensor, low: Tensor, high: Tensor, *extra: Tensor, grad_scale: float = 1.0
    ) -> Tensor:
        """Fake-quantizes `x`; gradients of `scale` and `extra` are multiplied by `grad_scale`."""
        tensors = x, scale, low, high, *extra
        if torch.compiler.is_dynamo_compiling() or torch._C._are_functorch_transforms_active():
            return _Plain.apply(self, grad_scale, *tensors)  # pyright: ignore[reportReturnType]
        count = x.numel()
        if type(count) is not int or count < SMALL:  # symbolic, while somebody exports
            return _plain(self, grad_scale, *tensors)
        y = _large(self, grad_scale, *tensors)
        y.made = Made(self, tensors, x._version)
        return y

    def fake_quantize(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """The forward pass on large `x, scale, low, high, *extra`, compiled where it pays."""
        if not _worth(tensors[0]):
            return self.forward.function(*tensors)
        layout = _layout(tensors[0].shape, tensors[0].stride(), tensors[1].shape)
        return layout.restore(self.forward.compiled(*layout.all(tensors)))

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
    """Saves the inputs and nothing else; backward recomputes the rest. What compilers and functorch see."""

    @staticmethod
    def forward(ctx: Any, gradient: Gradient, grad_scale: float, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.gradient, ctx.grad_scale = gradient, grad_scale
        return gradient.forward.function(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, *others = ctx.gradient.backward.function(grads[0], *ctx.saved_tensors)
        return _returned(ctx.grad_scale, grad_x, others)


class _Large(_Plain):
    """The same with compiled kernels where they pay."""

    @staticmethod
    def forward(ctx: Any, gradient: Gradient, grad_scale: float, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.gradient, ctx.grad_scale = gradient, grad_scale
        return gradient.fake_quantize(tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        # With a graph of its own (a second derivative), backward is made of operations that torch can differentiate.
        if torch.is_grad_enabled() or not _worth(tensors[0]):
            grad_x, *others = ctx.gradient.backward.function(grads[0], *tensors)
            return _returned(ctx.grad_scale, grad_x, others)
        layout = _layout(tensors[0].shape, tensors[0].stride(), tensors[1].shape)
        grad_x, *others = ctx.gradient.backward.compiled(layout.rows(grads[0]), *layout.all(tensors))
        parameters = (tensors[1], *tensors[4:])
        others = [g if g is None else g.view(p.shape) for g, p in zip(others, parameters, strict=True)]
        return _returned(ctx.grad_scale, layout.restore(grad_x), others)


def _returned(grad_scale: float, grad_x: Tensor | None, others: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    if grad_scale != 1.0:
        others = [g if g is None else g * grad_scale for g in others]
    return None, None, grad_x, others[0], None, None, *others[1:]


_plain = super(torch.autograd.Function, _Plain).apply  # pyright: ignore[reportAttributeAccessIssue]
_large = super(torch.autograd.Function, _Large).apply  # pyright: ignore[reportAttributeAccessIssue]
"""Their `apply` without the dozen Python calls that prepare it for functorch and compilers."""


@dataclass(frozen=True)
class Made:
    """How a large fake-quantized tensor was made, attached to it as `made`.

    Attributes:
        gradient: Whose forward pass it was.
        tensors: `x, scale, low, high, *extra`.
        version: Of `x` then.
    """

    gradient: Gradient
    tensors: tuple[Tensor, ...]
    version: int

    def again(self) -> Tensor:
        """The fake-quantized tensor, made anew.

        Raises:
            RuntimeError: if `x` has been written to since.
        """
        if self.tensors[0]._version != self.version:
            raise RuntimeError(
                "a tensor that backward needs was modified in place after it had been quantized: "
                f"{tuple(self.tensors[0].shape)} is at version {self.tensors[0]._version}, expected {self.version}"
            )
        return self.gradient.fake_quantize(self.tensors)


@dataclass(frozen=True)
class _Layout:
    """Shows kernels a tensor as `[N]` (one scale) or `[rows, N]` (a scale for each), whatever its shape, in the order
    it lies in memory.

    So a kernel is compiled once for all shapes, channels_last costs no copy, and per-channel runs like per-tensor.
    Scales along other axes broadcast as they are.

    Attributes:
        shape, strides: Of the tensor; the strides are dense.
        view: The shape that kernels see, `None` for that of the tensor itself.
    """

    shape: torch.Size
    strides: tuple[int, ...]
    view: tuple[int, ...] | None

    def rows(self, x: Tensor) -> Tensor:
        if self.view is None:
            return x
        if x.stride() != self.strides:
            x = torch.empty_strided(self.shape, self.strides, dtype=x.dtype, device=x.device).copy_(x)
        return _alias(x, self.view, (self.view[1], 1) if len(self.view) == 2 else (1,))

    def per_row(self, parameter: Tensor) -> Tensor:
        count = parameter.numel()
        if self.view is None or (count == 1 and parameter.ndim == 1 and not parameter.requires_grad):
            return parameter
        rows = len(self.view) == 2 and count > 1
        return _alias(parameter.contiguous(), (count, 1) if rows else (count,), (1, 1) if rows else (1,))

    def all(self, tensors: tuple[Tensor, ...]) -> list[Tensor]:
        """`x, scale, low, high, *extra` as kernels see them."""
        return [self.rows(tensors[0]), *map(self.per_row, tensors[1:])]

    def restore(self, x: Tensor) -> Tensor:
        return x if self.view is None else _alias(x, self.shape, self.strides)


@lru_cache(4096)
def _layout(shape: torch.Size, strides: tuple[int, ...], scale: torch.Size) -> _Layout:
    """The layout of a tensor of this shape whose scale has the shape `scale`."""
    strides, count = _dense_strides(shape, strides), shape.numel()
    leading = next((d for d in range(len(scale), 0, -1) if scale[d - 1] != 1), 0)
    if leading == 0:
        view = (count,)
    elif len(scale) == len(shape) and shape[:leading] == scale[:leading] and _outermost(shape, strides, leading):
        rows = scale.numel()
        view = (rows, count // rows)
    else:
        view = None
    return _Layout(shape, strides, view)


def _alias(x: Tensor, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """The memory of `x` as another tensor, which is no view: compiled code is guarded by what a view is of, and in-
    place operations refuse views made here.
    """
    return x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(), shape, strides)  # pyright: ignore


def _dense_strides(shape: torch.Size, strides: tuple[int, ...]) -> tuple[int, ...]:
    """`strides` if they fill memory without gaps or overlaps, else contiguous ones."""
    expected = 1
    for size, stride in sorted(zip(shape, strides, strict=True), key=lambda pair: (pair[1], pair[0])):
        if size > 1 and stride != expected:
            return torch.empty(shape, device="meta").stride()
        expected *= size
    return strides


def _outermost(shape: torch.Size, strides: tuple[int, ...], leading: int) -> bool:
    """Whether the first `leading` axes lie outside all others in memory, in order."""
    inner = shape[leading:].numel()
    for size, stride in zip(reversed(shape[:leading]), reversed(strides[:leading]), strict=True):
        if size > 1 and stride != inner:
            return False
        inner *= size
    return True
