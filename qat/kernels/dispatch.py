"""Running pure tensor functions at the speed of memory: compiled where it pays, plain torch where it does not.

Fake quantization is a handful of arithmetic operations per element. Run one by one, each reads and writes the whole
tensor; fused by torch.compile they read it once and write it once. A `Kernel` is such a function with both ways to
run it:

    inside somebody's torch.compile   inlined, so that it fuses with their code too
    small tensors                     plain torch, which is as fast there
    large tensors                     compiled once for all shapes (`qat.kernels.launch`); where no compiler is found,
                                      plain torch, with one warning

Compiling costs seconds, which a run of a minute never earns back, so it starts once many elements have passed
(`configure`). torch keeps the result on disk: the next process loads it.
"""

import warnings
from collections import defaultdict
from collections.abc import Callable
from operator import attrgetter, methodcaller
from typing import Any, Literal

import torch
from torch import Tensor

from qat.kernels.launch import Launch, Program, launchable, program, signature
from qat.kernels.layout import layout_of

SMALL = 1 << 11
"""Tensors below this many elements run in plain torch: a program costs as much to launch as it saves."""
SMALL_FORWARD = 1 << 15
"""The threshold for passes without gradients. It is higher, because most of what compiling saves is in backward."""

_KIND, _STRIDES = attrgetter("dtype", "shape"), methodcaller("stride")
KEPT = 4096
"""Shapes that a kernel remembers how to run on."""

Mode = Literal["auto", "always", "never"]
NEVER = float("inf")
_settings = {"patience": 4e9, "products": True}
"""`patience`: how many elements pass through plain torch before kernels are compiled; `products`: whether products may
run on codes (`qat.layers.codes`).
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
            made itself. What it clips may hold NaN and comes first, limits never do (`qat.kernels.clips`).
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
