"""From a float model to a file, step by step and without a trainer (docs/python.md).

    quantize        a policy and some inputs become calibrated quantizers in the model
    ...             a training loop of your own
    to_integers     a copy whose weights are integers
    export_model    a file for a runtime, and the proof that it computes what the model does

`QATCallback` and `qat train` take the same steps.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from qat.calibrate import calibrate
from qat.convert import convert, is_converted
from qat.copies import copied
from qat.errors import UserError
from qat.export.bisect import first_divergence
from qat.export.proof import check_answers, opened
from qat.export.target import Target
from qat.insert import apply_plan, plan_of, remove
from qat.planning.audit import checked_plan
from qat.planning.plan import Plan
from qat.policies.networks import Policy, policy_of


def quantize(model: nn.Module, policy: Policy | Mapping[str, Any] | str, example: Any) -> Plan:
    """Inserts quantizers into a float model, in place, and gives each its first range.

    Args:
        model: The float model; it stays in its mode, and gets nothing if anything is wrong.
        policy: Which grids go where: settings as in `configs/quant`, the name of a preset there, or a `QuantPolicy`.
        example: Inputs that are like those of training: a tensor, a tuple of positional or a dictionary of keyword
            arguments; a list of several of these, the first of which shows how the model computes; or, where the model
            is not called like that, a function without arguments that runs it on one batch.

    Returns:
        The plan, which the model remembers (`qat.plan_of`).

    Raises:
        UserError: if the policy is wrong or does not fit the model, there is no such preset, or an input is NaN.
    """
    if isinstance(policy, str):
        from qat.config.presets import preset  # reads YAML with Hydra: only for who asks for one

        policy = preset(policy)
    policy = policy_of(policy) if isinstance(policy, Mapping) else policy
    runs = _runs(model, example)
    if not runs:
        raise UserError("example=[]: holds no batch to look at")
    plan = checked_plan(model, policy, runs[0])
    apply_plan(model, plan)
    try:
        calibrate(model, lambda: [run() for run in runs])
    except BaseException:
        remove(model)
        raise
    return plan


def _runs(model: nn.Module, example: Any) -> list[Callable[[], Any]]:
    """The calls of the model that an example stands for, one for each batch."""
    if isinstance(example, list):
        return [run for batch in example for run in _runs(model, batch)]
    if isinstance(example, Tensor | PackedSequence):  # which is a tuple, too
        return [lambda: model(example)]
    if isinstance(example, tuple):
        return [lambda: model(*example)]
    if isinstance(example, Mapping):
        return [lambda: model(**example)]
    if callable(example):
        return [example]
    raise UserError(
        f"example={type(example).__name__}: must be a tensor, a tuple or dictionary of arguments, a list of such "
        "batches (of a DataLoader: [x for x, _ in loader]), or a function that runs the model"
    )


def to_integers(model: nn.Module) -> nn.Module:
    """A copy of a quantized model whose weights are integer codes, in evaluation mode on the CPU; the model itself is
    left as it is.

    Raises:
        UserError: if it holds no quantizers, or a grid that no integers stand for.
    """
    return convert(model, plan_of(model))


def export_model(
    model: nn.Module, target: str, path: str | Path, example: Any = None, *, verify: bool = False, **settings: Any
) -> None:
    """Writes a model to a file, with a manifest beside it.

    Args:
        model: What `quantize` has changed, trained or not, or what `to_integers` made of it.
        target: The format, by its name in docs/deploy.md (`onnx`).
        path: The file, or the folder where the format is one.
        example: One input tensor of two samples or more; formats that hold tensors and no graph need none.
        verify: Whether to run the file on `example` and compare it with the model.
        **settings: Of the target, as on the command line (`int4=True`).

    Raises:
        UserError: if the format cannot hold the model, something else is at `path`, or the file falls short.
    """
    from qat.config.exports import target_named  # reads YAML with Hydra

    plan, path = plan_of(model), Path(path)
    to = target_named(target, {name: str(value) for name, value in settings.items()})
    converted = is_converted(model)
    if converted and (not to.integer or (verify and to.graph is None)):
        raise UserError(f"target={target}: takes the quantized model here, not its integers")
    if not isinstance(example, Tensor) and (verify or to.graph is not None):
        raise UserError(f"target={target}: needs an example, one input tensor of two samples or more")
    if reason := to.refusal(model, plan):
        raise UserError(f"{path}: {reason}")
    example = example.detach().cpu() if isinstance(example, Tensor) else None
    prepared = copied(model).cpu().eval() if converted else to.prepared(model, plan)
    to.export(prepared, plan, example, path)
    if verify:
        _verify(path, to, prepared, copied(model).cpu().eval(), example)


@torch.no_grad()
def _verify(path: Path, target: Target, prepared: nn.Module, model: nn.Module, x: Tensor) -> None:
    expected = model(x).numpy()
    if target.graph is None:  # such a file is opened in the float model
        remove(model)
    runners, verdict = opened(path, target, prepared, model)
    for runner, comparison in runners.items():
        comparison.update(expected, runner(x.numpy()))
    check_answers(verdict, target, runners.values())
    if failed := [f"{check.name} {check.detail}" for check in verdict.checks if not check.passed]:
        raise UserError(f"{path}: {'; '.join(failed)}; {first_divergence(prepared, next(iter(runners)), x.numpy())}")
