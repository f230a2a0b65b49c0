"""`model.onnx`: the integer model for ONNX Runtime."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from torch import Tensor, nn

from qat.convert import Holds
from qat.errors import UserError
from qat.export.onnx.export import export_onnx
from qat.export.onnx.placement import ORT, Placement
from qat.export.onnx.runtime import OnnxRunner, float_convolutions, saturates, weight_codes
from qat.export.overflow import saturation
from qat.export.target import Target
from qat.export.verify import Verdict, count_kernels
from qat.planning.plan import Plan


@dataclass(frozen=True)
class OnnxTarget(Target):
    """An ONNX file for ONNX Runtime.

    Attributes:
        weight_only: What becomes of layers with a quantized weight and a float input: `qdq`, DequantizeLinear and a
            Gemm, which every runtime has; `matmulnbits`, the operation that ONNX Runtime has for them.

    Class attributes:
        placement: Where Q/DQ nodes stand.

    Raises:
        UserError: if the engine has no such operation.
    """

    weight_only: Literal["qdq", "matmulnbits"] = "qdq"
    engine = "ort"
    graph = "onnx"
    runner = OnnxRunner
    file = "model.onnx"
    optimizes = True
    max_bits = 16
    placement: ClassVar[Placement] = ORT
    holds: ClassVar[Holds] = Holds(("e4m3", "e5m2"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight_only == "matmulnbits" and self.engine != "ort":
            raise UserError(f"weight_only=matmulnbits: {self.engine} has no such operation; use qdq")

    def model_refusal(self, model: nn.Module, plan: Plan) -> str | None:
        alone = [layer for layer in plan.layers.values() if layer.weight is not None and not layer.input]
        alone += [site for name, site in plan.parameters.items() if not any(plan.sites.get(name, [])[:1])]
        if self.weight_only == "matmulnbits" and not alone:
            return "weight_only=matmulnbits is for quantized weights with a float input; set quant.act=off, or use qdq"
        floats = [f"'{name}' is {spec.short}" for name, spec in plan.weights.items() if not spec.integer]
        if self.weight_only == "matmulnbits" and floats:
            return f"{floats[0]}, and MatMulNBits holds integers; use weight_only=qdq"
        return None

    def cautions(self, model: nn.Module, plan: Plan) -> list[str]:
        found = super().cautions(model, plan)
        if self.engine == "ort" and saturates():
            option = "add_session_config_entry('session.x64quantprecision', '1')"
            remedy = f"tell sessions not to, as verification does: {option}; or train 7-bit weights: quant=reduce_range"
            found += saturation(plan, "ONNX Runtime", remedy)
        return found

    def write(self, model: nn.Module, plan: Plan, example: Tensor, folder: Path) -> None:
        placement = replace(self.placement, packs_products=self.weight_only == "matmulnbits")
        export_onnx(model, example, folder / self.file, placement)

    def codes(self, path: Path) -> dict[str, np.ndarray]:
        return weight_codes(path)

    def check_kernels(self, verdict: Verdict, converted: nn.Module, runner: OnnxRunner) -> None:
        count_kernels(
            verdict,
            converted,
            runner.integer_nodes(),
            without=float_convolutions(runner.path),
            floats=runner.float_layers(),
            why="nothing quantizes the output, or a separate operation pads the input",
        )
