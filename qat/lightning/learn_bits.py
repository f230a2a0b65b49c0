"""Bit-widths learned by gradient descent, beside the weights, and then written as the YAML that `qat search` writes.

    loss + strength * sum over budgets of max(0, cost / limit - 1)^2

While they are learned, a grid computes between two widths (`qat.search.fractional`); evaluation has the nearest. The
widths belong to the callback, with an optimizer of their own: their gradient from the loss comes with the module's own
backward pass, that of the penalty is added before their step, so no `training_step` is touched. Within the budgets
there is no penalty and the loss widens what helps it most, so training settles at the limit, where what a bit earns is
the same for all layers per unit of cost.

At `until`, the allocation nearest to what was learned that keeps the budgets, ties and pairs to the letter is found by
the integer program of `qat search`; the rest of training has whole widths, and so has everything after it.

The interpolation is that of FracBits (Yang and Jin, AAAI 2021), which penalizes the absolute distance to a target, from
both sides: two budgets could not hold together then, and a step of Adam would overshoot the corner.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Adam, Optimizer

from qat.calibrate import calibrated
from qat.convert import convert
from qat.copies import copied
from qat.errors import UserError
from qat.export.packed import packed_bytes
from qat.insert import remember
from qat.lightning.averages import averages
from qat.lightning.base import QuantizationCallback, callbacks_of
from qat.lightning.callback import QATCallback, joint_policy
from qat.lightning.module import bare
from qat.lightning.schedules.anneal import AnnealBits, current_plan
from qat.lightning.schedules.moments import check_moment, check_reached, reached
from qat.lightning.steps import Source, run_steps, trainer_source
from qat.measure.cost import COSTS
from qat.search.allocate import Problem, solve
from qat.search.costs import Files, make_costs, make_harms, predict
from qat.search.emit import outputs, write
from qat.search.fractional import FractionalGrid, RelaxedCost, Width, all_pairs
from qat.search.learned import check_grids, fractional_grids, quantizers_at, shared_widths
from qat.search.settings import Search
from qat.search.space import Pair, Space, kept_bits, make_space

BUDGETS = sorted(name for name, kind in COSTS.items() if kind.needs != "file")
"""Costs that are known at every step."""
BETAS = (0.9, 0.95)
"""Adam's betas: low, so that it soon forgets the penalty at the start. Otherwise what the loss asks for at the limit
would hardly count.
"""


class LearnBits(QuantizationCallback):
    """Learns the bits of weights and of the inputs of layers, of any LightningModule that `QATCallback` quantizes.

    Logs `bits/<grid>`, `bits/cost/<budget>` and `bits/penalty` after every epoch.

    Args:
        budget: Limits: `avg_bits`, `bops`, `packed`, as `qat search` takes them.
        weight_bits, act_bits, pairs, least, tie: What may be chosen, see `qat.search.Search`.
        strength: Weight of the penalty.
        lr: Step of the widths, in bits: their optimizer is Adam.
        until: When the widths become whole: a share of training (a float below 1) or a number of epochs (an int).
        output: The YAML to write, in a folder named `quant`; `None` for none.

    Raises:
        UserError: for a value out of its range; (when training starts) if the budgets cannot be met, a pattern matches
            nothing, a quantizer's width cannot be learned, `AnnealBits` changes it, too, or there is not one
            `QATCallback`.
    """

    def __init__(
        self,
        budget: Mapping[str, Any],
        weight_bits: Sequence[int] = (2, 3, 4, 5, 6, 8),
        act_bits: Sequence[int] = (2, 3, 4, 5, 6, 8),
        pairs: Sequence[Sequence[int]] | None = None,
        least: Mapping[str, int] | None = None,
        tie: Sequence[str] = (),
        strength: float = 10.0,
        lr: float = 0.05,
        until: float = 0.5,
        output: str | None = None,
    ) -> None:
        given = {name: value for name, value in budget.items() if value is not None}
        if not given or set(given) - set(BUDGETS):
            raise UserError(f"budget={given}: give one or more of {', '.join(BUDGETS)}")
        for name, value in (("strength", strength), ("lr", lr)):
            if not 0 < value < float("inf"):
                raise UserError(f"{name}={value}: must be above 0")
        check_moment("until", until)
        self.settings = Search(
            list(weight_bits), list(act_bits), pairs=None if pairs is None else [list(pair) for pair in pairs],
            least=dict(least or {}), tie=list(tie), budget=given,
        )  # fmt: skip
        self.strength, self.lr, self.until, self.output = strength, lr, until, output
        self.forget()

    def forget(self) -> None:
        self.choice: dict[str, Pair] | None = None
        self.widths: dict[str, Width] = {}
        self.grids: dict[str, list[FractionalGrid]] = {}
        self._saved: dict[str, Any] = {}

    # -- before the first step -----------------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self.choice is not None:
            return
        if self.space.parts:
            rank_zero_info(f"LearnBits: not learned: {kept_bits(self.space.parts)}")
        run = run_steps(pl_module, trainer_source(trainer), self._qat(trainer).calibration_samples)
        known = self._saved.get("starts")
        self.grids, self._saved["starts"] = fractional_grids(
            self.space, pl_module, self.widths, run, known, list(averages(trainer))
        )
        self.parameters = list({id(w): w.value for w in self.widths.values() if not w.fixed}.values())
        self.optimizer = Adam(self.parameters, lr=self.lr, betas=BETAS)
        self._restore()
        for grid in self._all():
            grid.attach()
        remember(pl_module, current_plan(pl_module))

    def check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        check_reached(trainer, self, "until", self.until)
        if self.choice is not None:  # a checkpoint from after they became whole has brought them
            return
        if self.output is not None and not self._saved:
            with self.own_mistakes():
                outputs(self.output, None, "output")
        source = trainer_source(trainer)
        shell = self._space(self._qat(trainer), pl_module, source)
        self._check_apart(trainer, pl_module)
        self._costs(shell, source)
        self.widths = shared_widths(self.space, pl_module)
        if all(width.fixed for width in self.widths.values()):
            raise self.mistake("every grid has one width to choose from; give more weight_bits or act_bits")
        check_grids(self.space, pl_module, self.widths)

    def _qat(self, trainer: pl.Trainer) -> QATCallback:
        callbacks = callbacks_of(trainer, QATCallback)
        if len(callbacks) != 1:
            raise self.mistake(f"needs one QATCallback, not {len(callbacks)}")
        if len(trainer.optimizers) > 1:
            raise self.mistake(f"{len(trainer.optimizers)} optimizers would each count the others' gradients")
        return callbacks[0]

    def _space(self, qat: QATCallback, pl_module: pl.LightningModule, source: Source) -> pl.LightningModule:
        """Finds what can be chosen; returns the module without its quantizers."""
        shell = bare(copied(pl_module))
        policy = joint_policy([qat], shell)
        self.space: Space = make_space(shell, policy, self.settings, run_steps(shell, source, samples=1))
        self.other = {
            "calibration_samples": qat.calibration_samples, "scale_lr": qat.scale_lr_factor, "module": None,
        }  # fmt: skip
        return shell

    def _check_apart(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuses a grid whose bits a schedule sets, too: what was learned would be gone at its next step."""
        learned = {q for tensor in self.space.tensors for q in quantizers_at(self.space, pl_module, tensor)}
        for other in callbacks_of(trainer, AnnealBits):
            if both := [name for name, quantizer in other.annealed(pl_module).items() if quantizer in learned]:
                raise self.mistake(
                    f"AnnealBits changes the bits of '{both[0]}', which are learned; leave one of the two "
                    "out, or name grids that are not learned with AnnealBits' match"
                )

    def _costs(self, shell: pl.LightningModule, source: Source) -> None:
        """Finds the costs of all choices, and whether the budgets can be met."""
        every = {tensor: self.space.widths(tensor) for tensor in self.space.tensors}
        layers = [dataclasses.replace(layer, options=all_pairs(layer, every)) for layer in self.space.layers]
        packed: dict[int, int] = self._saved.get("packed", {})
        if "packed" in self.settings.budget and not packed:
            ends = sorted(self.space.plans)

            def calibrating(model: Any) -> None:
                run_steps(model, source, samples=1)()

            for bits in {ends[0], ends[-1]}:
                plan = self.space.plans[bits]
                packed[bits] = packed_bytes(convert(calibrated(shell, plan, calibrating), plan), plan)
        self._saved["packed"] = packed
        self.costs = make_costs(dataclasses.replace(self.space, layers=layers), Files(packed))
        self.relaxed = {name: RelaxedCost(self.costs[name], layers) for name in self.settings.budget}
        self._nearest({tensor: float(max(widths)) for tensor, widths in every.items()})

    def _nearest(self, values: Mapping[str, float]) -> dict[str, Pair]:
        """The allocation within the budgets that is nearest to these widths."""
        harms = make_harms(self.space, lambda tensor, bits: (bits - values[tensor]) ** 2)
        try:
            return solve(Problem(self.space.layers, harms, self.costs, self.space.tied), self.settings.budget)
        except UserError as error:
            raise self.mistake(f"budget: {error}") from None

    def _all(self) -> list[FractionalGrid]:
        return [grid for grids in self.grids.values() for grid in grids]

    # -- steps ---------------------------------------------------------------------------------------------------------

    def penalty(self) -> Tensor:
        """Squares of what is over the budgets, each in units of itself, times `strength`."""
        over = [
            (self.relaxed[name].total(self.widths) / limit - 1).relu() for name, limit in self.settings.budget.items()
        ]
        return self.strength * torch.stack(over).square().sum()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.choice is None and reached(trainer, self.until):
            self._become_whole(trainer, pl_module)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self.choice is not None:
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        for value in self.parameters:
            grad = torch.zeros_like(value) if value.grad is None else value.grad
            if trainer.world_size > 1:
                torch.distributed.all_reduce(grad)
            value.grad = grad / (trainer.world_size * (1.0 if scaler is None else scaler.get_scale()))
        if all(value.grad is None or value.grad.isfinite() for value in self.parameters):
            with torch.enable_grad():
                self.penalty().backward()
            self.optimizer.step()
        self.optimizer.zero_grad()
        for width in self.widths.values():
            width.clamp()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.choice is None and any([grid.become(grid.width.nearest) for grid in self._all()]):
            remember(pl_module, current_plan(pl_module))

    def _become_whole(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.choice = self._nearest({tensor: width.at for tensor, width in self.widths.items()})
        for layer in self.space.layers:
            weight, act = self.choice[layer.name]
            for tensor, bits in ((layer.weight, weight), (layer.act, act)):
                for grid in self.grids.get(tensor or "", ()):
                    grid.detach()
                    grid.become(bits or 0)
        remember(pl_module, current_plan(pl_module))
        predicted = predict(Problem(self.space.layers, {}, self.costs), self.choice)
        rank_zero_info("LearnBits: " + ", ".join(f"{k} {COSTS[k].shown(v)}" for k, v in predicted.items()))
        if self.output is not None and trainer.is_global_zero:
            limits = " ".join(f"{name}={value:g}" for name, value in self.settings.budget.items())
            write(Path(self.output), self.space.policy, self.choice, predicted, self.other, f"LearnBits: {limits}")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.choice is not None:
            return
        logged = {f"bits/{tensor}": width.at for tensor, width in self.widths.items() if not width.fixed}
        with torch.no_grad():
            logged |= {f"bits/cost/{name}": cost.total(self.widths).item() for name, cost in self.relaxed.items()}
            logged["bits/penalty"] = self.penalty().item()
        pl_module.log_dict(logged)

    def release(self) -> None:
        for grid in self._all():
            grid.detach()

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        if self.choice is not None:
            return {"choice": {name: list(pair) for name, pair in self.choice.items()}}
        if not self.widths:
            return {}
        values = {tensor: width.at for tensor, width in self.widths.items()}
        return {"values": values, "optimizer": self.optimizer.state_dict(), **self._saved}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if "choice" in state_dict:
            self.choice = {name: (pair[0], pair[1]) for name, pair in state_dict["choice"].items()}
        else:
            self._saved = dict(state_dict)

    def _restore(self) -> None:
        """Takes over the widths and the optimizer that a checkpoint from the middle has brought."""
        values, optimizer = self._saved.pop("values", None), self._saved.pop("optimizer", None)
        if values is None:
            return
        with torch.no_grad():
            for tensor, width in self.widths.items():
                width.value.fill_(values[tensor])
                width.clamp()
        self.optimizer.load_state_dict(optimizer)
