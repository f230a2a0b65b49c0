"""Lowering bit-widths step by step, so that each width starts from a network that works at the width before.

A width is changed in place. The range stays, so the step is multiplied by quant_max_old / quant_max_new; keys and
shapes of the state stay as well, so optimizers and checkpoints never notice; the copies that averages are taken in
change with the module. The plan that checkpoints carry
always has the widths of that moment: loading one gives the model that was saved, in the middle of a schedule, too.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_warn
from torch import nn

from qat.errors import UserError
from qat.insert import plan_of, remember
from qat.layers.chain import in_turn
from qat.layers.weights import quantized_weights
from qat.lightning.averages import averages
from qat.lightning.base import QuantizationCallback
from qat.lightning.schedules.moments import check_moment, check_reached, reached
from qat.lightning.schedules.selection import select
from qat.planning.functions import PROBABILITIES
from qat.planning.plan import Plan
from qat.quantizers import Quantizer, create


class AnnealBits(QuantizationCallback):
    """Changes bit-widths at the start of epochs, or after shares of training.

    A monitored "best" checkpoint may have the wider grids of the beginning; what training ends with has the policy's.

    Args:
        schedule: Bits from each epoch on, `{0: 8, 2: 4, 5: 2}`, or from each share of training on, `{0: 8, 0.1: 4}`;
            or pairs, `[[0, 8], [2, 4]]`, which a command line can replace. It begins at 0 and ends at the policy's
            bits.
        match: Which quantizers: a glob over their names, `@weight`, `@act`, or a list of these; `None` for all whose
            bits in the policy are the schedule's last.

    Raises:
        UserError: if the schedule is not of that form; (when training starts) if it does not end at the bits of the
            policy, if training ends before it does, or if a quantizer cannot have the bits.
    """

    def __init__(
        self, schedule: Mapping[float, int] | Sequence[Sequence[float]], match: str | Sequence[str] | None = None
    ) -> None:
        try:
            steps: dict[float, int] = dict(schedule)  # pyright: ignore[reportArgumentType, reportCallIssue, reportAssignmentType]
        except (TypeError, ValueError):
            raise UserError(f"schedule={schedule}: must be pairs of a moment and bits: [[0, 8], [2, 4]]") from None
        moments, widths = list(steps), list(steps.values())
        numbers = all(isinstance(moment, int | float) for moment in moments)
        if not steps or not numbers or any(isinstance(n, bool) or not isinstance(n, int) for n in widths):
            raise UserError(f"schedule={steps}: must map epochs or shares to bits, such as {{0: 8, 2: 4}}")
        if min(moments) != 0:
            raise UserError(f"schedule={steps}: must begin at 0")
        for moment in moments:
            check_moment("schedule", moment)
        self.shares = any(isinstance(moment, float) for moment in moments)
        if self.shares and any(isinstance(moment, int) and moment for moment in moments):
            raise UserError(f"schedule={steps}: has epochs and shares of training; give all as one of them")
        self.schedule, self.match = dict(sorted(steps.items())), match
        self._now: int | None = None
        self.forget()

    def forget(self) -> None:
        self._final: dict[str, int] = {}

    @property
    def state_key(self) -> str:
        return self._generate_state_key(match=self.match)  # weights and activations may have a schedule each

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._now = None

    def check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        last, bits = list(self.schedule.items())[-1]
        check_reached(trainer, self, "schedule", last)
        if not self._final:  # else a checkpoint from the middle of the schedule has brought it
            self._final = self._chosen(pl_module, bits)
        for name, policy in self._final.items():
            if policy != bits:
                raise self.mistake(
                    f"schedule={self.schedule} ends at {bits} bits, but the policy gives '{name}' "
                    f"{policy}; end it there, or leave that quantizer out with match"
                )
        self._try(pl_module)

    def _chosen(self, model: nn.Module, last: int) -> dict[str, int]:
        """The policy's bits of every quantizer that the schedule is for."""
        if self.match is not None:
            return {name: q.spec.width for name, q in select(model, self.match, self).items()}
        widths = {name: q.spec.width for name, q in self.quantizers(model).items()}
        if last not in widths.values():
            own = ", ".join(map(str, sorted(set(widths.values()))))
            raise self.mistake(f"schedule={self.schedule} ends at {last} bits, but the policy's grids have {own}")
        return {name: width for name, width in widths.items() if width == last}

    def annealed(self, model: nn.Module) -> dict[str, Quantizer]:
        """The quantizers whose bits change, by name."""
        names = self._final or self._chosen(model, list(self.schedule.values())[-1])
        return {name: q for name, q in self.quantizers(model).items() if name in names}

    def _try(self, pl_module: pl.LightningModule) -> None:
        """Tries every width on a new quantizer."""
        weights = quantized_weights(pl_module)
        for name, quantizer in self.annealed(pl_module).items():
            shape = weights[quantizer].tensor.shape if quantizer.is_weight else None
            for moment, bits in self.schedule.items():
                where = f"schedule[{moment}]={bits} for '{name}'"
                try:
                    trial = create(dataclasses.replace(quantizer.spec, bits=bits), shape, quantizer.axis)
                except UserError as error:
                    raise self.mistake(f"{where}: {error}") from None
                if _shapes(trial) != _shapes(quantizer):
                    raise self.mistake(
                        f"{where}: quantizer={quantizer.spec.quantizer} learns something per level, "
                        "so its bits cannot change; leave it out with match"
                    )

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.shares:
            self._follow(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.shares:
            self._follow(trainer, pl_module)

    def _follow(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        bits = next(b for moment, b in reversed(self.schedule.items()) if reached(trainer, moment))
        if bits == self._now:
            return
        self._now = bits
        for module in (pl_module, *averages(trainer)):
            for quantizer in self.annealed(module).values():
                if quantizer.spec.bits != bits:
                    quantizer.change_bits(bits)
        remember(pl_module, current_plan(pl_module))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        wide = [name for name, q in self.annealed(pl_module).items() if q.spec.bits != self._final[name]]
        if wide:
            rank_zero_warn(
                f"AnnealBits: training ended early, with {len(wide)} quantizers ('{wide[0]}', ...) "
                "at other bits than the policy's"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"final": dict(self._final)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._final = dict(state_dict["final"])


def current_plan(module: pl.LightningModule) -> Plan:
    """The module's plan, with the specs that its quantizers have now."""
    plan = plan_of(module)
    specs = {}
    for name, layer in plan.layers.items():
        twin: Any = module.get_submodule(name)
        specs |= zip(layer.input, in_turn(twin.input_quantizer), strict=True)
        specs |= zip(layer.input_1 or [], in_turn(getattr(twin, "input_quantizer_1", None)), strict=True)
    for site, inputs in plan.sites.items():
        for labels, grids in zip(inputs, _grids_of(site, module), strict=True):
            specs |= zip(labels, in_turn(grids), strict=True)
    weights = {name: module.get_submodule(name).weight_quantizer.spec for name in plan.weights}  # pyright: ignore[reportAttributeAccessIssue]
    return dataclasses.replace(
        plan, weights=weights, activations={label: specs[label].spec for label in plan.activations}
    )


def _grids_of(site: str, module: nn.Module) -> list[nn.Module | None]:
    """What a functional site reads each operand through, or puts its output or its probabilities on."""
    found: Any = module.get_submodule(site.removesuffix(f".{PROBABILITIES}"))
    if site.endswith(f".{PROBABILITIES}"):
        return [found.probability_quantizer]
    return [getattr(found, name) for name in found.operands or ["output_quantizer"]]


def _shapes(quantizer: Quantizer) -> dict[str, Any]:
    return {key: value.shape for key, value in quantizer.state_dict().items()}
