"""`model.pte`: the integer model for ExecuTorch, its int8 layers handed to XNNPACK.

XNNPACK computes a convolution or linear layer on integers if its input and its output both lie on grids. A linear layer
that no grid follows (as a rule the last one) keeps its codes in the file, which a portable kernel turns into floats for
a product in float. A convolution of codes that XNNPACK does not take, as a rule because no grid follows it, is refused:
behind XNNPACK, ExecuTorch 1.5 computes other numbers (off by half of their range; without XNNPACK they are right). So
layers are made visible by their codes. A concatenation of codes on one grid into those of another is refused, too:
XNNPACK does not load it. An application links the runtime's XNNPACK back end, portable kernels and quantized kernels.

The runtime plans memory for batches of up to `max_batch`; the runner here splits what is larger.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from qat.errors import UserError, first_line
from qat.export.executorch.file import PteFile, describe
from qat.export.executorch.graph import expose, shorten
from qat.export.int8_graph import CONVOLUTIONS, DEQUANTIZE, QUANTIZE, float_products, layer_of
from qat.export.int8_program import int8_program, int8_refusal
from qat.export.target import OnGrid, Target, unrunnable
from qat.export.verify import Verdict, count_kernels
from qat.planning.plan import Plan
from qat.process import silent


class ExecuTorchRunner:
    """A loaded `.pte` file.

    Args:
        path: The file.
        threads: Threads of the runtime; 0 lets it choose.

    Raises:
        UserError: if ExecuTorch refuses it.
    """

    def __init__(self, path: Path, *, threads: int = 0) -> None:
        self.path = path
        with silent():
            import executorch.kernels.quantized  # pyright: ignore[reportMissingImports] # noqa: F401 - registers dequantize_per_channel.out
            from executorch.extension.pybindings import _C  # pyright: ignore[reportMissingImports]
            from executorch.runtime import Runtime  # pyright: ignore[reportMissingImports]

            if threads:
                _C._unsafe_reset_threadpool(threads)
        try:
            self._program = Runtime.get().load_program(str(path))
            method: Any = self._program.load_method("forward")
            self.max_batch, *self.shape = method.metadata.input_tensor_meta(0).sizes()
        except RuntimeError as error:
            raise UserError(f"{path}: executorch refuses it: {first_line(error)}") from None
        self._method = method

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Runs one batch, in parts where it is larger than the file allows.

        Raises:
            UserError: if the file does not take such a batch.
        """
        if list(x.shape[1:]) != self.shape:
            wanted = f"[N, {', '.join(map(str, self.shape))}]"
            raise unrunnable(self.path, x, f"it takes {wanted}")
        try:
            return self._outputs(self._method, x)[0]
        except RuntimeError as error:
            raise unrunnable(self.path, x, first_line(error)) from None

    def _outputs(self, method: Any, x: np.ndarray) -> list[np.ndarray]:
        """All that a method returns; it takes batches of a size, and of none XNNPACK ends the process."""
        if not len(x):
            return [each[:0] for each in self._outputs(method, np.zeros((1, *x.shape[1:]), x.dtype))]
        parts = np.split(x, range(self.max_batch, len(x), self.max_batch))
        # What the method returns is its own memory, which the next call overwrites.
        found = [[each.numpy().copy() for each in method.execute([torch.tensor(part)])] for part in parts]
        return [np.concatenate(each) for each in zip(*found, strict=True)]

    def layer_outputs(self, x: np.ndarray, only: str | None = None) -> dict[str, OnGrid]:
        """The layers that an int8 grid follows, as the codes of that grid."""
        from executorch.runtime import Runtime  # pyright: ignore[reportMissingImports]

        content, shown = expose(self.path.read_bytes(), PteFile.read(self.path).named_layers(), only)
        method = Runtime.get().load_program(content).load_method("forward")
        _, *codes = self._outputs(method, x)
        return {name: show(each) for (name, show), each in zip(shown.items(), codes, strict=True)}

    def float_layers(self) -> list[str] | None:
        return PteFile.read(self.path).float_layers()


@dataclass(frozen=True)
class ExecuTorchTarget(Target):
    """A program for ExecuTorch's runtime.

    Attributes:
        max_batch: The largest batch that the file takes; memory is planned for it.
    """

    max_batch: int = 8
    file = "model.pte"
    package = extra = "executorch"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_batch < 2:
            raise UserError(f"max_batch={self.max_batch}: must be at least 2, or the batch is taken for a constant")

    def model_refusal(self, model: nn.Module, plan: Plan) -> str | None:
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
                return f"'{name}' has three dimensions, which ExecuTorch convolves neither on integers nor in float"
            if isinstance(module, _ConvTransposeNd) and module.groups > 1 and name in plan.weights:
                return f"'{name}' is transposed and has groups, which XNNPACK has no int8 kernel for; {_leave(name)}"
        return int8_refusal(plan, "XNNPACK")

    def write(self, model: nn.Module, plan: Plan, example: Tensor, folder: Path) -> None:
        program = int8_program(model, example[: self.max_batch], max_batch=self.max_batch)
        floats = float_products(program)
        if wrong := float_products(program, CONVOLUTIONS):
            raise UserError(
                f"{self.file}: '{wrong[0]}' is a convolution whose output lies on no grid, which ExecuTorch computes "
                f"wrongly behind XNNPACK; {_leave(wrong[0])}"
            )
        if mixed := _mixed(program):
            raise UserError(
                f"{self.file}: '{mixed}' concatenates codes of one grid into those of another, which XNNPACK refuses; "
                f'set quant.concat=shared, or leave them float with a rule {{match: "{mixed}", act: off}}'
            )
        with silent():
            import executorch.kernels.quantized  # pyright: ignore[reportMissingImports] # noqa: F401 - registers dequantize_per_channel.out
            from executorch.backends.xnnpack.partition import xnnpack_partitioner as xnn  # pyright: ignore[reportMissingImports]
            from executorch.exir import to_edge_transform_and_lower  # pyright: ignore[reportMissingImports]

            rest = xnn.XnnpackPartitioner(
                config_precisions=xnn.ConfigPrecisionType.FP32, force_non_static_weights_for_f32_linear=True
            )
            try:
                edge = to_edge_transform_and_lower(program, partitioner=[xnn.XnnpackQuantizedPartitioner(), rest])
                content = shorten(edge.to_executorch().buffer)
            except Exception as error:  # whatever its passes stumble over
                reason = first_line(error.__cause__ or error)
                raise UserError(f"{type(model).__name__} cannot be lowered for ExecuTorch: {reason}") from error
        (folder / self.file).write_bytes(content)
        (folder / "model.layers.json").write_text(describe(content, model, floats))
        left = PteFile.read(folder / self.file).float_layers()
        if wrong := [name for name in left if isinstance(model.get_submodule(name), _ConvNd)]:
            raise UserError(
                f"{self.file}: '{wrong[0]}' is a convolution that XNNPACK does not compute on integers here, and "
                f"ExecuTorch computes it wrongly behind XNNPACK; {_leave(wrong[0])}"
            )
        self.try_out(model, folder)

    def open(self, path: Path, model: nn.Module, *, optimize: bool = True, threads: int = 0) -> ExecuTorchRunner:
        return ExecuTorchRunner(path, threads=threads)

    def codes(self, path: Path) -> dict[str, np.ndarray]:
        return PteFile.read(path).codes()

    def check_kernels(self, verdict: Verdict, converted: nn.Module, runner: ExecuTorchRunner) -> None:
        file = PteFile.read(runner.path)
        count_kernels(
            verdict, converted, file.integer_nodes(), without=len(file.unfollowed), what="products in XNNPACK"
        )


def _leave(layer: str) -> str:
    return f'leave it float with a rule {{match: "{layer}", weight: off, act: off}}'


def _mixed(program: ExportedProgram) -> str | None:
    """A concatenation whose operands and result lie on grids that differ; XNNPACK has it on one."""
    for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default):
        ends: Any = (*node.args[0], *node.users)
        on_codes = len(node.users) == 1 and all(end.target in (QUANTIZE, DEQUANTIZE) for end in ends)
        if on_codes and len({end.args[1:] for end in ends}) > 1:
            return layer_of(node)
    return None
