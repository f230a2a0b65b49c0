"""Where a tensor comes from: how a quantizer made it, for those who would rather make it again than keep it, and for
those who need no more than that.

    `Recipe`        what a large fake-quantized tensor carries as the attribute `made`: layers save that for backward
                    instead of the tensor (`qat.layers.sources`), products of codes begin with it (`qat.layers.codes`)
    `with_recipe`   the same for compilers, to whom a tensor keeps no attribute
    `unwritten`     a tensor that is to be nothing but its recipe
    `mark`          notes that a tensor is on a grid already (`qat.layers.sequence`), so that the quantizer lets it pass
"""

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from qat.kernels.gradient import Gradient


class Recipe(NamedTuple):
    """How a fake-quantized tensor was made.

    Attributes:
        gradient: The function whose forward pass made it.
        tensors: What that took: `x, scale, low, high, *extra`.
        version: Version of `x` when it was quantized (0 to compilers, who know what is written when).
        own: Version of the quantized tensor when it was made; if that has changed, the recipe no longer describes it.
        decoded: The fake-quantized tensor of its codes, where somebody has them.
    """

    gradient: "Gradient"
    tensors: tuple[Tensor, ...]
    version: int = 0
    own: int = 0
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


class _Here(threading.local):
    """Notes on what the quantizers in this thread do, taken while somebody asks for them.

    Attributes:
        recipes: For each who asks, what compilers see being quantized.
        left: Tensors that were left unwritten.
    """

    left: list[Tensor] | None = None

    def __init__(self) -> None:
        self.recipes: list[list[tuple[Tensor, Recipe]]] = []


here = _Here()


def with_recipe(quantize: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Recipe | None]:
    """`quantize(x)` for a compiler, and its recipe if it has one."""
    here.recipes.append([])
    y = quantize(x)
    found = here.recipes.pop()
    return found[-1] if found and found[-1][0] is y else (y, None)


def unwritten(quantize: Callable[[Tensor], Tensor], x: Tensor) -> Tensor | None:
    """`quantize(x)`, its values left unwritten if it has a recipe (`made`) for them.

    Returns:
        `None` if the result depends on values that were left unwritten: call the quantizer again.
    """
    previous, left = here.left, []
    here.left = left
    try:
        y = quantize(x)
    finally:
        here.left = previous
    return y if not left or y is left[0] else None


def mark(x: Tensor, quantizer: Any) -> None:
    """Notes that `x` is what `quantizer` has made."""
    x.on_grid = quantizer, x._version  # pyright: ignore[reportAttributeAccessIssue]


def marked_by(quantizer: Any, x: Tensor) -> bool:
    """Whether it is `quantizer` that has made the marked `x`, and nobody has written to that since."""
    maker, version = x.on_grid  # pyright: ignore[reportAttributeAccessIssue]
    return maker is quantizer and version == x._version
