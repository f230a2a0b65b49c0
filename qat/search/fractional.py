"""Bit-widths that are learned: a grid between two widths, and what a model costs there.

A width `b` is a number between the widths that a grid may have. With `l <= b <= h` the two next to it, each with a
grid of its own, Q_l and Q_h,

    t = (b - l) / (h - l)      y = (1 - t) Q_l(x) + t Q_h(x)
    dL/db = sum dL/dy (Q_h(x) - Q_l(x)) / (h - l)

(Yang and Jin, "FracBits: Mixed Precision Quantization via Fractional Bit-Widths", AAAI 2021, arXiv 2007.02017; likewise
Nikolic et al., "BitPruning", arXiv 2002.03090.) Costs are interpolated the same way, linearly in the width of the
weight and in that of the input, which for bit operations and average bits is exact.

Differs from both: the widths are those that may be chosen ([2, 4, 8] as well as consecutive ones). And each width
starts from a calibrated scale of its own, for 2 bits want a much narrower range than 8; the one scale that is trained
is that of the nearest width, and the others keep their ratio to it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn

from qat.errors import UserError
from qat.grid.scales import acting
from qat.grid.spec import QuantSpec
from qat.quantizers import Quantizer, create
from qat.quantizers.dsq import DSQ
from qat.search.allocate import Cost
from qat.search.space import Layer, Pair


class Width:
    """One learned width, of all grids that must agree.

    Args:
        widths: Bits that it may become, ascending; a single one is fixed.
        start: Bits that it begins at.
        device: Device of the grids.

    Attributes:
        value: The parameter, `()`.
        at: The value as a number, so that a forward pass need not wait for a device.
    """

    def __init__(self, widths: Sequence[int], start: float, device: torch.device | None = None) -> None:
        self.widths = list(widths)
        self.value = nn.Parameter(torch.tensor(float(start), device=device))
        self.clamp()

    @torch.no_grad()
    def clamp(self) -> None:
        """Puts it back between the widths, after a step."""
        self.value.clamp_(self.widths[0], self.widths[-1])
        self.at = self.value.item()

    @property
    def fixed(self) -> bool:
        return len(self.widths) == 1

    @property
    def nearest(self) -> int:
        """The next whole width; of two, the wider."""
        return min(reversed(self.widths), key=lambda width: abs(width - self.at))

    def between(self) -> tuple[int, int, Tensor]:
        """The widths on both sides, and how far it is from the first to the second."""
        high = next(i for i, width in enumerate(self.widths) if width >= self.at and i)
        low = self.widths[high - 1]
        return low, self.widths[high], (self.value - low) / (self.widths[high] - low)


class FractionalGrid:
    """A quantizer that computes between two widths while it trains; otherwise it has the nearest.

    Args:
        quantizer: The quantizer, with its range.
        specs: The spec at each width.
        starts: The first scale at each width, of the shape of `quantizer.scale`.
        width: The learned width.
        copies: The same quantizer in copies of the model (weight averages), which gets the same whole widths.
    """

    def __init__(
        self,
        quantizer: Quantizer,
        specs: Mapping[int, QuantSpec],
        starts: Mapping[int, Tensor],
        width: Width,
        copies: Sequence[Quantizer] = (),
    ) -> None:
        device = quantizer.scale.device
        self.quantizer, self.specs, self.width, self.copies = quantizer, specs, width, copies
        self.starts = {bits: scale.to(device) for bits, scale in starts.items()}
        ends = {bits: (spec.quant_min, spec.quant_max) for bits, spec in specs.items()}
        self.limits = {b: [torch.full((1,), float(end), device=device) for end in both] for b, both in ends.items()}

    def attach(self) -> None:
        """Takes the place of the quantizer's forward, unless there is but one width, which it gets for good."""
        self.become(self.width.nearest)
        if not self.width.fixed:
            self.quantizer.__dict__["forward"] = self.forward

    def detach(self) -> None:
        self.quantizer.__dict__.pop("forward", None)

    def become(self, bits: int) -> bool:
        """Gives the quantizer a whole width; returns whether it had another."""
        if self.quantizer.spec == self.specs[bits]:
            return False
        for quantizer in (self.quantizer, *self.copies):
            quantizer.change_spec(self.specs[bits], self._scale(bits, quantizer))
        return True

    def forward(self, x: Tensor) -> Tensor:
        quantizer = self.quantizer
        if not (quantizer.on and quantizer.training):
            return type(quantizer).forward(quantizer, x)
        low, high, share = self.width.between()
        below, above = self.rounded(x, low), self.rounded(x, high)
        return (below + (above - below) * share).to(x.dtype)

    def _scale(self, bits: int, quantizer: Quantizer) -> Tensor:
        """The scale of a width, which is exactly its first one where training has not moved it."""
        now, first, then = quantizer.scale, self.starts[quantizer.spec.width], self.starts[bits]
        return then.to(now.device) * (now / first.to(now.device))

    def rounded(self, x: Tensor, bits: int) -> Tensor:
        """`x` on the grid of one width, with its gradients to `x` and to the scale."""
        quantizer = self.quantizer
        scale = acting(self._scale(bits, quantizer), quantizer.spec)
        inner, scale = quantizer.partition.grouped(x), quantizer.partition.spread(scale, x.ndim)
        low, high = self.limits[bits]
        return quantizer.fake_quantize(inner, scale, low, high).view(x.shape)


def check_learnable(name: str, quantizer: Quantizer) -> None:
    """Raises a `UserError` that names the quantizer if its width cannot be learned."""
    kind, spec = type(quantizer), quantizer.spec
    own = any(
        getattr(kind, method) is not getattr(Quantizer, method) for method in ("transform", "follow", "change_bits")
    )
    learns = {parameter for parameter, _ in quantizer.named_parameters()} - {"scale"}
    if own or learns or not (kind.uniform and kind.static):
        raise UserError(
            f"'{name}': quantizer={spec.quantizer} has more than one scale to adapt to a width; learned widths "
            "need lsq, fixed, ewgs or pact"
        )
    if isinstance(quantizer, DSQ):
        raise UserError(f"'{name}': quantizer=dsq hardens with each rounding, and learned widths round twice; set ewgs")
    if not spec.symmetric or spec.rounding_mode != "nearest":
        raise UserError(f"'{name}': learned widths need symmetric: true and rounding_mode: nearest")


@torch.no_grad()
def first_scales(quantizer: Quantizer, specs: Mapping[int, QuantSpec], x: Tensor) -> dict[int, Tensor]:
    """The calibrated scale of each width.

    Args:
        quantizer: The quantizer.
        specs: The spec at each width.
        x: The weight, or a sample of the activation.
    """
    found = {}
    for bits, spec in specs.items():
        trial = create(spec, x.shape if quantizer.is_weight else None, quantizer.axis).to(x.device)
        trial.calibrate(x)
        found[bits] = trial.step().view(quantizer.scale.shape)
    return found


@dataclass(frozen=True)
class RelaxedCost:
    """A cost between whole widths.

    Args:
        cost: The cost; its table has every pair of widths of every layer.
        layers: The layers, with all these pairs as options.
    """

    cost: Cost
    layers: Sequence[Layer]

    def total(self, widths: Mapping[str, Width]) -> Tensor:
        """Cost of a model whose grids have these widths, differentiable."""
        total: Tensor | float = self.cost.fixed
        for layer in self.layers:
            acts = [(None, 1.0)] if layer.act is None else _corners(widths[layer.act])
            for (weight, by_weight), (act, by_act) in product(_corners(widths[layer.weight]), acts):
                total = total + by_weight * by_act * self.cost.table[layer.name, (weight, act)]
        return torch.as_tensor(total / self.cost.scale)


def _corners(width: Width) -> list[tuple[int, Tensor | float]]:
    """The widths that count at the moment, each with its share."""
    if width.fixed:
        return [(width.widths[0], 1.0)]
    low, high, share = width.between()
    return [(low, 1 - share), (high, share)]


def all_pairs(layer: Layer, widths: Mapping[str, Sequence[int]]) -> tuple[Pair, ...]:
    """Every combination of a layer's widths, whether the hardware has it or not: what lies between may."""
    acts: Sequence[int | None] = [None] if layer.act is None else widths[layer.act]
    return tuple(product(widths[layer.weight], acts))
