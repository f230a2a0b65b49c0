"""AdaRound: learning whether each weight is rounded up or down (Nagel et al., "Up or Down? Adaptive Rounding for
Post-Training Quantization", ICML 2020), for single layers or for whole blocks (Li et al., "BRECQ", ICLR 2021).

Rounding to nearest is best for the weight, not for what the layer computes. With V one parameter per weight,

    h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1)                                              equation 23
    soft weight = scale * clip(floor(w / scale) + h(V), low, high)                       equation 22
    loss = |float output - output|^2 + strength * sum(1 - |2 h(V) - 1|^b)                equations 21, 24

is minimised on the calibration batches, b falling from 20 to 2 after a fifth of the steps, so that h ends at 0 or 1.
Units are done in the order of execution: each gets the input that the quantized units before it produce, and is to give
the output of the float model (the asymmetric reconstruction of section 3.3).

The result is written into the weights, w = scale * level + clip(w - scale * level, -0.49 scale, 0.49 scale): rounding
to nearest then gives these levels, so that training starts with them, as near to the float weights as that allows. A
type of few digits (bfloat16) that has no number there gets the level itself.

Weights whose grid follows them (`minmax`, `dynamic`) are left out, and named: what is written would move it. So are
those without equal steps.
"""

import math
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from qat.errors import UserError
from qat.grid.functional import levels, ratio, values
from qat.layers import is_computed, original_class
from qat.modes import evaluating
from qat.planning.functions import first_tensor
from qat.planning.plan import Plan
from qat.policies.patterns import matching
from qat.quantizers import Quantizer
from qat.starts.base import Run, Start, in_float, replay
from qat.starts.calls import ModuleCall, answers_rows, joined, noted


class SoftRounding(nn.Module):
    """Takes a weight quantizer's place while V is learned; a BatchNorm that is folded into the layer asks it for the
    grid, which stays."""

    def __init__(self, quantizer: Quantizer, weight: Tensor) -> None:
        super().__init__()
        self.on, self.static, self.spec, self.step = True, quantizer.static, quantizer.spec, quantizer.step
        x = quantizer.partition.grouped(weight.detach())
        self.scale, self.low, self.high = (t.detach() for t in quantizer.grid(weight))
        v = ratio(x, self.scale)
        self.floor, self.shape = v.floor(), weight.shape
        rest = ((v - self.floor).clamp(0.01, 0.99) + 0.1) / 1.2
        self.up = nn.Parameter((rest / (1 - rest)).log())  # h(V) begins at the fraction that rounding is about

    def h(self) -> Tensor:
        return (1.2 * self.up.sigmoid() - 0.1).clamp(0, 1)

    def forward(self, weight: Tensor) -> Tensor:
        return ((self.floor + self.h()).clamp(self.low, self.high) * self.scale).view(self.shape).to(weight.dtype)

    def undecided(self, b: float) -> Tensor:
        return (1 - (2 * self.h() - 1).abs().pow(b)).sum()

    @torch.no_grad()
    def level(self) -> Tensor:
        """The levels that were learned, of the grouped weight's shape."""
        return (self.floor + (self.h() >= 0.5)).clamp(self.low, self.high)

    @torch.no_grad()
    def hardened(self, weight: Tensor) -> Tensor:
        """The latent weight that rounds to what was learned, wherever its type has such a number: the level itself
        where the type has none as near to the border as the reach.
        """
        level, x = self.level(), weight.reshape(self.floor.shape)
        centre, reach = values(level, self.scale, torch.promote_types(x.dtype, torch.float32)), 0.49 * self.scale
        near = (centre + (x - centre).clamp(-reach, reach)).to(weight.dtype)
        kept = levels(near, self.scale, self.low, self.high) == level
        return torch.where(kept, near, values(level, self.scale, weight.dtype)).view(self.shape)


class AdaRound(Start):
    """See the module's docstring.

    Args:
        blocks: Globs over module paths: each module that matches is reconstructed as a whole, all others layer by
            layer.
        steps: Steps of Adam for each unit.
        lr: Learning rate of Adam.
        batch_size: Samples in a step, of all batches. A unit that takes several tensors, or mixes samples (attention
            along the first axis), gets one whole batch instead.
        strength: Weight of the penalty that pushes each weight to up or down.

    Raises:
        UserError: if a number is out of its range; (in `refine`) if a pattern matches nothing, or nothing with a weight
            to round, or no weight has a grid of equal steps.
    """

    def __init__(
        self,
        blocks: str | Sequence[str] = (),
        steps: int = 500,
        lr: float = 1e-2,
        batch_size: int = 32,
        strength: float = 0.01,
    ) -> None:
        for name, value in (("steps", steps), ("lr", lr), ("batch_size", batch_size), ("strength", strength)):
            if not 0 < value < math.inf:
                raise UserError(f"{name}={value}: must be above 0")
        self.blocks = [blocks] if isinstance(blocks, str) else list(blocks)
        self.steps, self.lr, self.batch_size, self.strength = steps, lr, batch_size, strength

    def refine(self, model: nn.Module, run: Run, plan: Plan) -> None:
        modules = dict(model.named_modules())
        layers = _layers(modules, plan)
        if not layers:
            what = "has a grid of equal steps (int) that does not follow it, and can be written to"
            raise UserError(f"AdaRound: no weight of {original_class(model).__name__} {what}")
        units = self._units(modules, layers)
        with evaluating(model), torch.no_grad():
            again = replay(model, run)
            order = _order({name: modules[name] for name in units}, again)
            for name in [layer for unit in units if unit not in order for layer in units[unit]]:
                _warn(f"'{name}' is rounded to nearest: it never runs by itself; name a module around it in blocks")
            for name in order:
                unit: Any = modules[name]
                with in_float(model):
                    wanted = noted(unit, again)
                    rows = answers_rows(unit, wanted)
                given = noted(unit, again)
                if [y.shape for *_, y in given] != [y.shape for *_, y in wanted]:
                    _warn(f"'{name}' is rounded to nearest: the float model calls it with other samples")
                    continue
                calls = [(args, kwargs, y) for (args, kwargs, _), (*_, y) in zip(given, wanted, strict=True)]
                del given, wanted
                with torch.enable_grad():
                    self._learn(unit, {layer: modules[layer] for layer in units[name]}, calls, rows)

    def _units(self, modules: dict[str, nn.Module], layers: list[str]) -> dict[str, list[str]]:
        """The layers to be rounded, by the unit they are in."""
        blocks: list[str] = []
        for pattern in self.blocks:
            hits = matching(pattern, modules, "AdaRound: blocks", "module")
            hits = [hit for hit in hits if any(f"{layer}.".startswith(f"{hit}.") for layer in layers)]
            if not hits:
                raise UserError(f"AdaRound: blocks: '{pattern}' matches nothing with a weight to round; leave it out")
            blocks += hits
        units: dict[str, list[str]] = {}
        for name in layers:
            unit = next((block for block in blocks if f"{name}.".startswith(f"{block}.")), name)
            units.setdefault(unit, []).append(name)
        return units

    def _drawn(self, calls: list[ModuleCall], rows: bool, generator: torch.Generator) -> ModuleCall:
        """The data of one step: samples of the calls if a unit answers `rows`, or else one whole call."""
        call = calls[int(torch.randint(len(calls), (), generator=generator))] if len(calls) > 1 else calls[0]
        if not rows:
            return tree_map_only(Tensor, torch.clone, call)  # a unit may write over what it is given
        count = len(call[2])
        at = torch.randint(count, (min(self.batch_size, count),), generator=generator).to(call[2].device)
        return tree_map_only(Tensor, lambda t: t[at], call)

    def _learn(self, unit: Any, named: dict[str, Any], calls: list[ModuleCall], rows: bool) -> None:
        layers = list(named.values())
        quantizers = [layer.weight_quantizer for layer in layers]
        soft = [SoftRounding(q, layer.weight) for q, layer in zip(quantizers, layers, strict=True)]
        calls = joined(calls) if rows else calls
        optimizer = torch.optim.Adam([s.up for s in soft], self.lr)
        generator = torch.Generator().manual_seed(0)
        try:
            for layer, one in zip(layers, soft, strict=True):
                # As in training: plain bias, no kept weight. The mode of its children is left alone.
                layer._modules["weight_quantizer"], layer.training = one, True
            for step in range(self.steps):
                args, kwargs, y = self._drawn(calls, rows, generator)
                answer = first_tensor(unit(*args, **kwargs))
                assert answer is not None
                error = (answer - y).square()
                channels = _channels(error, layers[-1].output_axis)
                loss = error.sum() / (error.numel() / channels)  # over channels the sum, else the mean
                if (share := step / self.steps) >= 0.2:
                    b = 2 + 18 * (1 - (share - 0.2) / 0.8)
                    loss = loss + self.strength * torch.stack([s.undecided(b) for s in soft]).sum()
                optimizer.zero_grad()
                loss.backward(inputs=[s.up for s in soft])
                optimizer.step()
        finally:
            for layer, quantizer in zip(layers, quantizers, strict=True):
                layer._modules["weight_quantizer"], layer.training = quantizer, False
        with torch.no_grad():
            for (name, layer), one in zip(named.items(), soft, strict=True):
                layer.weight.copy_(one.hardened(layer.weight))
                _check_written(name, layer, one.level().view(one.shape))


def _check_written(name: str, layer: Any, level: Tensor) -> None:
    """Warns where the weight's type has no number that rounds to the level that was learned."""
    lost = int((layer.weight_quantizer.levels(layer.weight) != level).sum())
    if lost:
        kind = str(layer.weight.dtype).removeprefix("torch.")
        _warn(
            f"'{name}': {lost} of {level.numel()} weights have other levels than were learned, for which {kind} has "
            "too few digits; keep weights in float32, or take fewer bits"
        )


def _layers(modules: dict[str, nn.Module], plan: Plan) -> list[str]:
    """The layers with a weight that can be rounded up or down. An embedding is none: its output is its weight, for
    which rounding to nearest is best.
    """
    found, left = [], {}
    for name in plan.weights:
        layer: Any = modules[name]
        if isinstance(layer, nn.Embedding) or not layer.weight_quantizer.on:
            continue
        why = _unfit(layer)
        if why is None:
            found.append(name)
        else:
            left.setdefault(why, []).append(name)
    for why, names in left.items() if found else ():
        more = f" and {len(names) - 1} more, too" if names[1:] else ""
        _warn(f"'{names[0]}' is rounded to nearest{more}: {why}")
    return found


def _unfit(layer: Any) -> str | None:
    """The reason why the weight of a layer cannot be rounded up or down at will, if there is one."""
    quantizer = layer.weight_quantizer
    if quantizer.spec.format != "int":
        return f"format={quantizer.spec.format} has no equal steps with a zero"
    if quantizer.follows or not quantizer.static or quantizer.transforms:
        return f"quantizer={quantizer.spec.quantizer} finds its grid in the weight, and would find another"
    if is_computed(layer) or getattr(layer, "stacked", None) == "in_out":
        return "its weight is computed, so nothing can be written into it"
    return None


def _warn(message: str) -> None:
    warnings.warn(f"AdaRound: {message}", stacklevel=3)


def _channels(output: Tensor, axis: int) -> int:
    """How many channels a unit answers with whose last layer has them along `axis`; flattened, they are the last."""
    return output.shape[axis if output.ndim >= -axis else -1]


def _order(units: dict[str, nn.Module], run: Run) -> list[str]:
    """Names in the order of their first calls."""
    order: dict[str, None] = {}
    with ExitStack() as hooks:
        for name, unit in units.items():
            hooks.enter_context(unit.register_forward_pre_hook(lambda *_, name=name: order.setdefault(name)))
        run()
    return list(order)
