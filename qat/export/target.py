"""Base class of targets: a converted model goes in, a file comes out, and a runner opens the file again.

A target is one file in this package and one YAML in `configs/export`; nothing else lists them. It says

    model_refusal  why a model has no form in this format under its plan, before anything is trained or written
    write          the files, below a temporary folder
    runner         a class: the file as a function of arrays, by the runtime that users load it with (or `open`, which
                   makes one from more or less than its path and the settings of `load`)
    codes          the integer weights in the file, which verification compares bit for bit

Most are written from a converted model; one whose format has more than integers is written from the fake-quantized one
(`integer = False`). `prepared` makes either. The main file may be a folder.

`export` and `load` around them are the same for all: files appear together or not at all, beside them a manifest with
their hashes (`qat.export.manifest`), without which no runner is opened. An export takes the place of an earlier one by
the same target, and of nothing else.
"""

import importlib.util
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from qat.convert import INTEGERS, Holds, conversion_refusal, convert, what_holds
from qat.copies import copied
from qat.errors import UserError, last_line
from qat.export.manifest import check_manifest, check_unclaimed, made_by, stated, write_manifest
from qat.export.overflow import overflows
from qat.files import replace
from qat.integer import IntegerLayer, integer_bits
from qat.planning.plan import Plan
from qat.policies.engines import engine_of

INPUT, OUTPUT = "input", "output"


@dataclass(frozen=True)
class OnGrid:
    """The output of a layer as a runtime shows it that has it as codes alone, behind the limits that follow the layer.

    Attributes:
        values: The numbers that the codes stand for.
        scale, zero_point: The grid, of int8 codes.
        low, high: The limits.
    """

    values: np.ndarray
    scale: np.float32
    zero_point: int
    low: np.float32
    high: np.float32

    def of(self, output: np.ndarray) -> np.ndarray:
        """`output` of a layer as the runtime would show it: on the grid behind it."""
        codes = np.rint(output.clip(self.low, self.high) / self.scale) + self.zero_point
        return (codes.clip(-128, 127) - self.zero_point) * self.scale


class Runner(Protocol):
    """A loaded file."""

    def float_layers(self) -> list[str] | None:
        """The layers that the runtime computes in float; `None` where it cannot be seen."""
        ...

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Runs one batch."""
        ...

    def layer_outputs(self, x: np.ndarray, only: str | None = None) -> Mapping[str, np.ndarray | OnGrid]:
        """The outputs of layers on one batch, by name, in the order of execution; what the file does not show is left
        out.

        Args:
            x: The batch.
            only: One layer, whose predecessors are computed as they always are; `None` for all of them, without
                optimizations (a layer that is fused into its neighbours has no output to look at).
        """
        ...


def unrunnable(path: Path, x: np.ndarray | Tensor, reason: str) -> UserError:
    """The error for a batch that a loaded file does not take."""
    return UserError(f"{path}: cannot run on {x.dtype} {list(x.shape)}: {reason}")


def misfit(path: str | Path, model: nn.Module, error: RuntimeError) -> UserError:
    """The error for a file whose tensors torch does not load into `model`."""
    return UserError(f"{path}: holds another architecture than {type(model).__name__}: {last_line(error)}")


@dataclass(frozen=True)
class Target:
    """A file format, and what verification asks of a file in it.

    Attributes:
        min_agreement: Smallest share of test samples with the same prediction as the fake-quantized model.
        max_metric_change: Largest difference between the metric computed from the file and the trained one.
        max_mean_steps: Largest mean deviation of the outputs, in steps of an 8-bit grid over their range.
        engine: Name of the engine whose arithmetic the file is for (`qat.policies.engines`); `None` if it computes
            whatever is asked.
        max_bits: The widest codes that the format has.
        graph: Kind of graph (`onnx`, `torch`) that the file holds of the model's forward, which then takes one tensor
            `[N, ...]` and returns one; `None` for tensors alone, which torch runs in the model's class, whatever its
            forward takes.
        runner: Opens a file, with the settings of `load`.
        file: Name of the main file.
        extra: The optional dependency that brings `package`; `None` if qat itself depends on it.
        optimizes: Whether its runtime can be told to optimize or not, so that both are verified.
        integer: Whether it is written from a converted model, and so holds only what `convert` has codes for.
        holds: The formats that it holds besides integers.
    """

    min_agreement: float = 0.98
    max_metric_change: float = 0.01
    max_mean_steps: float = 1.0
    engine: ClassVar[str | None] = None
    max_bits: ClassVar[int] = 8
    graph: ClassVar[Literal["onnx", "torch"] | None] = "torch"
    runner: ClassVar[Callable[..., Runner]]
    file: ClassVar[str]
    package: ClassVar[str | None] = None
    extra: ClassVar[str | None] = None
    optimizes: ClassVar[bool] = False
    integer: ClassVar[bool] = True
    holds: ClassVar[Holds] = INTEGERS

    def __post_init__(self) -> None:
        if not 0 <= self.min_agreement <= 1:
            raise UserError(f"min_agreement={self.min_agreement}: must be between 0 and 1")
        for name in ("max_metric_change", "max_mean_steps"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name}={getattr(self, name)}: must not be negative")
        if self.package is not None and importlib.util.find_spec(self.package) is None:
            raise UserError(f"export: {self.file} needs {self.package}: pip install qat[{self.extra}]")

    @classmethod
    def owns(cls, path: Path) -> bool:
        """Whether a file is of this format: by its name, and by its manifest where formats share a suffix."""
        return path.suffix == Path(cls.file).suffix and made_by(path) in (None, cls.__name__)

    def plan_refusal(self, plan: Plan) -> str | None:
        """Why its engine would not compute a model of this plan as it was trained; `None` if it does."""
        for name, spec in (*plan.weights.items(), *plan.activations.items()):
            if integer_bits(spec) > self.max_bits:
                return f"'{name}' is {spec.short}: {self.file} holds at most {self.max_bits} bits"
        trained = engine_of(plan.engine)
        return engine_of(self.engine).refusal(trained, plan.weights, plan.activations, plan.residuals)

    def model_refusal(self, model: nn.Module, plan: Plan) -> str | None:
        """Why this model, with or without the plan's quantizers, has no form in this format; `None` if it has one."""
        return None

    def refusal(self, model: nn.Module, plan: Plan) -> str | None:
        """Everything that speaks against an export, before anything is trained: the first of it, or `None`."""
        reason = conversion_refusal(plan, self.holds) if self.integer else None
        if reason:
            return f"there is no integer form of this quant: {reason}; use export={what_holds(plan)}"
        reason = self.plan_refusal(plan) or self.model_refusal(model, plan)
        if self.graph is not None:
            reason = reason or _not_float32(model)
        return reason and f"{self.file} cannot hold this quant: {reason}"

    def cautions(self, model: nn.Module, plan: Plan) -> list[str]:
        """What a file of this model may compute otherwise than trained for some inputs, a line each.

        Args:
            model: With the plan's quantizers, or what `prepared` made of it, which is known more exactly.
            plan: The plan.
        """
        return overflows(model, plan) if self.graph is not None else []

    def prepared(self, model: nn.Module, plan: Plan) -> nn.Module:
        """A copy on the CPU, in evaluation mode, of what `export` and verification start from.

        Args:
            model: A calibrated model with quantizers.
            plan: The plan they were made from.

        Raises:
            UserError: see `convert`.
        """
        return convert(model, plan, self.holds) if self.integer else copied(model).cpu().eval()

    def write(self, model: nn.Module, plan: Plan, example: Tensor, folder: Path) -> None:
        """Writes `file`, and what belongs to it, into `folder`."""
        raise NotImplementedError

    def open(self, path: Path, model: nn.Module, *, optimize: bool = True, threads: int = 0) -> Runner:
        """Opens a file whose hash is right; see `load`."""
        return self.runner(path, optimize=optimize, threads=threads)

    def try_out(self, model: nn.Module, folder: Path) -> None:
        """Opens what was just written into `folder`, so that no file is left that its runtime refuses.

        Raises:
            UserError: if it does.
        """
        try:
            self.open(folder / self.file, model)
        except UserError as error:
            raise UserError(str(error).removeprefix(f"{folder}/")) from None

    def codes(self, path: Path) -> dict[str, np.ndarray]:
        """The integer weights in the file, by layer, in the types that the model has them in."""
        raise NotImplementedError

    def check_kernels(self, verdict: Any, converted: nn.Module, runner: Any) -> None:
        """Adds to `verdict` whether the runtime computes on integers what it should; nothing where it cannot be seen.

        Args:
            verdict: A `qat.export.verify.Verdict`.
            converted: The converted model.
            runner: What `load` returned.
        """

    def check_place(self, path: Path, companions: Sequence[Path] = ()) -> None:
        """Looks whether an export to `path` would write over something else than an earlier one by this target.

        Raises:
            UserError: naming the file.
        """
        name, beside = type(self).__name__, path.with_name(f"{path.name}.json")
        earlier = stated(beside)
        files = earlier.get("sha256") if earlier.get("target") == name else None
        listed = {*files, beside.name} if isinstance(files, dict) else set()
        check_unclaimed([path, *companions, beside], listed, name)

    def export(self, model: nn.Module, plan: Plan, example: Tensor | None, path: Path) -> None:
        """Writes a converted model to `path`, with its companions and the manifest; all of them or none.

        Args:
            model: What `prepared` returned.
            plan: The plan it was made from.
            example: An input of at least two samples; a format without a graph needs none.
            path: The main file; companions stand beside it.

        Raises:
            UserError: if the format cannot hold the model, with what to change; if something else is there already.
        """
        if reason := self.plan_refusal(plan) or self.model_refusal(model, plan):
            raise UserError(f"{path.name}: {reason}")
        for caution in self.cautions(model, plan):
            warnings.warn(f"{path.name}: {caution}", stacklevel=2)
        main = Path(self.file)
        if main.suffix and path.suffix != main.suffix:
            raise UserError(f"{path}: this target writes files called *{main.suffix}; a folder's name ends in /")
        if path.exists() and path.is_dir() == bool(main.suffix):
            raise UserError(f"{path}: is {'a' if main.suffix else 'no'} folder already; choose another name")
        self.check_place(path)  # before the work; what stands beside it is known only after
        there = next(parent for parent in path.absolute().parents if parent.exists())
        try:
            beside = tempfile.TemporaryDirectory(dir=there, prefix=f".{path.stem}.")
        except OSError as error:
            raise UserError(f"{path}: nothing can be written into {there} ({error.strerror})") from error
        with beside as temporary:
            folder = Path(temporary)
            self.write(model, plan, example, folder)  # pyright: ignore[reportArgumentType]
            stem = main.stem, path.stem if main.suffix else path.name
            made = sorted(folder.iterdir())
            names = {each.name: each.name.replace(*stem, 1) for each in made}
            self.check_place(path, [path.parent / name for name in names.values()])
            path.parent.mkdir(parents=True, exist_ok=True)
            manifest = write_manifest(folder / f"{path.name}.json", type(self).__name__, made, names)
            # First: killed in between, files are ours to write again, and nobody opens those that it does not fit.
            os.replace(manifest, path.parent / manifest.name)
            for each in made:
                replace(each, path.parent / names[each.name])

    def load(self, path: Path, model: nn.Module, *, optimize: bool = True, threads: int = 0) -> Runner:
        """Opens an exported file after checking it against its manifest.

        Args:
            path: The main file.
            model: The float model of the architecture, for formats that hold tensors and no graph.
            optimize: With the runtime's graph optimizations, or as written.
            threads: Threads of the runtime; 0 lets it choose.

        Raises:
            UserError: if a file is missing, damaged, swapped, of another version, or refused by the runtime.
        """
        check_manifest(path, type(self).__name__)
        return self.open(path, model, optimize=optimize, threads=threads)


def _not_float32(model: nn.Module) -> str | None:
    """Why a graph, in which grids give float32, would not fit together with what else computes in it."""
    kinds = {name: parameter.dtype for name, parameter in model.named_parameters() if parameter.is_floating_point()}
    kinds |= {name: module.computes_in for name, module in model.named_modules() if isinstance(module, IntegerLayer)}
    for name, kind in kinds.items():
        if kind != torch.float32:
            said = str(kind).removeprefix("torch.")
            how = "train with trainer.precision=32-true or bf16-mixed, cast the model with .float(), or use packed"
            return f"'{name}' is {said}, and grids in graphs are float32; {how}"
    return None
