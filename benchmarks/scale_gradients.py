"""Holds the gradient of every learned scale in one training step against its closed form.

A scale of LSQ has the gradient (Esser et al., ICLR 2020, equation 3 and section 2.2)

    sum over the elements of   d loss / d y * slope,     slope = low | round(v) - v | high,   v = x / scale

over sqrt(N * quant_max), with N elements for each scale (of an activation: in one sample). So it is zero where every
slope is (the tensor lies on its grid as it is: zeros, ones, a scalar that is its own range), and where the loss does
not depend on the tensor. Whether it does is a property of the float model: asked with all quantizers off.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import zoo
from torch import Tensor, nn

from qat.insert import named_quantizers
from qat.planning.functions import flat
from qat.quantizers import Quantizer

Reads = dict[str, list[tuple[Tensor, Tensor]]]
"""For each quantizer, what passed through it and what came out, as often as it was read."""


@dataclass(frozen=True)
class ScaleGradient:
    """Of one learned scale.

    Attributes:
        found: What autograd left in `scale.grad` (zeros for `None`).
        expected: The closed form, in float64.
        size: The sum of its terms' absolute values, which rounding errors are relative to.
        on_grid: Whether every element lies on the grid as it is.
        unused: Whether the tensor's gradient in the float model is zero wherever it is read (one that has none because
            it asks for none, such as an image, tells nothing).
    """

    name: str
    found: Tensor
    expected: Tensor
    size: Tensor
    on_grid: bool
    unused: bool

    @property
    def agrees(self) -> bool:
        """Up to float32 sums of thousands of terms, and zero just where the other is; NaN agrees with nothing."""
        close = (self.found - self.expected).abs() <= 1e-4 * self.size
        return bool((close & ((self.found == 0) == (self.expected == 0))).all())

    @property
    def still(self) -> bool:
        """Whether no part of it is other than zero."""
        return not self.found.any()

    @property
    def why(self) -> str | None:
        """What makes it zero, if anything does."""
        return "its tensor lies on the grid" if self.on_grid else "no gradient in float" if self.unused else None


def scale_gradients(model: nn.Module, inputs: zoo.Inputs) -> list[ScaleGradient]:
    """One forward and backward pass in training mode, and one with all quantizers off."""
    quantizers = [q for _, q in named_quantizers(model)]
    learned = {n: q for n, q in named_quantizers(model) if isinstance(q.scale, nn.Parameter)}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for quantizer in quantizers:
        quantizer.enable(False)
    in_float = _backward(model, inputs, learned)
    for quantizer in quantizers:
        quantizer.enable()
    model.load_state_dict(state)  # statistics of BatchNorms
    reads = _backward(model, inputs, learned)
    return [_compared(n, q, reads[n], in_float[n]) for n, q in learned.items()]


def tensors(output: object) -> Iterator[Tensor]:
    """The float tensors of a model's output; a cache of keys and values is none of it."""
    values = output.values() if isinstance(output, dict) else output
    return (t for t in flat(values) if isinstance(t, Tensor) and t.is_floating_point())


def _backward(model: nn.Module, inputs: zoo.Inputs, quantizers: dict[str, Quantizer]) -> Reads:
    generator = torch.Generator().manual_seed(0)
    model.train().zero_grad()
    with _watched(quantizers) as reads:
        results = [t for t in tensors(model(**inputs)) if t.requires_grad]
    sum((t * torch.randn(t.shape, generator=generator)).sum() for t in results).backward()  # pyright: ignore
    return reads


@contextmanager
def _watched(quantizers: dict[str, Quantizer]) -> Iterator[Reads]:
    reads: Reads = {name: [] for name in quantizers}

    def note(name: str, _: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        if output.requires_grad:
            output.retain_grad()
        reads[name].append((args[0], output))

    handles = [q.register_forward_hook(partial(note, name)) for name, q in quantizers.items()]
    try:
        yield reads
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _compared(
    name: str, quantizer: Quantizer, reads: list[tuple[Tensor, Tensor]], in_float: list[tuple[Tensor, Tensor]]
) -> ScaleGradient:
    grad = quantizer.scale.grad
    expected, size, on_grid = (
        torch.zeros_like(quantizer.scale).double(),
        torch.zeros_like(quantizer.scale).double(),
        True,
    )
    for x, y in reads:
        grouped, (scale, low, high) = quantizer.partition.grouped(x), quantizer.grid(x)
        # As the kernels do: a ratio in float32, so that ties fall the same way.
        v = grouped / scale
        slope = torch.where(v < low, low, torch.where(v > high, high, v.round() - v)).double()
        on_grid &= not slope.any()
        if y.grad is None:
            continue
        count = quantizer._per_scale or x.numel() // (len(x) if x.ndim else 1)  # pyright: ignore
        terms = slope * quantizer.partition.grouped(y.grad).double() / (count * quantizer.quant_max) ** 0.5
        expected += terms.sum_to_size(scale.shape).view_as(expected)
        size += terms.abs().sum_to_size(scale.shape).view_as(expected)
    return ScaleGradient(
        name=name,
        found=torch.zeros_like(expected) if grad is None else grad.double(),
        expected=expected,
        size=size,
        on_grid=on_grid,
        unused=all(y.requires_grad and (y.grad is None or not y.grad.any()) for _, y in in_float),
    )
