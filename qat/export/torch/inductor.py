"""`model.inductor.pt2`: the integer model as a `torch.export` program that Inductor lowers to int8 kernels of x86 CPUs.

Inductor recognizes uint8 activations with their scales written out, int8 weights with one scale per channel, and float
biases (oneDNN adds them in float to the int32 accumulator). A layer's result may stay float. The program is compiled
when a batch of a new size comes, which takes seconds to minutes; a batch that is little smaller is filled up instead.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qat.errors import first_line
from qat.export.int8_program import int8_program, int8_refusal
from qat.export.target import unrunnable
from qat.export.torch.pt2 import save_program
from qat.export.torch.target import ProgramRunner, TorchTarget
from qat.export.verify import Verdict, count_kernels
from qat.planning.plan import Plan

COUNTS = ("qconv_weight_prepack_matcher_count", "qlinear_weight_prepack_matcher_count")
"""Names of Inductor's counters of products that it hands to oneDNN's int8 kernels."""
FILLED = 8
"""A batch is filled up to one of at most so many times its size, which costs less time than to compile another."""


class InductorRunner(ProgramRunner):
    """A loaded program, compiled batch size by batch size (`batches` are those that were).

    Args:
        path: The `.pt2` file.
        optimize: Compiled, or operation by operation in float.

    Raises:
        UserError: if torch refuses it.
    """

    def __init__(self, path: Path, *, optimize: bool = True) -> None:
        super().__init__(path)
        self.optimize, self.batches = optimize, list[int]()
        self.integer_nodes = 0
        self._compiled = torch.compile(self.model, dynamic=False) if optimize else None

    @torch.no_grad()
    def __call__(self, x: np.ndarray) -> np.ndarray:
        if self._compiled is None:
            return super().__call__(x)
        size = min((size for size in self.batches if size >= len(x) >= size / FILLED), default=len(x))
        filled = torch.from_numpy(np.concatenate([x, np.zeros((size - len(x), *x.shape[1:]), x.dtype)]))
        return (self._compile(filled) if size not in self.batches else self._compiled(filled)).numpy()[: len(x)]

    def _compile(self, x: Tensor) -> Tensor:
        from torch._dynamo.utils import counters
        from torch._inductor import config

        assert self._compiled is not None
        before = sum(counters["inductor"][key] for key in COUNTS)
        try:
            # Weights become constants, which is what lets oneDNN pack them.
            with config.patch(freezing=True):
                y = self._compiled(x)
        except Exception as error:  # whatever a compiler stumbles over
            raise unrunnable(self.path, x, first_line(error)) from None
        self.batches.append(len(x))
        self.integer_nodes = sum(counters["inductor"][key] for key in COUNTS) - before
        return y

    def float_layers(self) -> list[str] | None:
        """All of them if it is not compiled; compiled, Inductor says how many it took, and not which."""
        return None if self.optimize else super().float_layers()


class InductorTarget(TorchTarget):
    """A program for Inductor."""

    file = "model.inductor.pt2"
    optimizes = True

    def model_refusal(self, model: nn.Module, plan: Plan) -> str | None:
        return int8_refusal(plan, "Inductor")

    def write(self, model: nn.Module, plan: Plan, example: Tensor, folder: Path) -> None:
        save_program(int8_program(model, example, torch.uint8), folder / self.file)

    def open(self, path: Path, model: nn.Module, *, optimize: bool = True, threads: int = 0) -> InductorRunner:
        return InductorRunner(path, optimize=optimize)

    def check_kernels(self, verdict: Verdict, converted: nn.Module, runner: Any) -> None:
        if not runner.batches:
            runner(runner.program.example_inputs[0][0].numpy())
        count_kernels(verdict, converted, runner.integer_nodes, what="products by oneDNN's int8 kernels")
