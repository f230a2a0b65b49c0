"""From a torch model to an ONNX graph, by torch's own exporter, in half of its time.

torch traces a model, then traces the result twice more to take apart what ONNX does not have and to make functions of
operations that change their operands. Most converted models hold neither, and then the graph is taken as it is.
"""

from types import BuiltinFunctionType
from typing import Any
from unittest.mock import patch

import onnx_ir as ir
import torch
import torch.nn.functional as F
import torch.onnx.ops  # defines torch.ops.onnx_symbolic
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.overrides import TorchFunctionMode

from qat.errors import UserError, first_line
from qat.export.onnx.placement import OPSET
from qat.export.target import INPUT, OUTPUT
from qat.export.torch.trace import OneInput, own_modules
from qat.process import silent


def trace(model: nn.Module, example: Tensor) -> ir.Model:
    """The graph of a model, with a dynamic batch dimension.

    Args:
        model: The model, whose forward takes one tensor `[N, ...]` and returns one.
        example: An input of at least two samples.

    Raises:
        UserError: if it cannot be traced, with torch's reason, or only for one size of batches.
    """
    decomposing = patch.object(ExportedProgram, "run_decompositions", _decompose)
    with silent(), torch.no_grad(), own_modules(), _FlatLinear(), decomposing:
        try:
            program = torch.onnx.export(
                OneInput(model), (example,), dynamo=True, opset_version=OPSET, optimize=True, verbose=False,
                dynamic_shapes=({0: torch.export.Dim("batch")},), input_names=[INPUT], output_names=[OUTPUT],
            )  # fmt: skip
        except Exception as error:  # whatever stops a tracer, its first line says it best
            reason = first_line(error.__cause__ or error)
            raise UserError(f"{type(model).__name__} cannot be traced for ONNX: {reason}") from error
    assert program is not None
    traced = program.model
    shape = traced.graph.inputs[0].shape
    if shape is not None and isinstance(shape[0], int):  # torch's exporter has given in to the model
        raise UserError(
            f"{type(model).__name__}.forward makes the size of the batch a constant ({shape[0]}), so an exported file "
            "would run on no other; write x.shape[0] there in place of len(x), a number or the size of another tensor"
        )
    return traced


def check_trace(model: nn.Module, example: Tensor) -> None:
    """Finds what `trace` would, in a tenth of its time if there is nothing to find.

    Args:
        model: See `trace`; as `traceable` makes it.
        example: An input of at least two samples.

    Raises:
        UserError: see `trace`.
    """
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    with silent(), torch.no_grad(), own_modules():
        try:
            torch.export.export(OneInput(model), (example,), dynamic_shapes=shapes)
            return
        except Exception:  # torch's exporter to ONNX has other ways to try
            pass
    trace(model, example)


class _FlatLinear(TorchFunctionMode):
    """Runs `F.linear` on `[N, T, C]` as on `[N * T, C]`, so that it becomes a Gemm."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and args[0].ndim > 2:
            x, *rest = args
            return func(x.flatten(0, -2), *rest, **(kwargs or {})).view(-1, *x.shape[1:-1], rest[0].shape[0])
        return func(*args, **(kwargs or {}))


ATEN: Any = torch.ops.aten
WHOLE = {
    *(ATEN.linear.default, ATEN.conv2d.default, ATEN.matmul.default, ATEN.scaled_dot_product_attention.default),
    *(ATEN.add.Tensor, ATEN.mul.Tensor, ATEN.div.Tensor, ATEN.cat.default, ATEN.mean.dim, ATEN.softmax.int),
    *(ATEN.relu.default, ATEN.hardtanh.default, ATEN.gelu.default, ATEN.silu.default, ATEN.dropout.default),
    *(ATEN.layer_norm.default, ATEN.max_pool2d.default, ATEN.avg_pool2d.default, ATEN.sym_size.int),
    *(ATEN.view.default, ATEN.flatten.using_ints, ATEN.unflatten.int, ATEN.transpose.int, ATEN.permute.default),
    *(ATEN.slice.Tensor, ATEN.select.int, ATEN.unbind.int, torch.ops.onnx_symbolic._symbolic.default),
}
"""Operations that change none of their operands and that torch's exporter writes as they are. It takes apart what it
does not know, and a graph with any other operation is left to it."""
_run_decompositions = ExportedProgram.run_decompositions


def _decompose(program: ExportedProgram, *table: Any, **settings: Any) -> ExportedProgram:
    """The program decomposed by torch's method, or itself if that would change nothing."""
    for node in program.graph.find_nodes(op="call_function", target=ATEN.adaptive_avg_pool2d.default):
        if list(node.args[1]) == [1, 1]:  # what torch makes of it, too
            node.target, node.args = ATEN.mean.dim, (node.args[0], [-1, -2], True)
    called = {node.target for node in program.graph.nodes if node.op == "call_function"}
    if all(target in WHOLE or isinstance(target, BuiltinFunctionType) for target in called):  # or arithmetic of sizes
        return program
    return _run_decompositions(program, *table, **settings)
