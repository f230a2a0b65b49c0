"""Cross-layer equalization (Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction",
ICCV 2019, section 4.1).

Between two layers with nothing but a BatchNorm, a ReLU or a pooling in between, each channel may be divided by any
s > 0 behind the first layer and multiplied again in the second: the function stays. With r1 the largest magnitude of a
channel's weights in the first (its BatchNorm folded in) and r2 in the second, s = sqrt(r1 / r2) makes them equal, so
that one grid for all channels fits them all. It matters most for one scale per tensor and for depthwise layers.

Which layers are such pairs is not guessed from the architecture: a candidate (two layers that run one after the other,
the second reading as many channels as the first writes) is one if scaling its channels by random powers of two, which
is exact arithmetic, leaves everything that runs from the second layer on as it was.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from qat.addressable import has_weight, is_leaf
from qat.errors import UserError
from qat.layers import mixin_for, original_class
from qat.modes import evaluating
from qat.probe import Call, record
from qat.starts.base import Run, Start, replay

MAX_FACTOR = 1e3


class Pair:
    """Two layers whose channels between them can be scaled.

    Args:
        first: Its outputs are divided, at `norm` if there is one.
        norm: A BatchNorm behind it.
        second: Its inputs are multiplied.
    """

    def __init__(self, first: Any, norm: Any | None, second: Any) -> None:
        self.first, self.norm, self.second = first, norm, second
        depthwise = getattr(second, "groups", 1) == second.weight.shape[0] > 1
        self.inputs = 0 if depthwise else 1  # the axis of the second weight that its input channels are along

    def divide(self, s: Tensor) -> None:
        """Divides the channels between the layers by `s`."""
        source = self.first if self.norm is None else self.norm
        source.weight.div_(_along(s, 0, source.weight))
        if source.bias is not None:
            source.bias.div_(s)
        self.second.weight.mul_(_along(s, self.inputs, self.second.weight))

    def factors(self) -> Tensor:
        """What makes the ranges equal; 1 for channels that have none."""
        one = self.first.weight.abs().flatten(1).amax(1)
        if self.norm is not None:
            one = one * self.norm.weight.abs() * (self.norm.running_var + self.norm.eps).rsqrt()
        two = self.second.weight.abs().movedim(self.inputs, 0).flatten(1).amax(1)
        s = (one / two).sqrt().clamp(1 / MAX_FACTOR, MAX_FACTOR)
        return torch.where((one > 0) & (two > 0), s, 1)


def _along(s: Tensor, axis: int, weight: Tensor) -> Tensor:
    return s.view([-1 if d == axis else 1 for d in range(weight.ndim)])


class Equalize(Start):
    """See the module's docstring.

    Args:
        rounds: Passes over all pairs, for chains of more than two layers.

    Raises:
        UserError: if rounds is below 1; (in `prepare`) if the model has no such pair.
    """

    def __init__(self, rounds: int = 10) -> None:
        if rounds < 1:
            raise UserError(f"rounds={rounds}: must be at least 1")
        self.rounds = rounds

    @torch.no_grad()
    def prepare(self, model: nn.Module, run: Run) -> None:
        with evaluating(model):
            pairs = find_pairs(model, replay(model, run))
            if not pairs:
                raise UserError(
                    f"Equalize: {original_class(model).__name__} has no two layers with only BatchNorm, ReLU or "
                    "pooling between them; leave it out"
                )
            for _ in range(self.rounds):
                for pair in pairs:
                    pair.divide(pair.factors())


@torch.no_grad()
def find_pairs(model: nn.Module, run: Run) -> list[Pair]:
    """The pairs of a float model in evaluation mode, each tried on the batch that `run` passes."""
    calls = record(model, run, is_leaf).modules
    times = [call.name for call in calls]
    layers = [i for i, call in enumerate(calls) if _scalable(call.what) and times.count(call.name) == 1]
    found, generator = [], torch.Generator().manual_seed(0)
    for i, j in pairwise(layers):
        pair = _candidate(calls, i, j)
        if pair is None:
            continue
        before = _outputs(model, calls[j:], run)
        width = len(pair.factors())
        s = (2.0 ** torch.randint(-2, 3, (width,), generator=generator)).to(pair.first.weight)
        pair.divide(s)
        after = _outputs(model, calls[j:], run)
        pair.divide(1 / s)
        if len(before) == len(after) and all(map(_same, before, after)):
            found.append(pair)
    return found


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(a.abs().max()))


def _scalable(module: Any) -> bool:
    return mixin_for(module) is not None and has_weight(module) and not isinstance(module, nn.Embedding)


def _candidate(calls: list[Call], i: int, j: int) -> Pair | None:
    first, second = calls[i].what, calls[j].what
    between = [call.what for call in calls[i + 1 : j] if isinstance(call.what, nn.BatchNorm1d | nn.BatchNorm2d)]
    if len(between) > 1 or any(not norm.affine or norm.running_var is None for norm in between):
        return None
    pair = Pair(first, between[0] if between else None, second)
    groups, width = getattr(second, "groups", 1), first.weight.shape[0]
    fits = second.weight.shape[pair.inputs] == width and (groups == 1 or pair.inputs == 0)
    return pair if fits and first.weight is not second.weight else None


def _outputs(model: nn.Module, calls: list[Call], run: Run) -> list[Tensor]:
    """What the modules of `calls` and the model itself answer."""
    seen: list[Tensor] = []
    modules = [*dict.fromkeys(call.what for call in calls), model]
    hook = lambda _m, _a, y: seen.append(y.clone()) if isinstance(y, Tensor) else None  # noqa: E731
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return seen
