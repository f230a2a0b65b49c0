"""Running pure tensor functions at the speed of memory: compiled where it pays, plain torch where it does not.

Fake quantization is a handful of arithmetic operations per element. Run one by one, each reads and writes the whole
tensor; fused by torch.compile they read it once and write it once. A `Kernel` is such a function with both ways to
run it:

    inside somebody's torch.compile   inlined, so that it fuses with their code too
    small tensors                     plain torch, which is as fast there
    large tensors                     compiled once for all shapes (`qat.launch`); where no compiler is found, plain
                                      torch, with one warning

Compiling costs seconds, which a run of a minute never earns back, so it starts once `PATIENCE` elements have passed
(see `configure`). torch keeps the result on disk: the next process loads it.
"""

import threading
import warnings
from collections import defaultdict
from collections.abc import Callable
from functools import cache, partial
from operator import attrgetter, methodcaller
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from qat.formats import Rounding
from qat.launch import PLAIN, Launch, Program, launchable, program, signature
from qat.layout import dense, layout_of

SMALL = 1 << 11
"""Tensors below this many elements run in plain torch: a program costs as much to launch as it saves."""
SMALL_FORWARD = 1 << 15
"""The same where there is no backward pass, most of what is saved."""
SAVED = 1 << 17
"""Fake-quantized tensors below this many elements are saved for backward as they are: making them anew
(`qat.layers.sources`) would take longer than half a megabyte is worth."""

_KIND, _STRIDES = attrgetter("dtype", "shape"), methodcaller("stride")
KEPT = 4096
"""Shapes that a kernel remembers how to run on."""

Grads = tuple[Tensor | None, ...]
Mode = Literal["auto", "always", "never"]
NEVER = float("inf")
_settings = {"patience": 4e9, "products": True}
"""`patience`: how many elements pass through plain torch before kernels are compiled; `products`: whether products may
run on codes (`qat.layers.products`).
"""
_passed: dict[torch.device, int] = defaultdict(int)
"""How many have, on each device: what a run on a GPU ends with on the CPU is no reason to compile for that."""


def configure(mode: Mode = "auto", patience: int = 4_000_000_000) -> None:
    """Chooses when kernels are compiled.

    Args:
        mode: `auto`: after `patience` elements; `always`: from the first large tensor; `never`: not at all, and
            products of layers do not run on codes either.
        patience: Elements that pass through plain torch first (about half a minute of work on two cores).
    """
    _passed.clear()
    _settings["patience"] = {"auto": patience, "always": 0, "never": NEVER}[mode]
    _settings["products"] = mode != "never"


def products() -> bool:
    """Whether products of layers may run on codes."""
    return bool(_settings["products"])


def compiled(x: Tensor) -> bool:
    """Whether kernels run compiled on tensors as large as `x` in training."""
    return x.numel() >= SMALL and _passed[x.device] >= _settings["patience"]


class Kernel:
    """A pure function of tensors and its compiled forms, each made when first asked for.

    Args:
        function: Positional tensors in, a tensor or a tuple of tensors out; it may work in place on tensors it
            made itself. What it clips may hold NaN and comes first, limits never do (`qat.clips`).
        tensors: How many of its arguments are large; the others are parameters.
    """

    def __init__(self, function: Callable[..., Any], tensors: int) -> None:
        self.function, self.tensors = function, tensors
        self._programs: dict[Any, Program] = {}
        self._launches: dict[Any, Launch | None] = {}

    def large(self, tensors: tuple[Tensor, ...], *grads: Tensor) -> Any:
        """Runs on large `x, scale, ...` of any shape, compiled where it pays; the first result has the shape of `x`.

        Args:
            tensors: All but the first are parameters.
            grads: What the kernel takes before them, of the shape of `x`.
        """
        x, args = tensors[0], (*grads, *tensors)
        if _passed[x.device] < _settings["patience"]:
            _passed[x.device] += x.numel()
            return self.function(*args)
        if torch._C._len_torch_dispatch_stack():  # somebody has to see each operation (tracing, counting)
            return self.function(*args)
        # No calls in Python: run from cold caches, each shows in the time of a training step.
        key = x.device, x.is_neg(), *map(type, args), *map(_KIND, args), *map(_STRIDES, args)
        try:
            launch = self._launches[key]
        except KeyError:
            launch = self._launch(key, args)
        return self.function(*args) if launch is None else launch(args)

    def _launch(self, key: Any, args: tuple[Tensor, ...]) -> Launch | None:
        """How to run compiled on arguments like these, which have this key; `None` in plain torch."""
        if len(self._launches) == KEPT:  # sizes do not seem to come back
            self._launches.clear()
        x, scale = args[self.tensors - 1 : self.tensors + 1]
        layout = layout_of(x.shape, x.stride(), scale.shape) if launchable(x, args) else None
        if layout is None:
            self._launches[key] = None
            return None
        seen = [*map(layout.rows, args[: self.tensors]), *map(layout.per_row, args[self.tensors :])]
        kind = signature(self.tensors, seen)
        try:
            if kind not in self._programs:
                self._programs[kind] = program(self.function, self.tensors, seen)
        except Exception as error:  # a missing compiler surfaces as whatever its build step raises
            _settings["patience"] = NEVER
            reason = " ".join(str(error).split()[:40]) or type(error).__name__
            warnings.warn(
                f"quantizers run uncompiled, several times slower: torch.compile failed ({reason})", stacklevel=3
            )
            return None
        launch = self._launches[key] = self._programs[kind].launch(layout, args)
        return launch


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
            if _recipes is not None:
                _recipes.append((y, (self, tensors)))
            return y
        count, learning = x.numel(), torch.is_grad_enabled()
        if type(count) is not int or count < (SMALL if learning else SMALL_FORWARD) or type(x) not in PLAIN:
            # Sizes are symbols and tensors have no address while somebody exports.
            return _small(self, grad_scale, *tensors) if learning else self.forward.function(*tensors)
        if not learning:
            return self.forward.large(tensors)
        if not (x.is_contiguous() or dense(x)):  # one copy for forward and backward
            x = x.contiguous()
            tensors = x, *tensors[1:]
        if count < SAVED:
            return _large(self, grad_scale, *tensors)
        left = _left.tensors
        y = (_large if left is None else _unwritten)(self, grad_scale, *tensors)
        y.made = Made(self, tensors, x._version, y._version)
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
    """Saves the inputs and nothing else; backward recomputes the rest. What compilers and functorch see."""

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
    """The same where nobody compiles: with one Python call less."""

    @staticmethod
    def forward(ctx: Any, gradient: Gradient, grad_scale: float, *tensors: Tensor) -> Tensor:
        ctx.to_save = tensors  # all that save_for_backward does
        ctx.gradient, ctx.grad_scale = gradient, grad_scale
        return gradient.forward.function(*tensors)


class _Large(_Plain):
    """The same with compiled kernels where they pay."""

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
    """The same for who only wants to know how it would be made."""

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


class Made(NamedTuple):
    """How a large fake-quantized tensor was made, attached to it as `made`.

    Attributes:
        gradient: Whose forward pass it was.
        tensors: `x, scale, low, high, *extra`.
        version: Of `x` then.
        own: Of what was made, then: written to since, it is something else.
        decoded: The fake-quantized tensor of its codes, where somebody has them.
    """

    gradient: Gradient
    tensors: tuple[Tensor, ...]
    version: int
    own: int
    decoded: Callable[[], Tensor] | None = None

    def again(self) -> Tensor:
        """The fake-quantized tensor, made anew.

        Raises:
            RuntimeError: if `x`, where it is made of that, has been written to since.
        """
        if self.decoded is not None:
            return self.decoded()
        check_version(self.tensors[0], self.version)
        return self.gradient.forward.large(self.tensors)


def check_version(tensor: Tensor, version: int) -> None:
    """Raises RuntimeError if `tensor` has been written to since it was at `version`."""
    if tensor._version != version:
        raise RuntimeError(
            "a tensor that backward needs was modified in place after it had been saved or quantized: "
            f"{tuple(tensor.shape)} is at version {tensor._version}, expected {version}"
        )


Recipe = tuple[Gradient, tuple[Tensor, ...]]
"""What made a fake-quantized tensor, and of what (`x, scale, low, high, *extra`)."""

_recipes: list[tuple[Tensor, Recipe]] | None = None
"""What compilers see being quantized, while somebody asks for it: a tensor keeps no attribute for them."""


def with_recipe(quantize: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Recipe | None]:
    """`quantize(x)` for a compiler, and its recipe if it has one."""
    global _recipes
    previous, _recipes = _recipes, []
    y = quantize(x)
    found, _recipes = _recipes, previous
    return found[-1] if found and found[-1][0] is y else (y, None)


class _Left(threading.local):
    """Tensors that were left unwritten, while somebody in this thread asks for them."""

    tensors: list[Tensor] | None = None


_left = _Left()


def unwritten(quantize: Callable[[Tensor], Tensor], x: Tensor) -> Tensor | None:
    """`quantize(x)`, its values left unwritten if it has a recipe (`made`) for them.

    Returns:
        `None` if values were left unwritten that the result is computed from: it has to be made again.
    """
    previous, left = _left.tensors, []
    _left.tensors = left
    try:
        y = quantize(x)
    finally:
        _left.tensors = previous
    return y if not left or y is left[0] else None
