"""One grid per tensor: which readers share one, which tensors need one.

An edge is a reader and the tensor that it reads. All edges of a tensor whose specs agree share one quantizer; where
they differ (a residual add at 8 bits beside a convolution at 4), the coarser reader reads what the finest grid left of
the tensor, as an integer engine does, which stores it once. Operations that change no value pass a grid through, and so
do concatenations, if all that they join is to share one.
"""

import dataclasses
from collections.abc import Collection
from typing import NamedTuple

from qat.grid.spec import QuantSpec
from qat.planning.addressable import summed_axis
from qat.planning.decisions import Decisions
from qat.planning.functions import FUNCTIONS, KV_CACHE, PROBABILITIES
from qat.planning.recording import Call, Key, Recording

Chains = dict[str, list[list[str]]]
"""For each layer or site, for each operand: labels of the grids it passes in turn."""


class _Edge(NamedTuple):
    name: str
    operand: int
    label: str
    tensor: Key
    spec: QuantSpec
    cached: bool = False


class _Tensors:
    """Which tensors are one, and whether it is known to be >= 0.

    Args:
        recording: What follows operations that change no value.
        joined: Whether a concatenation and all that it joins are one tensor.
    """

    def __init__(self, recording: Recording, joined: bool) -> None:
        self.recording = recording
        self.parent: dict[Key, Key] = {}
        members: set[Key] = set()
        for output, inputs in recording.joins if joined else ():
            roots = [recording.root(key) for key in (output, *inputs)]
            members.update(roots)
            for root in roots[1:]:
                if (other := self._find(root)) != (first := self._find(roots[0])):
                    self.parent[other] = first
        self.negative = {self._find(root) for root in members if root not in recording.nonnegative}

    def _find(self, root: Key) -> Key:
        while root in self.parent:
            root = self.parent[root]
        return root

    def of(self, key: Key) -> Key:
        return self._find(self.recording.root(key))

    def is_nonnegative(self, key: Key) -> bool:
        return self.recording.root(key) in self.recording.nonnegative and self.of(key) not in self.negative


def activation_grids(
    decisions: Decisions, joined: bool, floating: Collection[tuple[str, int]] = ()
) -> tuple[dict[str, QuantSpec], Chains]:
    """The activation grids of a plan.

    Args:
        decisions: The decisions of the policy.
        joined: Whether inputs and output of a concatenation share a grid.
        floating: Operands of sites (by their index) that have no grid whatever was decided.

    Returns:
        The spec of each grid by its label (the place that reads it first), and the grids of each operand.
    """
    calls, tensors = decisions.calls, _Tensors(decisions.recording, joined)
    edges = [
        edge
        for name, (first, *more) in calls.items()
        if (spec := decisions.act(name)) is not None
        for edge in _edges(tensors, name, first, more, spec)
        if (name, edge.operand) not in floating
    ]
    cached = {edge.name for edge in edges if edge.cached}
    edges = [edge for edge in edges if edge.cached or edge.operand == 0 or edge.name not in cached]
    # What no integer engine reads from this output goes without a grid of its own; see `Function.output`.
    read = {edge.tensor for edge in edges if not _is_output(calls[edge.name][0])}
    edges = [edge for edge in edges if edge.tensor not in read or not _is_output(calls[edge.name][0])]
    grids: dict[Key, dict[QuantSpec, str]] = {}
    for edge in edges:
        grids.setdefault(edge.tensor, {}).setdefault(edge.spec, edge.label)
    activations: dict[str, QuantSpec] = {}
    chains: Chains = {}
    for edge in edges:
        finest = max(grids[edge.tensor], key=lambda s: s.width)
        chain = [edge.spec] if edge.spec.width == finest.width else [finest, edge.spec]
        activations.update((grids[edge.tensor][s], s) for s in chain)
        operands = chains.setdefault(edge.name, [[] for _ in calls[edge.name][0].operands])
        operands[edge.operand] = [grids[edge.tensor][s] for s in chain]
    return activations, chains


def _edges(tensors: _Tensors, name: str, first: Call, more: list[Call], spec: QuantSpec) -> list[_Edge]:
    if first.kind == KV_CACHE:  # a place for policies; the attention above reads them
        above = name.removesuffix(f".{KV_CACHE}")
        plain = _edges(tensors, above, dataclasses.replace(first, kind="attention"), more, spec)
        return [e._replace(operand=e.operand + 1, label=f"{above}.input_{e.operand + 1}", cached=True) for e in plain]
    edges = []
    for index, key in enumerate(first.operands):
        if index == 1 and first.weight:  # that has a grid of weights
            continue
        if first.kind == "cat" and key in tensors.recording.empty:  # it will hold what the others have left
            continue
        label = f"{name}.input" if first.site is None and index == 0 else f"{name}.input_{index}"
        label = name if first.kind == PROBABILITIES else f"{name}.output" if _is_output(first) else label
        nonnegative = all(tensors.is_nonnegative(k) for k in (key, *(c.operands[index] for c in more)))
        resolved = spec.resolved(
            nonnegative=nonnegative or first.kind == PROBABILITIES,
            weight=False,
            channels=summed_axis(first) if index == 0 else -1,
        )
        edges.append(_Edge(name, index, label, tensors.of(key), resolved))
    return edges


def _is_output(call: Call) -> bool:
    known = FUNCTIONS.get(call.what)
    return known is not None and known.output
