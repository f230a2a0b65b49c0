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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Adam, Optimizer

from qat.copies import copied
from qat.errors import UserError
from qat.insert import remember
from qat.lightning.averages import averages
from qat.lightning.base import QuantizationCallback, callbacks_of
from qat.lightning.callback import QATCallback, joint_policy
from qat.lightning.module import bare
from qat.lightning.schedules.anneal import AnnealBits, current_plan
from qat.lightning.schedules.moments import check_moment, check_reached, reached
from qat.lightning.steps import run_steps, trainer_source
from qat.measure.cost import COSTS
from qat.search.costs import Files
from qat.search.emit import outputs, write
from qat.search.fractional import FractionalGrid
from qat.search.learned import Learned, Starts, fractional_grids, make_learned, quantizers_at
from qat.search.settings import Search
from qat.search.space import Pair, Space, kept_bits, make_space
from qat.search.weigh import packed_files

BUDGETS = sorted(name for name, kind in COSTS.items() if kind.needs != "file")
"""Costs that are known at every step."""
BETAS = (0.9, 0.95)
"""Adam's betas: low, so that it soon forgets the penalty at the start. Otherwise what the loss asks for at the limit
would hardly count.
"""


@dataclass(frozen=True)
class Resumed:
    """What training goes on from: a checkpoint from the middle has all of it, an earlier fit of the same module what is
    found before the first step.

    Attributes:
        starts: The first scales.
        packed: Bytes of packed files, by the width that all grids have in them.
        values: Widths.
        optimizer: State of their optimizer.
    """

    starts: Starts
    packed: dict[int, int]
    values: dict[str, float] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)


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
        self.grids: dict[str, list[FractionalGrid]] = {}
        self._learned: Learned | None = None
        self._resumed: Resumed | None = None

    @property
    def learned(self) -> Learned:
        """What is learned, from when training starts."""
        assert self._learned is not None
        return self._learned

    # -- before the first step -----------------------------------------------------------------------------------------

    def check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._find(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        learned, resumed = self._find(trainer, pl_module), self._resumed
        if learned is None:
            return
        if learned.space.parts:
            rank_zero_info(f"LearnBits: not learned: {kept_bits(learned.space.parts)}")
        run = run_steps(pl_module, trainer_source(trainer), self._qat(trainer).calibration_samples)
        known = None if resumed is None else resumed.starts
        self.grids, starts = fractional_grids(
            learned.space, pl_module, learned.widths, run, known, list(averages(trainer))
        )
        self.parameters = learned.parameters
        self.optimizer = Adam(self.parameters, lr=self.lr, betas=BETAS)
        if resumed is not None and resumed.values:
            learned.restore(resumed.values)
            self.optimizer.load_state_dict(resumed.optimizer)
        self._learned, self._resumed = learned, Resumed(starts, learned.files.packed)
        for grid in self._all():
            grid.attach()
        remember(pl_module, current_plan(pl_module))

    def _find(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Learned | None:
        """What is to be learned; `None` once the widths are whole."""
        check_reached(trainer, self, "until", self.until)
        if self.choice is not None:  # a checkpoint from after they became whole has brought them
            return None
        if self.output is not None and self._resumed is None:
            with self.own_mistakes():
                outputs(self.output, None, "output")
        qat, source, shell = self._qat(trainer), trainer_source(trainer), bare(copied(pl_module))
        space = make_space(shell, joint_policy([qat], shell), self.settings, run_steps(shell, source, samples=1))
        self._check_apart(trainer, pl_module, space)
        files = Files() if self._resumed is None else Files(self._resumed.packed)
        if "packed" in self.settings.budget and not files.packed:

            def calibrating(model: Any) -> None:
                run_steps(model, source, samples=1)()

            files = packed_files(space, calibrating)
        with self.own_mistakes():
            return make_learned(space, pl_module, self.settings.budget, files)

    def _qat(self, trainer: pl.Trainer) -> QATCallback:
        callbacks = callbacks_of(trainer, QATCallback)
        if len(callbacks) != 1:
            raise self.mistake(f"needs one QATCallback, not {len(callbacks)}")
        if len(trainer.optimizers) > 1:
            raise self.mistake(f"{len(trainer.optimizers)} optimizers would each count the others' gradients")
        return callbacks[0]

    def _check_apart(self, trainer: pl.Trainer, pl_module: pl.LightningModule, space: Space) -> None:
        """Refuses a grid whose bits a schedule sets, too: what was learned would be gone at its next step."""
        learned = {q for tensor in space.tensors for q in quantizers_at(space, pl_module, tensor)}
        for other in callbacks_of(trainer, AnnealBits):
            if both := [name for name, quantizer in other.annealed(pl_module).items() if quantizer in learned]:
                raise self.mistake(
                    f"AnnealBits changes the bits of '{both[0]}', which are learned; leave one of the two "
                    "out, or name grids that are not learned with AnnealBits' match"
                )

    def _all(self) -> list[FractionalGrid]:
        return [grid for grids in self.grids.values() for grid in grids]

    # -- steps ---------------------------------------------------------------------------------------------------------

    def penalty(self) -> Tensor:
        """Squares of what is over the budgets, each in units of itself, times `strength`."""
        learned = self.learned
        over = [(total / learned.budget[name] - 1).relu() for name, total in learned.totals().items()]
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
        for width in self.learned.widths.values():
            width.clamp()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.choice is None and any([grid.become(grid.width.nearest) for grid in self._all()]):
            remember(pl_module, current_plan(pl_module))

    def _become_whole(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        learned = self.learned
        self.choice = learned.nearest()
        for layer in learned.space.layers:
            weight, act = self.choice[layer.name]
            for tensor, bits in ((layer.weight, weight), (layer.act, act)):
                for grid in self.grids.get(tensor or "", ()):
                    grid.detach()
                    grid.become(bits or 0)
        remember(pl_module, current_plan(pl_module))
        predicted = {name: cost.total(self.choice) for name, cost in learned.costs.items()}
        rank_zero_info("LearnBits: " + ", ".join(f"{k} {COSTS[k].shown(v)}" for k, v in predicted.items()))
        if self.output is not None and trainer.is_global_zero:
            qat = self._qat(trainer)
            other = {
                "calibration_samples": qat.calibration_samples, "scale_lr": qat.scale_lr_factor, "module": None,
            }  # fmt: skip
            limits = " ".join(f"{name}={value:g}" for name, value in learned.budget.items())
            write(Path(self.output), learned.space.policy, self.choice, predicted, other, f"LearnBits: {limits}")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.choice is not None:
            return
        logged = {f"bits/{tensor}": width.at for tensor, width in self.learned.widths.items() if not width.fixed}
        with torch.no_grad():
            logged |= {f"bits/cost/{name}": total.item() for name, total in self.learned.totals().items()}
            logged["bits/penalty"] = self.penalty().item()
        pl_module.log_dict(logged)

    def release(self) -> None:
        for grid in self._all():
            grid.detach()

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        if self.choice is not None:
            return {"choice": {name: list(pair) for name, pair in self.choice.items()}}
        if self._learned is None or self._resumed is None:  # training has not started
            return {}
        return vars(replace(self._resumed, values=self._learned.values, optimizer=self.optimizer.state_dict()))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if "choice" in state_dict:
            self.choice = {name: (pair[0], pair[1]) for name, pair in state_dict["choice"].items()}
        elif state_dict:
            self._resumed = Resumed(**state_dict)
