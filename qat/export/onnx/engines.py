"""ONNX files for engines other than ONNX Runtime's CPU kernels: see `qat.export.onnx.placement` for what each wants.

OpenVINO runs its file itself. TensorRT and QNN need hardware; their files are verified by ONNX Runtime's numbers and
by checkers that know the documented rules (`qat.export.onnx.checks`).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import onnx
from torch import Tensor, nn

from qat.convert import INTEGERS
from qat.export.onnx.checks import Graph, qnn_violations, tensorrt_violations
from qat.export.onnx.placement import OPENVINO, QNN, TENSORRT, Placement
from qat.export.onnx.runtime import OnnxRunner
from qat.export.onnx.target import OnnxTarget
from qat.export.openvino_ir import OpenVinoRunner, check_precisions, openvino_refusal
from qat.export.verify import Verdict, count_kernels
from qat.planning.plan import Plan


class OpenVinoOnnx(OnnxTarget):
    """An ONNX file that OpenVINO loads."""

    engine = "openvino"
    placement: ClassVar[Placement] = OPENVINO
    package = extra = "openvino"
    max_bits = 8
    holds = INTEGERS

    def model_refusal(self, model: nn.Module, plan: Plan) -> str | None:
        return super().model_refusal(model, plan) or openvino_refusal(model, plan)

    def write(self, model: nn.Module, plan: Plan, example: Tensor, folder: Path) -> None:
        super().write(model, plan, example, folder)
        self.try_out(model, folder)

    def open(self, path: Path, model: nn.Module, *, optimize: bool = True, threads: int = 0) -> Any:
        return OpenVinoRunner(path, optimize=optimize, threads=threads)

    def check_kernels(self, verdict: Verdict, converted: nn.Module, runner: Any) -> None:
        check_precisions(verdict, converted, runner)


class _Structural(OnnxTarget):
    """A file whose engine is not here: what it would compute on integers is read off the graph.

    Class attributes:
        violations: The checker of the engine's rules.
    """

    violations: ClassVar[Callable[[onnx.ModelProto], list[str]]]
    holds = INTEGERS

    def check_kernels(self, verdict: Verdict, converted: nn.Module, runner: OnnxRunner) -> None:
        model = onnx.load(str(runner.path))
        graph = Graph(model)
        on_codes = graph.nodes_on_codes()
        floats = [graph.names[id(n)] for n in graph.products() if n not in on_codes]
        what = "convolutions and matrix products read codes"
        count_kernels(verdict, converted, len(on_codes), what=what, floats=floats)
        broken = type(self).violations(model)
        detail = f"{len(broken)} nodes do not keep them; first, {broken[0]}" if broken else "kept by every node"
        verdict.add(f"rules of {self.engine}", not broken, detail)


class TensorRtOnnx(_Structural):
    """An ONNX file for TensorRT (explicit quantization)."""

    engine = "tensorrt"
    max_bits = 8
    placement: ClassVar[Placement] = TENSORRT
    violations = staticmethod(tensorrt_violations)


class QnnOnnx(_Structural):
    """An ONNX file for ONNX Runtime's QNN execution provider."""

    engine = "qnn"
    placement: ClassVar[Placement] = QNN
    violations = staticmethod(qnn_violations)
