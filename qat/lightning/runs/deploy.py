"""After training: a finished run, or any checkpoint in it, becomes files, and files are proven.

Nothing is trained or calibrated here: the checkpoint holds the plan, every scale and the shape of the model's input. So
`restore` and `export` need neither the data nor a GPU; `verify` runs the test set.
"""

import copy
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from qat.config.configs import read_config
from qat.config.exports import moved, parsed
from qat.errors import UserError, last_line, nearest
from qat.export.packed import PackedTarget
from qat.export.target import Target
from qat.export.verify import Verdict
from qat.files import read_object
from qat.lightning.module import INPUT_KEY, insert_plan
from qat.lightning.runs.export_stage import float_model_of, verdict_on
from qat.lightning.runs.quiet import calm
from qat.lightning.runs.workspace import ON_THE_CPU, Workspace, unmixed
from qat.lightning.weights import CHECKPOINT_KEY, read_checkpoint
from qat.planning.plan import Plan
from qat.report import report_table
from qat.report.format import verdict_in_words
from qat.run_files import CONFIG, REPORT, TRAINED


class Trained(NamedTuple):
    """A quantized model out of a checkpoint.

    Attributes:
        folder: The run it belongs to.
        checkpoint: The file.
        cfg: The run's config.
        float_model: The module as its class makes it, without quantizers.
        module: The fake-quantized module.
        plan: The plan of its grids.
        example: A random input of two samples, of the shape that training had; `None` if the checkpoint says none.
    """

    folder: Path
    checkpoint: Path
    cfg: DictConfig
    float_model: pl.LightningModule
    module: pl.LightningModule
    plan: Plan
    example: Tensor | None


def restore(path: Path, changed: Mapping[str, str] | None = None) -> Trained:
    """Rebuilds the quantized model of a run's folder, or of a checkpoint below one, on the CPU.

    Args:
        path: The folder or the checkpoint.
        changed: Keys of the run's config that differ now (`data.root`), and their values as on a command line.

    Raises:
        UserError: if there is no such run or key, its config is damaged, or the checkpoint is damaged, of a float
            model, or of another architecture.
    """
    folder = _folder(path)
    cfg = read_config(folder / CONFIG)
    for key, value in (changed or {}).items():
        group, _, name = key.partition(".")
        if name not in cfg[group]:
            raise UserError(f"{key}={value}: the run's {group} has no '{name}'{nearest(name, map(str, cfg[group]))}")
        OmegaConf.update(cfg, key, parsed({key: value})[group][name])
    cfg.run_dir, cfg.ckpt = str(folder), "last"
    for key, value in {**ON_THE_CPU, **unmixed(cfg.trainer)}.items():
        OmegaConf.update(cfg, f"trainer.{key}", value, merge=False, force_add=True)
    OmegaConf.resolve(cfg)
    file = path / TRAINED if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{path} holds no finished run: there is no {TRAINED}; a checkpoint can be named instead")
    checkpoint = read_checkpoint(file)
    if CHECKPOINT_KEY not in checkpoint:
        raise UserError(f"checkpoint {file}: is of a float model; there are no integers to make of it")
    float_model = float_model_of(cfg)
    module = copy.deepcopy(float_model)
    plan = Plan.from_dict(checkpoint[CHECKPOINT_KEY])
    insert_plan(module, plan)
    try:
        module.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        raise UserError(f"checkpoint {file}: is of another model than the run's config: {last_line(error)}") from None
    return Trained(folder, file, cfg, float_model, module.eval(), plan, _example(checkpoint.get(INPUT_KEY)))


def _folder(path: Path) -> Path:
    for folder in (path, *path.parents):
        if (folder / CONFIG).is_file():
            return folder
    raise UserError(f"{path}: neither a run's folder nor a checkpoint in one (there is no .hydra/config.yaml)")


def _example(described: dict[str, Any] | None, samples: int = 2) -> Tensor | None:
    """An input of the recorded shape: noise, or zeros where indices are wanted."""
    if described is None:
        return None
    dtype = getattr(torch, described["dtype"])
    shape = (samples, *described["shape"])
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype) if dtype.is_floating_point else (
        torch.zeros(shape, dtype=dtype)
    )  # fmt: skip


def export(path: Path, target: Target, out: Path | None = None) -> Path:
    """Exports a run or a checkpoint.

    Args:
        path: The run's folder, or a checkpoint below it.
        target: The format.
        out: The file; by default, the target's name in the run's folder or, of a checkpoint, in a folder called like
            it: in the run's, it would take the place of the run's own.

    Returns:
        The file.

    Raises:
        UserError: see `restore` and `Target.export`.
    """
    with calm():
        trained = restore(path)
        if trained.example is None and target.graph is not None:
            raise UserError(f"checkpoint {trained.checkpoint}: does not say what the model's input looks like")
        own = trained.checkpoint.name == TRAINED
        out = out or (trained.folder if own else trained.checkpoint.with_suffix("")) / target.file
        if reason := target.refusal(trained.module, trained.plan):
            raise UserError(f"{trained.checkpoint}: {reason}")
        target.export(target.prepared(trained.module, trained.plan), trained.plan, trained.example, out)
    return out


def verify(
    path: Path, target: Target | None = None, file: Path | None = None, data: Mapping[str, str] | None = None
) -> bool:
    """Verifies exported files on the test set, and prints what was found.

    Args:
        path: The run's folder, or the checkpoint below it that the file was exported from.
        target: Format of `file`.
        file: The file; `None` for all that `qat train` wrote: the run's own target and the packed integers.
        data: What differs in the run's data now (`data.root`).

    Returns:
        Whether everything was verified.

    Raises:
        UserError: if there is no finished run, or no file; if what the run wrote down is damaged.
    """
    folder = _folder(path)
    if not (folder / REPORT).is_file():
        raise UserError(f"{folder} holds no finished run: there is no report.json")
    report = read_object(folder / REPORT, "stages")
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)  # what it says of every trainer
    with calm():
        if path.is_dir() and not (path / TRAINED).is_file():
            raise UserError(f"{folder} was run with quant=off; there is no file to verify")
        trained = restore(path, data)
        if target is not None:  # that of the file, whatever wrote the run's own
            trained.cfg.export = None
        elif isinstance(written := (trained.cfg.export or {}).get("_target_"), str):
            trained.cfg.export._target_ = moved(written)
        run = Workspace(trained.cfg, folder)
        run.module = trained.module
        if trained.checkpoint.name != TRAINED:
            run.progress.stages["qat"] = {"metric": run.measure()}
        if target is not None and file is not None:
            return _show(run, file, _verdict(run, target, trained, file))
        passed = True
        if run.target is not None:
            verdict = _verdict(run, run.target, trained)
            run.console.print(report_table(report | {"verify": verdict.to_dict()}))
            passed = verdict.passed
        packed = PackedTarget()
        if packed.refusal(trained.module, trained.plan):
            return passed
        return _show(run, folder / packed.file, _verdict(run, packed, trained)) and passed


def _verdict(run: Workspace, target: Target, trained: Trained, file: Path | None = None) -> Verdict:
    return verdict_on(run, target, target.prepared(trained.module, trained.plan), trained.float_model, file)


def _show(run: Workspace, file: Path, verdict: Verdict) -> bool:
    found = verdict_in_words({"verify": verdict.to_dict()})
    assert found is not None
    style = "bold green" if found.passed else "bold red"
    run.console.print(f"{file}: {found.text}", style=style, highlight=False, soft_wrap=True)
    for failure in found.failures:
        run.console.print(f"  {failure}", style="red", highlight=False, markup=False, soft_wrap=True)
    return verdict.passed
