"""The user's own test loop, with an exported file in the place of the model.

So the metric is the one that training measured, computed from the file.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qat.errors import UserError, nearest
from qat.export.bisect import first_divergence
from qat.export.proof import check_answers, opened
from qat.export.target import Runner, Target
from qat.export.torch.runner import TorchRunner
from qat.export.verify import Comparison, Verdict, check_metric


@contextmanager
def full_precision() -> Iterator[None]:
    """While it lasts, GPUs multiply float32 in float32 and not in TF32, which rounds the values of a grid to ten bits:
    what is measured would not be what a file computes.
    """
    cudnn, mkldnn = (getattr(torch.backends, name) for name in ("cudnn", "mkldnn"))
    kinds = [cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul, mkldnn.conv, mkldnn.matmul]
    before = [kind.fp32_precision for kind in kinds]
    try:
        old = cudnn.allow_tf32, torch.get_float32_matmul_precision()
    except RuntimeError:  # the user has named them one by one, after which torch does not answer to the old names
        old = None
    try:
        if old:  # compilers ask for the old names
            cudnn.allow_tf32 = False
            torch.set_float32_matmul_precision("highest")
        else:
            for kind in kinds:
                kind.fp32_precision = "ieee"
        yield
    finally:
        if old:
            cudnn.allow_tf32 = old[0]
            torch.set_float32_matmul_precision(old[1])
        for kind, precision in zip(kinds, before, strict=True):
            if kind.fp32_precision != precision:  # what an old name sets is more than it says
                kind.fp32_precision = precision


def test_metric(trainer: pl.Trainer, module: pl.LightningModule, data: pl.LightningDataModule, metric: str) -> float:
    """Runs the test loop.

    Raises:
        UserError: if there is no test batch, or if the module logs no such metric, with the nearest one that it does.
    """
    with full_precision():
        loaders = trainer.test(module, datamodule=data, verbose=False)
    if not loaders:
        raise UserError(
            f"metric={metric}: there is no test batch to measure it on: the test_dataloader is empty, or "
            "trainer.limit_test_batches is 0"
        )
    results = {name: value for loader in loaders for name, value in loader.items()}
    if metric not in results:
        raise UserError(
            f"metric={metric}: {type(module).__name__}.test_step logs no such value{nearest(metric, results)}"
        )
    return float(results[metric])


def check_monitors(
    trainer: pl.Trainer, module: pl.LightningModule, data: pl.LightningDataModule, monitors: Mapping[str, str]
) -> None:
    """Compares what callbacks look at with what the module logs in validation, if it has one.

    Args:
        trainer: Runs the validation loop.
        module: The module.
        data: The data, with a validation set.
        monitors: Name of the value, by the config key that says so; of those that do not begin with `val` nothing is
            known here.

    Raises:
        UserError: naming the first that is not logged, with the nearest value that is.
    """
    if not monitors or not is_overridden("validation_step", module) or not is_overridden("val_dataloader", data):
        return
    data.setup("fit")
    with _no_teardown(data):  # and with its hooks, which may make batches of what a loader yields
        trainer.validate(module, datamodule=data, verbose=False)
    if not sum(trainer.num_val_batches):
        return
    logged = list(trainer.callback_metrics)
    for key, name in monitors.items():
        if name not in logged and name.startswith("val"):
            kind = type(module).__name__
            raise UserError(f"{key}={name}: {kind}.validation_step logs no such value{nearest(name, logged)}")


@contextmanager
def _no_teardown(data: pl.LightningDataModule) -> Iterator[None]:
    """While it lasts, the data keep what `fit` will be given."""
    data.__dict__["teardown"] = lambda stage: None
    try:
        yield
    finally:
        del data.__dict__["teardown"]


@dataclass
class _Seen:
    """The first batch that passed the module, and whether an output of its own ever held NaN."""

    batch: np.ndarray | None = None
    nan: bool = False


@contextmanager
def _answering(module: pl.LightningModule, runners: dict[Runner, Comparison], seen: _Seen) -> Iterator[None]:
    """While it lasts, `module(x)` returns what the first runner computes, and the answers of all are compared with the
    module's own."""
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        expected = original(*args, **kwargs)
        answers = [_answer(runner, expected, args, kwargs) for runner in runners]
        for comparison, actual in zip(runners.values(), answers, strict=True):
            for ours, theirs in zip(_arrays(expected), _arrays(actual), strict=True):
                comparison.update(ours, theirs)
        seen.nan |= any(bool(np.isnan(ours).any()) for ours in _arrays(expected))
        if seen.batch is None and _one_tensor(args, kwargs):
            seen.batch = args[0].detach().cpu().numpy()
        return answers[0].to(expected) if isinstance(expected, Tensor) else answers[0]

    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]


def _one_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return len(args) == 1 and not kwargs and isinstance(args[0], Tensor)


def _answer(runner: Runner, expected: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Output of a file where the module returned `expected`."""
    if _one_tensor(args, kwargs) and isinstance(expected, Tensor):
        return torch.from_numpy(runner(args[0].detach().cpu().numpy()))
    if isinstance(runner, TorchRunner):
        return runner.answer(*args, **kwargs)
    raise UserError("test_step: the file takes one tensor and returns one, and here forward takes or returns more")


def _arrays(answer: Any) -> list[np.ndarray]:
    """The tensors in what a forward returned."""
    return [np.atleast_1d(x.detach().float().cpu().numpy()) for x in tree_leaves(answer) if isinstance(x, Tensor)]


def verify_file(
    path: Path,
    target: Target,
    prepared: nn.Module,
    float_model: nn.Module,
    trainer: pl.Trainer,
    module: pl.LightningModule,
    data: pl.LightningDataModule,
    metric: str,
    trained: float,
) -> Verdict:
    """Compares an exported file with the fake-quantized module on the whole test set, with the runtime's optimizations
    and, where they can be turned off, without.

    Args:
        path: The file.
        target: The format of the file, and the thresholds.
        prepared: The model that was exported: see `Target.prepared`.
        float_model: A float model of the architecture, for formats that hold no graph.
        trainer: Runs the test loop.
        module: The fake-quantized module.
        data: Its test data.
        metric: Name of the metric.
        trained: The value of the metric for the fake-quantized module.

    Raises:
        UserError: if the file is missing, damaged or of something else.
    """
    (runners, verdict), seen = opened(path, target, prepared, float_model), _Seen()
    structure = verdict.checks[1:]  # kernels and rules, which no value shows
    with _answering(module, runners, seen):
        exported = test_metric(trainer, module, data, metric)
    check_answers(verdict, target, runners.values())
    check_metric(verdict, metric, trained, exported, target.max_metric_change)
    if seen.nan:
        verdict.add("trained model", False, "its own outputs hold NaN, whatever the file: look at data and training")
    elif seen.batch is not None and any(not check.passed for check in verdict.checks if check not in structure):
        verdict.add("layers", False, first_divergence(prepared, next(iter(runners)), seen.batch))
    return verdict
