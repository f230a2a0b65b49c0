"""ONNX files for engines other than ONNX Runtime's CPU kernels: see `qat.export.onnx.placement` for what each wants.

OpenVINO runs its file itself. TensorRT and QNN need hardware; their files are verified by ONNX Runtime's numbers and
by checkers that know the documented rules (`qat.export.onnx.checks`).
"""

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import onnx
from torch import Tensor, nn

from qat.convert import INTEGERS
from qat.export.onnx.checks import Graph, qnn_violations, tensorrt_violations
from qat.export.onnx.placement import OPENVINO, QNN, TENSORRT, Placement
from qat.export.onnx.runtime import OnnxRunner
from qat.export.onnx.target import OnnxTarget
from qat.export.openvino_ir import ForOpenVino
from qat.export.verify import Verdict, count_kernels
from qat.planning.plan import Plan


class OpenVinoOnnx(ForOpenVino, OnnxTarget):
    """An ONNX file that OpenVINO loads."""

    placement: ClassVar[Placement] = OPENVINO
    max_bits = 8
    holds = INTEGERS

    def write(self, model: nn.Module, plan: Plan, example: Tensor, folder: Path) -> None:
        super().write(model, plan, example, folder)
        self.try_out(model, folder)


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
