"""The user's own test loop, with an exported file in the place of the model.

So the metric is the one that training measured, computed from the file.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from qat.errors import UserError, nearest
from qat.export.onnx import OnnxTarget
from qat.export.runtime import OnnxRunner
from qat.export.verify import Comparison, Verdict, check_codes, check_kernels, check_metric, check_outputs


def test_metric(trainer: pl.Trainer, module: pl.LightningModule, data: pl.LightningDataModule, metric: str) -> float:
    """Runs the test loop.

    Raises:
        UserError: if the module logs no such metric, with the nearest one that it does.
    """
    results = trainer.test(module, datamodule=data, verbose=False)[0]
    if metric not in results:
        raise UserError(
            f"metric={metric}: {type(module).__name__}.test_step logs no such value{nearest(metric, results)}"
        )
    return float(results[metric])


@contextmanager
def _answering(module: pl.LightningModule, runner: OnnxRunner, comparison: Comparison) -> Iterator[None]:
    """While it lasts, `module(x)` returns what the file computes, and both answers are compared."""
    original = module.forward

    def forward(x: Tensor) -> Tensor:
        expected = original(x)
        actual = runner(x.detach().cpu().numpy())
        comparison.update(expected.detach().float().cpu().numpy(), actual)
        return torch.from_numpy(actual).to(expected)

    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]


def verify_onnx(
    path: Path,
    target: OnnxTarget,
    converted: nn.Module,
    trainer: pl.Trainer,
    module: pl.LightningModule,
    data: pl.LightningDataModule,
    metric: str,
    trained: float,
) -> Verdict:
    """Compares an exported file with the fake-quantized module on the whole test set.

    Args:
        path: The file.
        target: Thresholds.
        converted: The converted model that was exported.
        trainer: Runs the test loop.
        module: The fake-quantized module.
        data: Its test data.
        metric: Name of the metric.
        trained: Its value for the fake-quantized module.
    """
    runner, comparison, verdict = OnnxRunner(path), Comparison(), Verdict()
    check_codes(verdict, converted, str(path))
    check_kernels(verdict, converted, runner)
    with _answering(module, runner, comparison):
        exported = test_metric(trainer, module, data, metric)
    check_outputs(verdict, comparison, target.min_agreement)
    check_metric(verdict, metric, trained, exported, target.max_metric_change)
    return verdict
