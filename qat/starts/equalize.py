"""Cross-layer equalization (Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction",
ICCV 2019, section 4.1).

Between two layers with nothing but a BatchNorm, a ReLU or a pooling in between, each channel may be divided by any
s > 0 behind the first layer and multiplied again in the second: the function stays. With r1 the largest magnitude of a
channel's weights in the first (its BatchNorm folded in) and r2 in the second, s = sqrt(r1 / r2) makes them equal, so
that one grid for all channels fits them all. It matters most for one scale per tensor and for depthwise layers.

Which layers are such pairs is not guessed from the architecture: a candidate (two layers that run one after the other,
the second reading as many channels as the first writes) is one if scaling its channels by powers of two, which is exact
arithmetic, leaves everything that runs from the second layer on as it was. Each channel is tried as far up and as far
down as it may be scaled, so that what bends far from the values of the batch (a ReLU6 that has not clipped yet) shows.
"""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import UserError
from qat.layers import is_computed, original_class
from qat.modes import evaluating
from qat.planning.addressable import has_weight
from qat.planning.functions import flat
from qat.planning.probe import record
from qat.planning.recording import Call
from qat.starts.base import Run, Start, replay

MAX_EXPONENT = 10
"""Exponent of 2: no channel is scaled by more than 1024, in all rounds together."""


class ScaledPair:
    """Two layers whose channels between them can be scaled.

    Args:
        first: The layer whose outputs are divided, at `norm` if there is one.
        norm: A BatchNorm behind it.
        second: The layer whose inputs are multiplied.

    Attributes:
        total: Factors that the channels have been divided by.
    """

    def __init__(self, first: Any, norm: Any | None, second: Any) -> None:
        self.first, self.norm, self.second = first, norm, second
        depthwise = getattr(second, "groups", 1) == second.weight.shape[0] > 1
        self.inputs = 0 if depthwise else 1  # the axis of the second weight that its input channels are along
        self.total = torch.ones_like(first.weight[:, *[0] * (first.weight.ndim - 1)])

    def divide(self, s: Tensor) -> None:
        """Divides the channels between the layers by `s`."""
        source = self.first if self.norm is None else self.norm
        source.weight.div_(_along(s, 0, source.weight))
        if source.bias is not None:
            source.bias.div_(s)
        self.second.weight.mul_(_along(s, self.inputs, self.second.weight))
        self.total = self.total * s

    @contextmanager
    def divided(self, s: Tensor) -> Iterator[None]:
        """Meanwhile the channels are divided by `s`; afterwards all is as it was, to the last bit."""
        source = self.first if self.norm is None else self.norm
        tensors = [t for t in (source.weight, source.bias, self.second.weight) if t is not None]
        before, total = [t.clone() for t in tensors], self.total
        try:
            self.divide(s)
            yield
        finally:
            self.total = total
            for tensor, values in zip(tensors, before, strict=True):
                tensor.copy_(values)

    def factors(self) -> Tensor:
        """Factors that make the ranges equal, as far as they may; 1 for channels that have none."""
        one = self.first.weight.abs().flatten(1).amax(1)
        if self.norm is not None:
            one = one * self.norm.weight.abs() * (self.norm.running_var + self.norm.eps).rsqrt()
        two = self.second.weight.abs().movedim(self.inputs, 0).flatten(1).amax(1)
        furthest = 2.0**MAX_EXPONENT
        s = ((one / two).sqrt() * self.total).clamp(1 / furthest, furthest) / self.total
        return torch.where((one > 0) & (two > 0), s, 1)


def _along(s: Tensor, axis: int, weight: Tensor) -> Tensor:
    return s.view([-1 if d == axis else 1 for d in range(weight.ndim)])


class Equalize(Start):
    """See the module's docstring.

    Args:
        rounds: Passes over all pairs, for chains of more than two layers.

    Raises:
        UserError: if rounds is below 1; (in `prepare`) if the model has no such pair, or is in float16.
    """

    def __init__(self, rounds: int = 10) -> None:
        if rounds < 1:
            raise UserError(f"rounds={rounds}: must be at least 1")
        self.rounds = rounds

    @torch.no_grad()
    def prepare(self, model: nn.Module, run: Run) -> None:
        if half := next((n for n, p in model.named_parameters() if p.dtype == torch.float16), None):
            raise UserError(
                f"Equalize: '{half}' is float16, which overflows where channels are tried; cast it afterwards"
            )
        with evaluating(model):
            again = replay(model, run)
            pairs = find_pairs(model, again)
            if not pairs:
                raise UserError(
                    f"Equalize: {original_class(model).__name__} has no two layers with only BatchNorm, ReLU or "
                    "pooling between them (what clips, such as ReLU6, is in the way); leave it out"
                )
            firsts = {id(pair.first) for pair in pairs}
            ends = [model, *(m for m in model.modules() if _scalable(m) and id(m) not in firsts)]
            before = _outputs(ends, again)
            totals = self._totals(pairs)
            # Powers of two near by, since others are rounded, in arithmetic that may be coarse (TF32).
            kept = [
                _keeps(pair, 2 ** s.log2().round(), before, ends, again) for pair, s in zip(pairs, totals, strict=True)
            ]
            names = {id(module): name for name, module in model.named_modules()}
            for pair, s, keeps in zip(pairs, totals, kept, strict=True):
                if keeps:
                    pair.divide(s)
                else:
                    warnings.warn(
                        f"Equalize: '{names[id(pair.first)]}' and '{names[id(pair.second)]}' stay as they are: "
                        "scaling the channels between them changes what the model computes",
                        stacklevel=2,
                    )

    def _totals(self, pairs: list[ScaledPair]) -> list[Tensor]:
        """Factors that each pair is to be divided by; the pairs stay as they are."""
        with ExitStack() as stack:
            for pair in pairs:
                stack.enter_context(pair.divided(torch.ones_like(pair.total)))
            for _ in range(self.rounds):
                for pair in pairs:
                    pair.divide(pair.factors())
            return [pair.total for pair in pairs]


@torch.no_grad()
def find_pairs(model: nn.Module, run: Run) -> list[ScaledPair]:
    """The pairs of a float model in evaluation mode, each tried on the batch that `run` passes."""
    calls = record(model, run, parts=False).modules
    times = [call.name for call in calls]
    layers = [i for i, call in enumerate(calls) if _scalable(call.what) and times.count(call.name) == 1]
    found, generator = [], torch.Generator().manual_seed(0)
    for i, j in pairwise(layers):
        pair = _candidate(calls, i, j)
        if pair is None:
            continue
        watched = [*(call.what for call in calls[j:]), model]
        before = _outputs(watched, run)
        # Different powers, for the second layer may read channels in another order.
        powers = torch.randint(MAX_EXPONENT, MAX_EXPONENT + 3, pair.total.shape, generator=generator)
        signs = torch.randint(2, pair.total.shape, generator=generator) * 2 - 1
        s = (2.0 ** (powers * signs)).to(pair.total)
        if all(_keeps(pair, factors, before, watched, run) for factors in (s, 1 / s)):
            found.append(pair)
    return found


def _keeps(pair: ScaledPair, s: Tensor, before: list[Tensor], watched: list[nn.Module], run: Run) -> bool:
    """Whether modules answer with `before`, too, when the pair is divided by `s`, powers of two."""
    with pair.divided(s):
        after = _outputs(watched, run)
    return len(before) == len(after) and all(map(_same, before, after))


def _same(a: Tensor, b: Tensor) -> bool:
    most = float(a.abs().max()) if a.numel() else 0.0
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5 * most)


def _scalable(module: Any) -> bool:
    """Whether it is a layer whose weight can be written to."""
    return has_weight(module) and not is_computed(module) and not isinstance(module, nn.Embedding)


def _candidate(calls: list[Call], i: int, j: int) -> ScaledPair | None:
    first, second = calls[i].what, calls[j].what
    between = [call.what for call in calls[i + 1 : j] if isinstance(call.what, nn.BatchNorm1d | nn.BatchNorm2d)]
    if len(between) > 1 or any(not norm.affine or norm.running_var is None for norm in between):
        return None
    pair = ScaledPair(first, between[0] if between else None, second)
    groups, width = getattr(second, "groups", 1), first.weight.shape[0]
    fits = second.weight.shape[pair.inputs] == width and (groups == 1 or pair.inputs == 0)
    return pair if fits and first.weight is not second.weight else None


def _outputs(modules: list[nn.Module], run: Run) -> list[Tensor]:
    """Float outputs of modules during `run`."""
    seen: list[Tensor] = []

    def note(_module: nn.Module, _args: Any, output: Any) -> None:
        seen.extend(y.clone() for y in flat((output,)) if isinstance(y, Tensor) and y.is_floating_point())

    with ExitStack() as hooks:
        for module in dict.fromkeys(modules):
            hooks.enter_context(module.register_forward_hook(note))
        run()
    return seen
