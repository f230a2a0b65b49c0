"""The proof of a file, but for the data: it is opened and looked at, and what it then answers is judged."""

from collections.abc import Iterable
from pathlib import Path

from torch import nn

from qat.export.target import Runner, Target
from qat.export.verify import Comparison, Verdict, check_codes, check_outputs


def opened(
    path: Path, target: Target, prepared: nn.Module, float_model: nn.Module
) -> tuple[dict[Runner, Comparison], Verdict]:
    """Opens a file with the runtime's optimizations and, where they can be turned off, without.

    Args:
        path: The file.
        target: Its format.
        prepared: The model that was exported: see `Target.prepared`.
        float_model: A float model of the architecture, for formats that hold no graph.

    Returns:
        The runners, optimized first, with the comparison that each one's answers go to; and the verdict with what no
        answer shows: first the codes, then kernels and rules.

    Raises:
        UserError: if the file is missing, damaged or of something else.
    """
    optimized = target.load(path, float_model)
    runners = {optimized: Comparison()}
    if target.optimizes:
        runners[target.load(path, float_model, optimize=False)] = Comparison()
    verdict = Verdict()
    check_codes(verdict, prepared, target.codes(path))
    target.check_kernels(verdict, prepared, optimized)
    return runners, verdict


def check_answers(verdict: Verdict, target: Target, comparisons: Iterable[Comparison]) -> None:
    """Adds whether the answers of the runners are the model's, by the thresholds of the target."""
    for comparison, note in zip(comparisons, ("", " without optimizations"), strict=False):
        check_outputs(verdict, comparison, target.min_agreement, target.max_mean_steps, note)
