"""Comparing an exported file with training layer by layer, each from the same inputs.

Rounding makes codes of reals, and two ways of computing a real differ in its last bits. Where it lies that near to the
border of two codes, both are right, and all that is behind is computed from another number. So a deviation of the
outputs by more than a step need not be a mistake. But cut the graph at every activation grid and give each piece the
codes that *training* had there: then each piece has to return training's codes, or the neighbour of one where the ratio
x / scale is a tie but for the last bits (`TIE`). And where no code of a sample differs so, the whole file has to return
training's outputs: the first code that differs in a run of the whole has the same inputs in both.

`watch` records training's codes, `forced` gives them to a converted torch model, `cut` to an ONNX file, `compare`
does all of it for some cases of `random_models`.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from random_models import Case, draw
from small_models import both
from torch import Tensor, nn

from qat.export.onnx.export import export_onnx
from qat.export.onnx.runtime import INTEGER_KERNELS, OnnxRunner, float_convolutions, session_options, weight_codes
from qat.export.verify import Verdict, check_codes, expected_integer_nodes
from qat.grid.formats import round_int
from qat.integer import Eager, IntegerActivation, emitting
from qat.quantizers import Quantizer

TIE = 2.0**-10
"""How far from the middle of two codes a ratio may be for both to be right, in steps.

A ratio of at most 2^8 steps is the sum of n <= 2^8 products (of at most 2^7 steps each, or there would be more
cancellation than these models have) in float32, in two orders: sqrt(n) * 2^7 * 2^-24 = 2^-13, and a few roundings of
scales beside it."""


@dataclass(frozen=True)
class Call:
    """A tensor that training put on a grid.

    Attributes:
        scale, zero: Of the grid, the zero point as a uint8 code.
        ratio: x / scale, before rounding.
        codes: As uint8, 128 above the signed ones.
    """

    scale: float
    zero: int
    ratio: np.ndarray
    codes: np.ndarray

    @classmethod
    def of(cls, x: Tensor, grid: Any) -> "Call":
        """What `grid`, a quantizer or an `IntegerActivation`, does to `x`."""
        scale, zero = grid.step() if isinstance(grid, Quantizer) else grid.scale, grid.zero_point
        ratio, offset = x / scale, int(zero) + 128 * bool(grid.spec.signed)
        levels = round_int(ratio.clamp(grid.quant_min - int(zero), grid.quant_max - int(zero)))
        return cls(float(scale), offset, ratio.numpy(), (levels + offset).numpy().astype(np.uint8))

    def wrong(self, codes: np.ndarray) -> str | None:
        """What is wrong with codes that were computed from the same inputs; `None` if nothing is."""
        if codes.shape != self.codes.shape:
            return f"shape {codes.shape} instead of {self.codes.shape}"
        difference = np.abs(codes.astype(int) - self.codes)
        where = difference > 0
        off = np.abs(self.ratio - np.floor(self.ratio) - 0.5)[where].max(initial=0)
        if difference.max() <= 1 and off <= TIE:
            return None
        return f"{where.sum()} of {where.size} codes differ, by up to {difference.max()}; {off:.2g} from a tie"


def watch(fake: nn.Module, x: Tensor) -> tuple[Tensor, list[Call]]:
    """Runs a fake-quantized model.

    Returns:
        Its output, and what passed its activation grids, in order.
    """
    calls: list[Call] = []
    grids = {q for q in fake.modules() if isinstance(q, Quantizer) and not q.is_weight and q.on}
    hooks = [q.register_forward_hook(lambda q, args, out: calls.append(Call.of(args[0], q))) for q in grids]
    with torch.no_grad():
        output = fake(x)
    for hook in hooks:
        hook.remove()
    return output, calls


class Forced(Eager):
    """Carries out a converted model, whose grids return what training had there, in turn."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self.left, self.wrong = list(calls), []

    def quantize_dequantize(self, x: Tensor, grid: IntegerActivation) -> Tensor:
        call = self.left.pop(0)
        if problem := call.wrong(Call.of(x, grid).codes):
            self.wrong.append(problem)
        levels = torch.from_numpy(call.codes.astype(np.float32)) - call.zero
        return (levels * grid.scale).to(x.dtype)


def forced(converted: nn.Module, x: Tensor, calls: Sequence[Call]) -> tuple[Tensor, list[str]]:
    """Runs a converted model piece by piece; returns its output and what is wrong with its codes."""
    emitter = Forced(calls)
    with emitting(emitter), torch.no_grad():
        output = converted(x)
    return output, emitter.wrong + ["grids were not asked"] * bool(emitter.left)


# -- ONNX --------------------------------------------------------------------------------------------------------------


@dataclass
class Cut:
    """An ONNX model whose activation codes are inputs.

    Attributes:
        model: With the inputs `given_0`, ..., and the codes themselves as more outputs.
        outputs: Name of each computed code tensor.
        calls: What training had there.
    """

    model: onnx.ModelProto
    outputs: list[str]
    calls: list[Call]

    def inputs(self) -> dict[str, np.ndarray]:
        return {f"given_{i}": call.codes for i, call in enumerate(self.calls)}


def cut(model: onnx.ModelProto, calls: Sequence[Call]) -> Cut:
    """Cuts `model` behind every activation grid.

    Raises:
        AssertionError: if the file's grids are not training's.
    """
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    waiting = _by_grid(calls)
    found = Cut(model, [], [])
    for node in [n for n in model.graph.node if n.op_type == "QuantizeLinear"]:
        scale, zero = (constants[name] for name in node.input[1:3])
        ready = waiting.get((float(scale), int(zero)), [])
        assert ready, f"the file quantizes with scale {scale} and zero point {zero} where training does not"
        codes = node.output[0]
        if [r.op_type for r in readers[codes]] == ["Clip"]:
            codes = readers[codes][0].output[0]
        call, given = ready.pop(0), f"given_{len(found.calls)}"
        for reader in readers[codes]:
            reader.input[:] = [given if name == codes else name for name in reader.input]
        shape = ["batch", *call.codes.shape[1:]]
        model.graph.input.append(onnx.helper.make_tensor_value_info(given, onnx.TensorProto.UINT8, shape))
        model.graph.output.append(onnx.helper.make_tensor_value_info(codes, onnx.TensorProto.UINT8, None))
        found.outputs.append(codes)
        found.calls.append(call)
    left = [grid for grid, rest in waiting.items() if rest]
    assert not left, f"training quantizes with (scale, zero point) {left} where the file does not"
    return found


def run(model: onnx.ModelProto, inputs: dict[str, np.ndarray], optimize: bool) -> tuple[list[np.ndarray], int]:
    """All outputs of a model, and how many integer kernels computed them."""
    options, level = session_options(threads=1), ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        made = onnx.load(options.optimized_model_filepath).graph.node
    return session.run(None, inputs), sum(node.op_type in INTEGER_KERNELS for node in made)


def _by_grid(calls: Sequence[Call]) -> dict[tuple[float, int], list[Call]]:
    """Calls by scale and zero point, those of the same numbers once, as the file quantizes them once."""
    found: dict[tuple[float, int], list[Call]] = {}
    for call in calls:
        same = found.setdefault((np.float32(call.scale).item(), call.zero), [])
        if not any(other.ratio.shape == call.ratio.shape and (other.ratio == call.ratio).all() for other in same):
            same.append(call)
    return found


# -- cases -------------------------------------------------------------------------------------------------------------


PACK = 20
"""Cases per file."""


def packs(seeds: Sequence[int], blocks: int = 1) -> list[list[int]]:
    """Seeds of the cases that share a file; those with operations in place, which take three times as long, apart."""
    by_kind = [[s for s in seeds if draw(s, blocks).in_place == kind] for kind in (False, True)]
    return [kind[i : i + PACK] for kind in by_kind for i in range(0, len(kind), PACK)]


class Pack(nn.Module):
    """Several models in one file, which saves the part of an export that is the same for every model; their outputs
    stand beside each other."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([model(x) for model in self.models], 1)


@dataclass
class Outcome:
    """What `compare` found.

    Attributes:
        wrong: One line each.
        codes: How many activation codes were compared in the optimized file.
        flipped: How many of them were training's neighbour, at a tie.
        deviations: For each sample and case, the largest deviation at the end of the file, in steps of an 8-bit grid
            over the outputs.
    """

    wrong: list[str]
    codes: int
    flipped: int
    deviations: np.ndarray


def compare(cases: Sequence[Case], path: Path, batch: int = 16) -> Outcome:
    """Exports cases into one file and compares it with training.

    Args:
        cases: At least one.
        path: Of the file.
        batch: Samples for calibration, and others for the comparison.
    """
    pairs = [both(case.model, case.example(batch, case.seed), case.policy) for case in cases]
    x = cases[0].example(batch, cases[0].seed + 2**20)
    expected, calls, wrong = [], [], []
    for case, (fake, converted) in zip(cases, pairs, strict=True):
        output, seen = watch(fake, x)
        result, problems = forced(converted, x, seen)
        wrong += [f"draw({case.seed}) converted: {problem}" for problem in problems]
        if (off := float(_steps(result.numpy(), output.numpy()).max())) > EQUAL:
            wrong.append(f"draw({case.seed}) converted: outputs deviate by {off:.2g} steps from the same codes")
        expected.append(output.numpy())
        calls += seen
    pack = Pack([converted for _, converted in pairs])
    export_onnx(pack, x, path)
    runner, verdict = OnnxRunner(path, threads=1), Verdict()
    check_codes(verdict, pack, weight_codes(path))
    wrong += [check.detail for check in verdict.checks if not check.passed]
    integer, wanted = runner.integer_nodes(), expected_integer_nodes(pack) - float_convolutions(path)
    if integer != wanted:
        wrong.append(f"{integer} integer kernels instead of {wanted}; in float: {runner.float_layers()}")
    pieces = cut(onnx.load(path), calls)
    flipped = np.zeros(batch, dtype=int)
    for optimize in (True, False):
        (output, *codes), kernels = run(pieces.model, {"input": x.numpy(), **pieces.inputs()}, optimize)
        if optimize and kernels != integer:
            wrong.append(f"{kernels} integer kernels in the pieces, {integer} in the whole file")
        how = "optimized" if optimize else "as written"
        wrong += [f"{how}: {line}" for c, call in zip(codes, pieces.calls, strict=True) if (line := call.wrong(c))]
        off = _deviations(output, expected)
        if (off > EQUAL).any():
            wrong.append(f"{how}: outputs deviate by {off.max():.2g} steps from the same codes")
        for computed, call in zip(codes, pieces.calls, strict=True) if optimize else ():
            flipped += (computed != call.codes).reshape(batch, -1).sum(1)
    end = _deviations(runner(x.numpy()), expected)
    if (end[flipped == 0] > EQUAL).any():
        wrong.append(f"outputs deviate by {end[flipped == 0].max():.2g} steps in samples without a tie")
    return Outcome(wrong, sum(call.codes.size for call in pieces.calls), int(flipped.sum()), end)


EQUAL = 2.0**-7
"""Steps of the 8-bit output grid that float arithmetic may be off by."""


def _steps(actual: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Per sample, the largest deviation in steps of an 8-bit grid over the expected outputs."""
    return np.abs(actual - expected).max(1) / max(float(np.ptp(expected)), float(np.finfo(np.float32).tiny)) * 255


def _deviations(output: np.ndarray, expected: Sequence[np.ndarray]) -> np.ndarray:
    """`_steps` of each sample and case, `[N, cases]`."""
    parts = np.split(output, np.cumsum([e.shape[1] for e in expected])[:-1], 1)
    return np.stack([_steps(part, e) for part, e in zip(parts, expected, strict=True)], 1)
