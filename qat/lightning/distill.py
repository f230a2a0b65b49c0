"""Distillation: the quantized network learns from a float one beside the labels (Hinton et al., arXiv 1503.02531; for
quantization, Mishra and Marr, "Apprentice", ICLR 2018). The usual teacher is the model's own float self.

    loss = (1 - alpha) task + alpha T^2 KL(softmax(teacher / T) || softmax(student / T)) + features * relative error

The task loss is whatever the user's `training_step` returns. While training lasts, that method is wrapped: forward
hooks note what the model is called with and what it answers, the teacher is asked the same, and the terms are added to
the step's loss. So accumulated gradients, mixed precision, clipping and DDP treat them as they treat any loss.

The teacher belongs to the callback: no optimizer and no checkpoint holds it. A checkpoint holds a hash of its weights,
and training refuses to go on under another teacher.

Temperatures above 1 weaken a network of few bits (W3A8, four seeds: T = 2 lost 0.5 to 0.9 points, T = 5 lost 8 to 12),
and labels alone can be the better teacher where data is plenty: measure both.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn

from qat.copies import copied
from qat.errors import UserError
from qat.lightning.base import QuantizationCallback, callbacks_of
from qat.lightning.callback import QATCallback
from qat.lightning.module import after_configure, bare
from qat.lightning.taps import TappedCall, Taps, answer, fingerprint, named_layers
from qat.lightning.weights import load_weights
from qat.starts import Equalize


class Distill(QuantizationCallback):
    """Adds a teacher's answers to the loss of any LightningModule that optimizes automatically.

    Args:
        teacher: File with the teacher's weights; `None` for those that the module has when fit is called.
        model: The teacher, if it is of another architecture; `teacher` is then loaded into it.
        alpha: Weight of the teacher's answer; the task's loss gets `1 - alpha`.
        temperature: T; above 0. Of `kl` alone.
        loss: `kl` for logits; `mse` for outputs that are no classes, and for the one logit of two classes.
        class_axis: Axis of the logits that the classes are along. Of `kl` alone.
        output_of: Module path whose output are the logits, where `training_step` does not call `self(x)`.
        features: Layers of both (globs over module paths) whose outputs should be like the teacher's.
        feature_weight: Weight of their squared error relative to the teacher's mean square, averaged over layers.

    Raises:
        UserError: if a number is out of its range; (when fit starts) if the teacher's file does not fit, a pattern
            matches nothing, the module optimizes manually, or its features are equalized and the teacher's are not; (in
            a step) if nothing was called that could be compared, or what was called cannot learn from it.
    """

    def __init__(
        self,
        teacher: str | Path | None = None,
        model: nn.Module | None = None,
        alpha: float = 0.7,
        temperature: float = 1.0,
        loss: Literal["kl", "mse"] = "kl",
        class_axis: int = -1,
        output_of: str = "",
        features: str | Sequence[str] = (),
        feature_weight: float = 1.0,
    ) -> None:
        if not 0 <= alpha <= 1:
            raise UserError(f"alpha={alpha}: must be from 0 to 1")
        if not 0 < temperature < float("inf"):
            raise UserError(f"temperature={temperature}: must be above 0")
        if not 0 <= feature_weight < float("inf"):
            raise UserError(f"feature_weight={feature_weight}: must be 0 or more")
        if loss not in ("kl", "mse"):
            raise UserError(f"loss={loss!r}: must be kl or mse")
        for name, value, default in (("temperature", temperature, 1), ("class_axis", class_axis, -1)):
            if loss == "mse" and value != default:
                raise UserError(f"{name}={value}: has no effect with loss=mse; leave it at {default}, or use loss=kl")
        patterns = [features] if isinstance(features, str) else list(features)
        if not alpha and not (patterns and feature_weight):
            raise UserError("alpha=0 without features: there is nothing to learn from the teacher; leave it out")
        self.file, self.model = teacher, model
        self.alpha, self.temperature, self.loss, self.class_axis = alpha, temperature, loss, class_axis
        self.output_of, self.patterns, self.feature_weight = output_of, patterns, feature_weight
        self._learns: dict[str, bool] = {}
        self.forget()

    def forget(self) -> None:
        self._teacher: nn.Module | None = None
        self._fingerprint: str | None = None

    @property
    def teacher(self) -> nn.Module:
        """The teacher, from when training starts."""
        assert self._teacher is not None
        return self._teacher

    # -- the teacher ---------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit" or self._teacher is not None:
            return
        self._check_settings(trainer, pl_module)

        def copy() -> None:
            self._teacher = self._make_teacher(pl_module, self.file)
            self._fingerprint = fingerprint(self._teacher)  # before the trainer's precision rounds it

        after_configure(pl_module, copy)  # which may still make layers, and quantizers; a restore comes behind it

    def check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finds before a float training what fit would find; the teacher's file may still be to come in the trainer's
        folder.
        """
        self._check_settings(trainer, pl_module)
        file, folder = self.file, Path(trainer.default_root_dir).resolve()
        if file is not None and not Path(file).exists() and Path(file).resolve().is_relative_to(folder):
            file = None
        student = bare(copied(pl_module))  # so that an error lists no quantizers among its modules
        self._taps(student, self._make_teacher(pl_module, file))

    def _check_settings(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not pl_module.automatic_optimization:
            raise self.mistake(f"{type(pl_module).__name__} optimizes manually, so its step returns no loss to add to")
        # Equalizing scales the channels that features compare: of a teacher, too, if it is copied afterwards.
        callbacks = callbacks_of(trainer, Callback)
        scales = [c for c in callbacks if isinstance(c, QATCallback) and any(isinstance(s, Equalize) for s in c.starts)]
        if not (self.patterns and scales):
            return
        if self.file is not None or self.model is not None:
            way = "set teacher to null (and no model), for the module's own float self"
        elif callbacks.index(self) < callbacks.index(scales[0]):
            way = "put Distill behind QATCallback"
        else:
            return
        raise self.mistake(f"features: Equalize scales the model's channels and not this teacher's; {way}")

    def _make_teacher(self, pl_module: pl.LightningModule, file: str | Path | None) -> nn.Module:
        teacher: nn.Module = bare(copied(pl_module) if self.model is None else self.model)
        if file is not None:
            load_weights(teacher, file)
        return teacher.eval().requires_grad_(False)

    def _taps(self, student: nn.Module, teacher: nn.Module) -> tuple[Taps, Taps]:
        with self.own_mistakes():
            names = [self.output_of, *named_layers(student, teacher, self.patterns)]
            return Taps(student, names), Taps(teacher, names)

    def state_dict(self) -> dict[str, Any]:
        return {} if self._teacher is None else {"teacher": self._fingerprint}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._teacher is not None and state_dict.get("teacher") != self._fingerprint:
            raise self.mistake(
                "the checkpoint's training had another teacher; give the module the float weights it began "
                "with before fit (qat.load_weights), or name them with teacher"
            )

    # -- the loss ------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        teacher = self.teacher  # of a module that `setup` has checked
        trainer.precision_plugin.convert_module(teacher)
        teacher.to(pl_module.device)
        taps = self._taps(pl_module, teacher)
        self._learns = {}
        step: Callable[..., Any] = pl_module.training_step

        @functools.wraps(step)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():  # somebody only looks
                return step(*args, **kwargs)
            with taps[0]:
                output = step(*args, **kwargs)
            return output if output is None else self._add(output, taps, pl_module)

        pl_module.__dict__["training_step"] = training_step

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if frozen := [name for name, learns in self._learns.items() if not learns]:
            rank_zero_warn(f"Distill: frozen in all of training, so the teacher had no effect: {', '.join(frozen)}")

    def release(self) -> None:
        if self._module is not None:
            self._module.__dict__.pop("training_step", None)

    def _add(self, output: Any, taps: tuple[Taps, Taps], pl_module: pl.LightningModule) -> Any:
        """The step's output with the teacher's terms in its loss."""
        student, teacher = taps
        calls = student.calls[self.output_of]
        if not calls:
            what = f"output_of='{self.output_of}'" if self.output_of else "self(x)"
            raise self.mistake(
                f"training_step never calls {what}, so there is nothing to compare with the teacher; "
                "name the module it calls with output_of"
            )
        with torch.no_grad(), teacher:
            for call in calls:
                teacher.module(self.output_of)(*call.args, **call.kwargs)
        task = output["loss"] if isinstance(output, Mapping) else output
        loss, logged = (1 - self.alpha) * task, {}
        pairs = list(zip(calls, teacher.calls[self.output_of], strict=True))
        if self.alpha:
            self._note_learning(self.output_of or "self(x)", calls)
            terms = [self._compare(answer(ours.output), answer(theirs.output)) for ours, theirs in pairs]
            logged["distill/output"] = sum(terms) / len(terms)
            loss = loss + self.alpha * logged["distill/output"]
        if self.patterns:
            logged["distill/features"] = self._features(student, teacher)
            loss = loss + self.feature_weight * logged["distill/features"]
        size = len(answer(calls[0].output))
        pl_module.log_dict(
            {k: v.detach() for k, v in logged.items()}, on_step=False, on_epoch=True, sync_dist=True, batch_size=size
        )
        student.clear()
        teacher.clear()
        return {**output, "loss": loss} if isinstance(output, Mapping) else loss

    def _note_learning(self, name: str, calls: Sequence[TappedCall]) -> None:
        """Sees whether gradients reach a module: one that is frozen may be set free later."""
        learns = any(answer(call.output).requires_grad for call in calls)
        self._learns[name] = learns or self._learns.get(name, False)
        if not any(call.recorded for call in calls):
            raise self.mistake(
                f"'{name}' ran without gradients, so it cannot learn from the teacher: it is in a "
                "torch.no_grad(), or inside a torch.utils.checkpoint with use_reentrant=True (False works)"
            )

    def _compare(self, ours: Tensor, theirs: Tensor) -> Tensor:
        if ours.shape != theirs.shape:
            raise self.mistake(f"the teacher answers {list(theirs.shape)} where the model has {list(ours.shape)}")
        ours, theirs = ours.float(), theirs.float()
        if self.loss == "mse":
            return F.mse_loss(ours, theirs)
        if not ours.ndim or ours.size(self.class_axis) == 1:
            raise self.mistake(
                f"loss=kl compares classes, but there is one along class_axis={self.class_axis} of "
                f"{list(ours.shape)}, of probability 1 whatever the logit: use loss=mse"
            )
        of = [F.log_softmax(x / self.temperature, self.class_axis) for x in (theirs, ours)]
        return self.temperature**2 * (of[0].exp() * (of[0] - of[1])).sum(self.class_axis).mean()

    def _features(self, student: Taps, teacher: Taps) -> Tensor:
        terms = []
        for name in student.names[1:]:
            if len(student.calls[name]) != len(teacher.calls[name]) or not student.calls[name]:
                raise self.mistake(
                    f"features: '{name}' ran {len(student.calls[name])} times, the teacher's {len(teacher.calls[name])}"
                )
            self._note_learning(name, student.calls[name])
            for ours, theirs in zip(student.calls[name], teacher.calls[name], strict=True):
                a, b = answer(ours.output).float(), answer(theirs.output).float()
                if a.shape != b.shape:
                    raise self.mistake(f"features: '{name}' is {list(a.shape)}, the teacher's {list(b.shape)}")
                terms.append(F.mse_loss(a, b) / b.square().mean().clamp_min(torch.finfo(torch.float32).tiny))
        return torch.stack(terms).mean()
