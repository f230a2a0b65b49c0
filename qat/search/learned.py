"""Learned widths: one for each group of grids that must agree, and the quantizers that have them.

Grids that belong to one tensor share its width, layers that are tied share both of theirs. A grid with one width to
choose from gets it and keeps it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import UserError
from qat.grid.spec import QuantSpec
from qat.insert import named_quantizers
from qat.layers.chain import last_grid
from qat.measure.stats import readers_of
from qat.quantizers import Quantizer
from qat.search.fractional import FractionalGrid, Width, check_learnable, first_scales
from qat.search.space import Space

Starts = dict[str, list[dict[int, Tensor]]]
"""Tensor -> for each of its quantizers, the first scale of each width."""


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
    everything = [quantizer for _, quantizer in named_quantizers(model)]
    for quantizer in everything:
        quantizer.observe()
    try:
        run()
        found: dict[Quantizer, Tensor] = {}
        for tensor, layers in space.tensors.items():
            for quantizer in quantizers_at(space, model, tensor):
                if quantizer.is_weight:
                    layer: Any = model.get_submodule(layers[0])
                    found[quantizer] = layer.weight.detach()
                else:
                    found[quantizer] = torch.cat(quantizer.samples)
    finally:
        for quantizer in everything:
            quantizer.observe(False)
    return found
