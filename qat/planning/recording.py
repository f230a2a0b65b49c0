"""The recording of one forward pass: `qat.planning.probe` writes it, planning and the audit ask it."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

Key = tuple[int, int]
"""A tensor at a moment: (id, version)."""


@dataclass
class Call:
    """One call of a module or a function.

    Attributes:
        name: Path of the module, or of the module whose forward called the function.
        what: The module, or the function.
        inputs: Float tensors among the arguments, in order (keyword arguments last).
        output: The first float tensor that came out.
        shape: Shape of that output.
        input_shape: Shape of the first operand.
        operands: What a quantizer may be put on: the operands of a site, or its output
            (`qat.planning.addressable.places` says which inputs of a layer).
        macs: Multiply-accumulates of each product in it, over the whole batch.
        site: `owner.kind_index` if this is a functional site.
        kind: Kind of a functional site, or of a function that computes.
        parameter_paths: The path of each operand that is a parameter, `None` for the others.
        weight: Whether `parameter` is the second operand of a product, with an axis of output channels.
        vector: Whether a parameter among the operands has at most one axis of more than one value.
        inside: Whether it happened inside the root's own forward.
        constant: Whether all its operands are computed from parameters, buffers and numbers alone (the angles of a
            rotary embedding, a mask): the same for all data, so an engine computes it ahead, in float.
        infinite: Whether one of its operands is such a constant and holds infinities, for which there is no grid: a
            mask.
    """

    name: str
    what: Any
    inputs: list[Key]
    output: Key | None = None
    shape: tuple[int, ...] = ()
    input_shape: tuple[int, ...] = ()
    operands: list[Key] = field(default_factory=list)
    macs: list[int] = field(default_factory=list)
    site: str | None = None
    kind: str | None = None
    parameter_paths: list[str | None] = field(default_factory=list)
    weight: bool = False
    vector: bool = False
    inside: bool = False
    constant: bool = False
    infinite: bool = False

    @property
    def parameter(self) -> str | None:
        """Path of the first parameter among the operands."""
        return next((path for path in self.parameter_paths if path is not None), None)


@dataclass
class Recording:
    """A record of one forward pass; see the module's docstring.

    Attributes:
        modules, functions, order: Calls of layers, of functions that are sites or compute, and both, as they came.
        source: For a tensor that only rearranges another's values, that other.
        nonnegative: Tensors known to be >= 0.
        shapes: Of the tensors that were there when they were read; none of what only a fused kernel sees.
        readers: How often each tensor was read.
        joins: For each concatenation, its output and what it joins.
        empty: Tensors without elements, such as a cache of keys before the first token.
        passes: For each forward that ended: the module, the kinds of the sites it ran in their order, and whether it
            was inside the root's.
        samples: Size of the batch: the first axis of the first tensor that the root (or else a layer) was given.
    """

    modules: list[Call] = field(default_factory=list)
    functions: list[Call] = field(default_factory=list)
    source: dict[Key, Key] = field(default_factory=dict)
    nonnegative: set[Key] = field(default_factory=set)
    shapes: dict[Key, tuple[int, ...]] = field(default_factory=dict)
    readers: dict[Key, int] = field(default_factory=dict)
    order: list[Call] = field(default_factory=list)
    joins: list[tuple[Key, list[Key]]] = field(default_factory=list)
    empty: set[Key] = field(default_factory=set)
    passes: list[tuple[str, list[str], bool]] = field(default_factory=list)
    samples: int = 1

    def restrict_to_forward(self) -> None:
        """Forgets what ran outside the root's forward (losses, metrics), if the root was called at all."""
        if any(call.inside for call in self.order):
            self.modules, self.functions, self.order = (
                [c for c in calls if c.inside] for calls in (self.modules, self.functions, self.order)
            )
            self.passes = [p for p in self.passes if p[2]]

    def root(self, key: Key) -> Key:
        """The tensor that `key` holds the values of."""
        while key in self.source:
            key = self.source[key]
        return key

    def read(self, keys: Iterable[Key]) -> None:
        for key in keys:
            self.readers[key] = self.readers.get(key, 0) + 1

    def only_sites_read(self, parameter: str) -> bool:
        """Whether every function that took a parameter took it as the weight of a site."""
        calls = [c for c in self.functions if c.weight and c.parameter == parameter]
        return self.readers.get(calls[0].operands[1], 0) == len(calls)

    def read_by_functions(self, weight: Tensor | None, parameter: str) -> bool:
        """Whether a function outside of layers took a layer's weight, other than as the weight of a site."""
        if weight is None:
            return False
        sites = sum(c.weight and c.parameter == parameter for c in self.functions)
        return self.readers.get((id(weight), weight._version), 0) > sites

    def site_orders(self) -> dict[str, list[list[str]]]:
        """The kinds of the sites that forwards of a module ran: one list, or several if its forwards differ."""
        orders: dict[str, list[list[str]]] = {}
        for owner, seen, _ in self.passes:
            found = orders.setdefault(owner, [])
            if seen not in found:
                found.append(seen)
        return {owner: found for owner, found in orders.items() if any(found)}
