"""Learned widths: one for each group of grids that must agree, what they may become, and the quantizers that have them.

Grids that belong to one tensor share its width, layers that are tied share both of theirs. A grid with one width to
choose from gets it and keeps it.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qat.calibrate import observing
from qat.errors import UserError
from qat.grid.spec import QuantSpec
from qat.insert import named_quantizers
from qat.layers.chain import last_grid
from qat.measure.stats import readers_of
from qat.quantizers import Quantizer
from qat.search.allocate import Cost, Problem, solve
from qat.search.costs import Files, make_costs, make_harms
from qat.search.fractional import FractionalGrid, RelaxedCost, Width, all_pairs, check_learnable, first_scales
from qat.search.space import Pair, Space

Starts = dict[str, list[dict[int, Tensor]]]
"""Tensor -> for each of its quantizers, the first scale of each width."""


@dataclass(frozen=True)
class Learned:
    """What is learned, and within which limits.

    Attributes:
        space: The layers and their choices.
        budget: Name of a cost -> its limit.
        files: Sizes of files that costs come from.
        costs: Every cost that is known, of all combinations of widths: what lies between choices has a cost, too.
        relaxed: Those that are limited, between whole widths.
        widths: The width of each grid.
    """

    space: Space
    budget: Mapping[str, float]
    files: Files
    costs: Mapping[str, Cost]
    relaxed: Mapping[str, RelaxedCost]
    widths: Mapping[str, Width]

    @property
    def values(self) -> dict[str, float]:
        """The widths as numbers."""
        return {tensor: width.at for tensor, width in self.widths.items()}

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What an optimizer trains."""
        return list({id(width): width.value for width in self.widths.values() if not width.fixed}.values())

    @torch.no_grad()
    def restore(self, values: Mapping[str, float]) -> None:
        """Gives the widths the values that they had before."""
        for tensor, width in self.widths.items():
            width.value.fill_(values[tensor])
            width.clamp()

    def totals(self) -> dict[str, Tensor]:
        """The costs that are limited, differentiable."""
        return {name: cost.total(self.widths) for name, cost in self.relaxed.items()}

    def nearest(self) -> dict[str, Pair]:
        """The allocation within the budgets that is nearest to the widths."""
        return _nearest(self.space, self.costs, self.budget, self.values)


def make_learned(space: Space, model: nn.Module, budget: Mapping[str, float], files: Files) -> Learned:
    """Finds the costs of all choices and the widths to learn.

    Args:
        space: The layers and their choices.
        model: The same model with quantizers, calibrated or not.
        budget: Name of a cost -> its limit.
        files: Sizes of files, where they are limited.

    Raises:
        UserError: if the budgets cannot be met, or a width cannot be learned.
    """
    every = {tensor: space.widths(tensor) for tensor in space.tensors}
    layers = [dataclasses.replace(layer, options=all_pairs(layer, every)) for layer in space.layers]
    costs = make_costs(dataclasses.replace(space, layers=layers), files)
    _nearest(space, costs, budget, {tensor: max(widths) for tensor, widths in every.items()})
    widths = shared_widths(space, model)
    if all(width.fixed for width in widths.values()):
        raise UserError("every grid has one width to choose from; give more weight_bits or act_bits")
    check_grids(space, model, widths)
    relaxed = {name: RelaxedCost(costs[name], layers) for name in budget}
    return Learned(space, budget, files, costs, relaxed, widths)


def _nearest(
    space: Space, costs: Mapping[str, Cost], budget: Mapping[str, float], values: Mapping[str, float]
) -> dict[str, Pair]:
    harms = make_harms(space, lambda tensor, bits: (bits - values[tensor]) ** 2)
    try:
        return solve(Problem(space.layers, harms, costs, space.tied), budget)
    except UserError as error:
        raise UserError(f"budget: {error}") from None


def quantizers_at(space: Space, model: nn.Module, tensor: str) -> list[Quantizer]:
    """The quantizers of one grid of the space: several where its readers have different bits at present."""
    found: list[Quantizer] = []
    for name in space.tensors[tensor]:
        layer: Any = model.get_submodule(name)
        quantizer = layer.weight_quantizer if tensor.endswith(".weight") else last_grid(layer.input_quantizer)
        if quantizer not in found:
            found.append(quantizer)
    return found


def shared_widths(space: Space, model: nn.Module) -> dict[str, Width]:
    """The width of each grid, beginning at the bits it has now.

    Raises:
        UserError: if grids that must agree have no width in common.
    """
    groups = _groups(space)
    found: dict[str, Width] = {}
    for group in groups:
        options = set.intersection(*(set(space.widths(tensor)) for tensor in group))
        if not options:
            raise UserError(f"tied grids have no width in common: {', '.join(sorted(group))}")
        first = quantizers_at(space, model, group[0])[0]
        found |= dict.fromkeys(group, Width(sorted(options), first.spec.width, first.scale.device))
    return found


def _groups(space: Space) -> list[list[str]]:
    """Grids that must agree."""
    group_of = {tensor: [tensor] for tensor in space.tensors}
    by_name = {layer.name: layer for layer in space.layers}
    for tied in space.tied:
        for part in ("weight", "act"):
            grids = [getattr(by_name[name], part) for name in tied]
            merged = list(dict.fromkeys(t for grid in grids if grid is not None for t in group_of[grid]))
            group_of |= dict.fromkeys(merged, merged)
    return list({id(group): group for group in group_of.values()}.values())


def check_grids(space: Space, model: nn.Module, widths: Mapping[str, Width]) -> None:
    """Looks whether every width can be learned.

    Args:
        space, widths: See `fractional_grids`.
        model: The same model with quantizers, calibrated or not.

    Raises:
        UserError: if a quantizer's cannot, or if something else reads through it.
    """
    names, readers = {quantizer: name for name, quantizer in named_quantizers(model)}, readers_of(model)
    for tensor, layers in space.tensors.items():
        for quantizer in quantizers_at(space, model, tensor):
            if widths[tensor].widths != [quantizer.spec.width]:
                check_learnable(names[quantizer], quantizer)
                _check_alone(names[quantizer], readers[quantizer], layers)


def fractional_grids(
    space: Space,
    model: nn.Module,
    widths: Mapping[str, Width],
    run: Callable[[], Any],
    known: Starts | None = None,
    copies: Sequence[nn.Module] = (),
) -> tuple[dict[str, list[FractionalGrid]], Starts]:
    """Every grid to choose for, ready to be attached, once `check_grids` has found nothing.

    Args:
        space: The layers and their choices.
        model: The same model with calibrated quantizers.
        widths: From `shared_widths`.
        run: Lets calibration batches pass.
        known: Scales from an earlier start.
        copies: Copies of the model whose grids get the same whole widths.
    """
    names = {quantizer: name for name, quantizer in named_quantizers(model)}
    copied = [dict(named_quantizers(model)) for model in copies]
    seen = _samples(space, model, run) if known is None else {}
    grids, starts = {}, {}
    for tensor in space.tensors:
        grids[tensor], starts[tensor] = [], []
        for i, quantizer in enumerate(quantizers_at(space, model, tensor)):
            scales: dict[int, Tensor] = {}
            if widths[tensor].widths != [quantizer.spec.width]:
                specs = _specs(space, tensor, widths[tensor].widths, quantizer)
                scales = first_scales(quantizer, specs, seen[quantizer]) if known is None else known[tensor][i]
                same = [quantizers[names[quantizer]] for quantizers in copied]
                grids[tensor].append(FractionalGrid(quantizer, specs, scales, widths[tensor], same))
            starts[tensor].append(scales)
    return grids, starts


def _check_alone(name: str, readers: Sequence[str], layers: Sequence[str]) -> None:
    if others := [reader for reader in readers if reader not in layers]:
        raise UserError(
            f"'{name}' is read by '{others[0]}' too, whose bits are not learned: give that other bits than the layer "
            "has (quant.sites.bits), or fix the layer's with least"
        )


def _specs(space: Space, tensor: str, widths: Sequence[int], quantizer: Quantizer) -> dict[int, QuantSpec]:
    """At each width, and at the one it has."""
    found = {quantizer.spec.width: quantizer.spec}
    for bits in widths:
        plan = space.plans[bits]
        layer = plan.layers[space.tensors[tensor][0]]
        assert layer.weight is not None  # only layers whose weight has a grid are in a space
        is_weight = tensor.endswith(".weight")
        found[bits] = plan.weights[layer.weight] if is_weight else plan.activations[layer.input[-1]]
    return found


@torch.no_grad()
def _samples(space: Space, model: nn.Module, run: Callable[[], Any]) -> dict[Quantizer, Tensor]:
    """The tensor that each chosen grid quantizes: its weight, or a sample of what passes the model in float."""
    with observing(model):
        run()
        found: dict[Quantizer, Tensor] = {}
        for tensor, layers in space.tensors.items():
            for quantizer in quantizers_at(space, model, tensor):
                if quantizer.is_weight:
                    layer: Any = model.get_submodule(layers[0])
                    found[quantizer] = layer.weight.detach()
                else:
                    found[quantizer] = torch.cat(quantizer.samples)
    return found
