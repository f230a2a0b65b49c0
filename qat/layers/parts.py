"""Layers made of several: a recurrent layer has two matrices per layer and direction, attention has projections and
matrix products between them.

Each matrix becomes a `Part`, a child of the layer's twin with grids of its own, that policies address like a layer:
`rnn.hh_l0`, `attn.q_proj`. Float parameters stay where they were, in the layer, under their own keys; a part reads them
from there until conversion, which gives it its codes. Products of two activations become functional sites
(`attn.matmul_0`), as they are where a user's forward computes them.

The float layer is one call, whose inside nobody sees; so the twin itself tells the recording which parts ran on what
(`Composite.calls`).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.layers.base import QuantizedLayer
from qat.layers.sources import from_sources
from qat.layers.twin import Inserted
from qat.planning.macs import layer_macs
from qat.planning.recording import Call, Key


class Part(QuantizedLayer, nn.Module):
    """A linear map inside a layer, `x [..., in] -> [..., out]`."""

    serves = nn.Linear
    channel_axis = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.run(F.linear, x)

    def geometry(self) -> tuple[()]:
        return ()

    def linear(self, x: Tensor) -> Tensor:
        """The map of an `x` that is on its grid already."""
        return F.linear(x, self.quantized_weight(), self.quantized_bias())

    def rounded(self) -> "RoundedPart":
        """The map with weight and bias put on their grids now, for several steps."""
        return RoundedPart(self, self.quantized_weight(), self.quantized_bias())


@dataclass  # not frozen: compilers up to torch 2.11 cannot make one
class RoundedPart:
    """A part whose weight and bias are on their grids already.

    Attributes:
        part: The part, which has the grid of the input.
        weight, bias: Weight and bias of the part, quantized. Each step saves the same weight for backward, so it is
            kept, and not made again for each.
    """

    part: Part
    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        x = self.part.quantized_input(x)
        made = hasattr(x, "made") and not torch.compiler.is_dynamo_compiling()
        return from_sources((x,), F.linear, x, self.weight, self.bias) if made else self.linear(x)

    def quantized_input(self, x: Tensor) -> Tensor:
        return self.part.quantized_input(x)

    def linear(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


Rows = tuple[str, int, int | None]
"""Name of a parameter, and the first and the number of its rows (`None`: all of them)."""


class BoundPart(Part):
    """A part whose weight and bias are the layer's.

    Attributes:
        owner: The layer, in a tuple (it is no child of its part).
        rows: Name and rows of the layer's parameters that are weight and bias; the bias is `None` if there is none.
    """

    def __init__(self, owner: nn.Module, weight: str, bias: str | None = None, rows: tuple[int, int] | None = None):
        super().__init__()
        first, count = rows or (0, None)
        whole = owner._parameters[weight]
        assert whole is not None
        stacked = count is not None and len(whole) > count
        self.owner = (owner,)
        self.rows: tuple[Rows, Rows | None] = (
            (weight, first if stacked else 0, count if stacked else None),
            (bias, first, count) if bias else None,
        )
        self.training = owner.training

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._read(self.rows[0])

    @property
    def bias(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return None if self.rows[1] is None else self._read(self.rows[1])

    def weight_place(self) -> tuple[nn.Module, str]:
        return self.owner[0], self.rows[0][0]

    def weight_within(self, whole: Tensor) -> Tensor:
        return _cut(whole, self.rows[0])

    def _read(self, rows: Rows) -> Tensor:
        return _cut(getattr(self.owner[0], rows[0]), rows)

    def identity(self) -> Any:
        """Equal for parts of one weight."""
        return id(getattr(self.owner[0], self.rows[0][0])), self.rows[0][1:]

    def release(self) -> None:
        """Gives up weight and bias; the layer loses those parameters that no other part reads."""
        owner, names = self.owner[0], {rows[0] for rows in self.rows if rows}
        self.__class__ = Part  # pyright: ignore[reportAttributeAccessIssue]
        del self.owner, self.rows
        others = [m for m in owner.children() if isinstance(m, BoundPart)]
        for name in names - {rows[0] for other in others for rows in other.rows if rows}:
            owner.drop_parameter(name)  # pyright: ignore[reportCallIssue]


def _cut(whole: Tensor, rows: Rows) -> Tensor:
    _, first, count = rows
    return whole if count is None else whole.narrow(0, first, count)


class Watch(Protocol):
    """Methods of a recording for layers that tell it about their inside."""

    def key(self, value: Tensor) -> Key: ...

    def fresh(self, nonnegative: bool = False) -> Key:
        """A name for a tensor that nobody has seen."""
        ...


class Composite(Inserted):
    """A layer whose twin runs on parts."""

    serves: ClassVar[type[nn.Module]]
    channel_axis: ClassVar[int | None] = None

    @classmethod
    def parts(cls, layer: Any) -> dict[str, Part]:
        """New parts of `layer`, a float layer or its twin, by name."""
        raise NotImplementedError

    @classmethod
    def calls(cls, layer: Any, name: str, watch: Watch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Call]:
        """The calls of its parts and sites that one call of the float `layer`, at path `name`, stands for."""
        raise NotImplementedError

    def part(self, name: str) -> Part:
        return self._modules[name]

    def drop_parameter(self, name: str) -> None:
        self._parameters[name] = None


def part_call(name: str, part: Part, input: Key, shape: tuple[int, ...]) -> Call:
    """The call of a part with an output of `shape`, for the whole batch."""
    return Call(name.removeprefix("."), part, [input], shape=shape, macs=[layer_macs(part, shape)])


def product_call(owner: str, index: int, operands: list[Key], shape: tuple[int, ...], inner: int) -> Call:
    """The call of a matrix product inside the layer `owner`.

    Args:
        owner: Path of the layer.
        index: Number of the product in the layer.
        operands: The two tensors.
        shape: Shape of the result.
        inner: Length of the sums.
    """
    site = f"{owner}.matmul_{index}".removeprefix(".")
    macs = [math.prod(shape) * inner]
    return Call(owner, torch.matmul, operands, shape=shape, operands=operands, macs=macs, site=site, kind="matmul")


def part_parameters(part: Part) -> Iterator[tuple[Any, Tensor]]:
    """A part's weight and bias, each with something that tells it from all others."""
    if isinstance(part, BoundPart):
        for rows in filter(None, part.rows):
            whole = getattr(part.owner[0], rows[0])
            yield (id(whole), rows[1:]), part._read(rows)
