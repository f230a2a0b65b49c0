"""The user's own test loop, with an exported file in the place of the model.

So the metric is the one that training measured, computed from the file.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from qat.errors import UserError, nearest
from qat.export.bisect import first_divergence
from qat.export.target import Runner, Target
from qat.export.verify import Comparison, Verdict, check_codes, check_metric, check_outputs


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
        raise UserError(f"metric={metric}: there is no test batch to measure it on; is trainer.limit_test_batches 0?")
    results = {name: value for loader in loaders for name, value in loader.items()}
    if metric not in results:
        raise UserError(
            f"metric={metric}: {type(module).__name__}.test_step logs no such value{nearest(metric, results)}"
        )
    return float(results[metric])


@contextmanager
def _answering(module: pl.LightningModule, runners: dict[Runner, Comparison], batches: list[Any]) -> Iterator[None]:
    """While it lasts, `module(x)` returns what the first runner computes, and the answers of all are compared with the
    module's own; the first batch is kept."""
    original = module.forward

    def forward(x: Tensor) -> Tensor:
        expected, sample = original(x), x.detach().cpu().numpy()
        answers = [runner(sample) for runner in runners]
        for comparison, actual in zip(runners.values(), answers, strict=True):
            comparison.update(expected.detach().float().cpu().numpy(), actual)
        if not batches:
            batches.append(sample)
        return torch.from_numpy(answers[0]).to(expected)

    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]


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
        target: Its format, and thresholds.
        prepared: What was exported: see `Target.prepared`.
        float_model: A float model of the architecture, for formats that hold no graph.
        trainer: Runs the test loop.
        module: The fake-quantized module.
        data: Its test data.
        metric: Name of the metric.
        trained: Its value for the fake-quantized module.

    Raises:
        UserError: if the file is missing, damaged or of something else.
    """
    optimized = target.load(path, float_model)
    runners = {optimized: Comparison()}
    if target.optimizes:
        runners[target.load(path, float_model, optimize=False)] = Comparison()
    verdict, batches = Verdict(), []
    check_codes(verdict, prepared, target.codes(path))
    target.check_kernels(verdict, prepared, optimized)
    structure = verdict.checks[1:]  # kernels and rules, which no value shows
    with _answering(module, runners, batches):
        exported = test_metric(trainer, module, data, metric)
    for comparison, note in zip(runners.values(), ("", " without optimizations"), strict=False):
        check_outputs(verdict, comparison, target.min_agreement, target.max_mean_steps, note)
    check_metric(verdict, metric, trained, exported, target.max_metric_change)
    if any(not check.passed for check in verdict.checks if check not in structure):
        verdict.add("layers", False, first_divergence(prepared, optimized, batches[0]))
    return verdict
