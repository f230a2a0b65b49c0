"""`model.pt2`: the integer model as a `torch.export` program, loaded and run by torch without our classes.

The program's quantization is written in the operations of `torch.ops.quantized_decomposed`, the vocabulary that torch's
own back ends (Inductor's x86 kernels, ExecuTorch) look for. Their `quantize` multiplies by the reciprocal of the scale
where training divides, so a value on the border of two codes may take the other one.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.ao.quantization.fx._decomposed  # defines torch.ops.quantized_decomposed
from torch import Tensor, nn

from qat.export.target import Target
from qat.export.torch.pt2 import load_program, save_program
from qat.export.torch.runner import TorchRunner
from qat.export.torch.trace import traced
from qat.integer import Eager, IntegerActivation, IntegerTensor, emitting, weight_codes
from qat.planning.plan import Plan

OPS: Any = torch.ops.quantized_decomposed


class DecomposedEmitter(Eager):
    """Writes quantized-decomposed operations while a converted model is traced."""

    def dequantize(self, tensor: IntegerTensor) -> Tensor:
        codes, zero = tensor.codes, tensor.zero_point.long()  # a difference of two uint8 would wrap
        limits = torch.iinfo(codes.dtype)
        if tensor.group_size is not None:
            if codes.ndim != 2 or tensor.axis != 1:  # torch has such an operation for matrices alone
                return super().dequantize(tensor)
            return OPS.dequantize_per_channel_group(
                codes, tensor.scale, zero, limits.min, limits.max, codes.dtype, tensor.group_size, torch.float32
            )
        if tensor.axis is None:
            return OPS.dequantize_per_tensor.tensor(codes, tensor.scale, zero, limits.min, limits.max, codes.dtype)
        return OPS.dequantize_per_channel(codes, tensor.scale, zero, tensor.axis, limits.min, limits.max, codes.dtype)

    def quantize_dequantize(self, x: Tensor, grid: IntegerActivation) -> Tensor:
        dtype = torch.int8 if grid.quant_min < 0 else torch.uint8
        arguments = grid.scale, grid.zero_point, grid.quant_min, grid.quant_max, dtype
        return OPS.dequantize_per_tensor.tensor(OPS.quantize_per_tensor.tensor(x, *arguments), *arguments)


class ProgramRunner(TorchRunner):
    """A loaded program, which is run as it is: in float it computes what the codes stand for.

    Args:
        path: The `.pt2` file.

    Raises:
        UserError: if torch refuses it.
    """

    def __init__(self, path: Path) -> None:
        self.program = load_program(path)
        super().__init__(self.program.module(), path, list(self.codes()))

    def codes(self) -> dict[str, np.ndarray]:
        """The integer weights by layer."""
        codes = weight_codes(self.program.state_dict)
        return {name.removeprefix("model."): tensor.numpy() for name, tensor in codes.items()}

    @torch.no_grad()
    def layer_outputs(self, x: np.ndarray, only: str | None = None) -> dict[str, np.ndarray]:
        module: Any = self.model
        layers = {f"model.{name}" for name in self.layers}
        last: dict[str, Any] = {}  # a layer's output is what its last operation returns
        for node in module.graph.nodes:
            stack = list((node.meta.get("nn_module_stack") or {}).values())
            if node.op == "call_function" and stack and stack[-1][0] in layers:
                last[stack[-1][0]] = node
        wanted = {node: name.removeprefix("model.") for name, node in last.items()}
        found: dict[str, np.ndarray] = {}

        class Watch(torch.fx.Interpreter):
            def run_node(self, n: torch.fx.Node) -> Any:
                value = super().run_node(n)
                if n in wanted and only in (None, wanted[n]):
                    found[wanted[n]] = value.numpy()
                return value

        Watch(module).run(torch.from_numpy(x))
        return found


class TorchTarget(Target):
    """A `torch.export` program."""

    file = "model.pt2"

    def write(self, model: nn.Module, plan: Plan, example: Tensor, folder: Path) -> None:
        with emitting(DecomposedEmitter()):
            program = traced(model, example)
        save_program(program, folder / self.file)

    def open(self, path: Path, model: nn.Module, *, optimize: bool = True, threads: int = 0) -> ProgramRunner:
        return ProgramRunner(path)

    def codes(self, path: Path) -> dict[str, np.ndarray]:
        return ProgramRunner(path).codes()
