"""How well each grid fits the tensor that passes it, measured on a calibrated model.

For every quantizer, over all values `x` of one pass and what the grid makes of them, `fq(x)`:

    sqnr_db      10 log10(sum x^2 / sum (x - fq(x))^2): about 6 dB per bit put to use
    clip_rate    share of values that lie more than half a step (of floating-point formats, their last) outside the
                 grid: many mean that the range is too tight
    used_codes   share of the grid's codes that occur, two zeros being one: few mean that the range is too wide, or that
                 fewer bits would do

Activations are seen by hooks on their quantizers while the model runs (the second of two grids in a row sees what the
first made of the tensor); weights are read where they lie, which needs no data.
"""

import math
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qat.errors import UserError
from qat.grid.functional import SCALE_FLOOR, ratio, wide
from qat.grid.scales import floor
from qat.insert import named_quantizers
from qat.layers.weights import quantized_weights
from qat.modes import evaluating
from qat.quantizers import Quantizer

READER = re.compile(r"\.?(?:input|weight)_quantizer(?:_\d+)?(?:\.\d+)?$")
"""Suffix that turns a quantizer's name into that of the layer or site that reads it: `.weight_quantizer`,
`.input_quantizer_1`, `.input_quantizer.0`
"""


@dataclass(frozen=True)
class QuantizerStats:
    """One quantizer's fit; the module's docstring defines the last three.

    Attributes:
        name: Module path of the quantizer.
        layer: Module path of the layer that reads through it, or name of the functional site; the first of `readers`.
        readers: Names of all layers and sites that read through it.
        role: Kind of tensor that it quantizes.
        spec: Short label of its grid, such as `int4/channel`.
        bits: Width of its codes.
        scale_min, scale_mean, scale_max: Over its scales (one number thrice if it has one scale).
        sqnr_db: In decibels; `None` if the grid holds every value exactly.
        clip_rate: 0 to 1.
        used_codes: 0 to 1.
        scale_floor: The smallest scale of its format.
    """

    name: str
    layer: str
    readers: tuple[str, ...]
    role: Literal["weight", "act"]
    spec: str
    bits: int
    scale_min: float
    scale_mean: float
    scale_max: float
    sqnr_db: float | None
    clip_rate: float
    used_codes: float
    scale_floor: float = SCALE_FLOOR

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "readers": list(self.readers)}


@dataclass
class Noise:
    """Sums over the values that one grid has seen so far, and over what it made of them."""

    signal: float = 0.0
    noise: float = 0.0
    total: int = 0

    def compare(self, x: Tensor, rounded: Tensor) -> None:
        exact = torch.float32 if x.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
        x = wide(x)
        self.signal += x.square().sum(dtype=exact).item()
        self.noise += (x - rounded).square().sum(dtype=exact).item()
        self.total += x.numel()

    @property
    def decibels(self) -> float | None:
        """SQNR; `None` where there is no noise, or nothing to compare it with."""
        return 10 * math.log10(self.signal / self.noise) if self.signal and self.noise else None


@dataclass
class Tally(Noise):
    """With the codes that a quantizer has used, and the values outside its grid."""

    clipped: int = 0
    codes: set[int] = field(default_factory=set)

    def add(self, name: str, quantizer: Quantizer, x: Tensor) -> None:
        x = x.detach()
        if not x.isfinite().all():
            raise UserError(f"statistics of '{name}': the tensor it quantizes holds NaN or infinity")
        codes = quantizer.quantize(x)
        self.compare(x, quantizer.dequantize(codes, quantizer.grid(x)))
        self.clipped += _clipped(quantizer, x)
        if (format := quantizer.spec.float_format) is not None:  # whose bit patterns start at 0, and have two zeros
            codes, first = codes.where(codes != 2 ** (format.bits - 1), 0), 0
        else:
            first = quantizer.quant_min
        occurs = torch.bincount(codes.flatten().int() - first).nonzero().flatten()
        self.codes.update(occurs.tolist())


def _clipped(quantizer: Quantizer, x: Tensor) -> int:
    """How many values lie more than half a step outside the grid."""
    scale, low, high = quantizer.grid(x)
    v, room = ratio(quantizer.partition.grouped(quantizer.transform(x)), scale), quantizer.spec.last_step / 2
    return int(((v < low - room) | (v > high + room)).sum())


@torch.no_grad()
def quantizer_stats(model: nn.Module, run: Callable[[], Any]) -> list[QuantizerStats]:
    """Measures every quantizer of a calibrated model in one pass, in the order of the model's modules.

    A quantizer that several readers share appears once and counts each reading; one that nothing passed is left out.

    Args:
        model: A model with calibrated quantizers; it is left as it was, including who is in training mode.
        run: Calls the model on some batches. It runs in evaluation mode without gradients.

    Raises:
        UserError: if a quantizer has no range yet, or meets NaN or infinity.
    """
    found = dict(named_quantizers(model))
    tallies = {name: Tally() for name, q in found.items() if not q.is_weight}

    def watch(name: str) -> Callable[..., None]:
        return lambda quantizer, args: tallies[name].add(name, quantizer, args[0])

    _check_calibrated(found)
    with ExitStack() as hooks, evaluating(model):
        for name in tallies:
            hooks.enter_context(found[name].register_forward_pre_hook(watch(name)))
        run()
    tallies |= _weight_tallies(model, found)
    readers = readers_of(model)
    seen = [name for name in found if name in tallies and tallies[name].total]
    return [summarize(name, found[name], tallies[name], readers[found[name]]) for name in seen]


@torch.no_grad()
def weight_stats(model: nn.Module) -> list[QuantizerStats]:
    """The weights' part of `quantizer_stats`, which needs no data: cheap enough for logging during training.

    Raises:
        UserError: if a weight quantizer has no range yet, or meets NaN or infinity.
    """
    found = {name: q for name, q in named_quantizers(model) if q.is_weight}
    _check_calibrated(found)
    readers = readers_of(model)
    tallies = _weight_tallies(model, found)
    return [summarize(name, found[name], tally, readers[found[name]]) for name, tally in tallies.items()]


def _check_calibrated(found: dict[str, Quantizer]) -> None:
    for name, quantizer in found.items():
        if not quantizer.initialised:
            raise UserError(
                f"statistics of '{name}': it has no range yet; qat.calibrate.calibrate(model, run) finds it"
            )


def _weight_tallies(model: nn.Module, found: dict[str, Quantizer]) -> dict[str, Tally]:
    """One tally per weight quantizer."""
    weights = quantized_weights(model)
    tallies = {name: Tally() for name, q in found.items() if q in weights}
    for name, tally in tallies.items():
        tally.add(name, found[name], weights[found[name]].tensor)
    return tallies


def readers_of(model: nn.Module) -> dict[nn.Module, tuple[str, ...]]:
    """The layers and sites that read through each quantizer."""
    readers: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Quantizer):
            readers.setdefault(module, []).append(READER.sub("", name))
    return {quantizer: tuple(dict.fromkeys(names)) for quantizer, names in readers.items()}


def summarize(name: str, quantizer: Quantizer, tally: Tally, readers: tuple[str, ...]) -> QuantizerStats:
    scale = quantizer.step()
    return QuantizerStats(
        name=name,
        layer=readers[0],
        readers=readers,
        role="weight" if quantizer.is_weight else "act",
        spec=quantizer.spec.short,
        bits=quantizer.spec.width,
        scale_min=scale.min().item(),
        scale_mean=scale.mean().item(),
        scale_max=scale.max().item(),
        sqnr_db=tally.decibels,
        clip_rate=tally.clipped / tally.total,
        used_codes=len(tally.codes) / (quantizer.spec.size - (quantizer.spec.float_format is not None)),
        scale_floor=floor(quantizer.spec),
    )
