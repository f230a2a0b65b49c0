"""ONNX with real integer initializers and Q/DQ pairs placed so that ONNX Runtime runs integer kernels.

The converted model writes its own quantization: while it is traced, `OnnxEmitter` answers its two operations with
`QuantizeLinear`/`DequantizeLinear` nodes. What those nodes look like is dictated by ONNX Runtime's CPU kernels
(measured with 1.32):

    activations   uint8, zero point 128 for signed grids. Narrower grids clip the uint8 codes; a float clip before
                  QuantizeLinear would break fusion. Above 8 bits uint16, which no integer kernel reads and no Clip
                  takes, so there it is a float clip
    weights       int8 (affine ones uint8) with zero points; up to 4 and up to 2 bits packed as INT4 and INT2 (UINT4,
                  UINT2) and cast to one byte, which the runtime does once, at load; above 8 bits int16 and uint16
    linear        Gemm, on inputs of two dimensions; MatMul has no integer kernel that adds a bias
    biases        int32 at s_x * s_w; a float bias would be re-quantized differently (2.5% of a layer's outputs)
    fp8           QuantizeLinear and DequantizeLinear of FLOAT8E4M3FN and FLOAT8E5M2, without a zero point

Opset 21 is the first with INT4, 25 the first with INT2. Weights of 3 bits are stored as INT4.
"""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir.passes.common as common
import torch
from torch import Tensor, nn

from qat.copies import copied
from qat.errors import UserError
from qat.export.onnx.cascades import steady_cascades
from qat.export.onnx.channels import pad_images
from qat.export.onnx.openvino import evade_rewrites
from qat.export.onnx.passes import run_passes
from qat.export.onnx.placement import ORT, Placement
from qat.export.onnx.slim import slim
from qat.export.onnx.trace import trace
from qat.export.onnx.weights import BITS_KEY, SHIFTED_WEIGHT
from qat.files import atomic
from qat.grid.formats import FLOATS
from qat.integer import IntegerActivation, IntegerLayer, IntegerTensor, emitting, reads_elementwise

SHIFTED = "codes_plus_half"
"""Name of the codes of a constant operand that became unsigned by half of their range."""
UNSIGNED = {torch.int8: torch.uint8, torch.int16: torch.uint16}
FP8 = {FLOATS["e4m3"]: torch.float8_e4m3fn, FLOATS["e5m2"]: torch.float8_e5m2}
"""The floating-point codes that ONNX has and its CPU kernels quantize to; they are multiplied in float."""


class OnnxEmitter:
    """Writes Q/DQ nodes while a converted model is traced; `prepare` it first, outside the trace."""

    def __init__(self, placement: Placement) -> None:
        self.placement = placement

    def prepare(self, model: nn.Module) -> None:
        """Gives every activation grid its zero point and limits as codes, and float biases their values."""
        for grid in model.modules():
            if isinstance(grid, IntegerActivation):
                self._prepare(grid)
            elif isinstance(grid, IntegerTensor) and grid.number is not None:
                kind = FP8[grid.number]
                grid.codes, grid.zero_point = grid.codes.view(kind), torch.zeros_like(grid.zero_point, dtype=kind)
            elif isinstance(grid, IntegerTensor) and grid.codes.dtype == torch.int32 and grid.bits <= 16:
                grid.codes, grid.zero_point = grid.codes.to(torch.uint16), grid.zero_point.to(torch.uint16)
            elif isinstance(grid, IntegerTensor) and grid.codes.dtype == torch.int32 and self.placement.float_biases:
                grid.register_buffer("onnx_value", grid())
            elif isinstance(grid, IntegerLayer) and reads_elementwise(grid):
                self._prepare_operand(grid.integer_weight)

    def _prepare(self, grid: IntegerActivation) -> None:
        if grid.spec.float_format is not None:
            grid.register_buffer("onnx_zero", torch.zeros((), dtype=FP8[grid.spec.float_format]))
            return
        kind = self._code_type(grid)
        offset = 2 ** (torch.iinfo(kind).bits - 1) if grid.spec.signed and not kind.is_signed else 0
        codes = grid.zero_point.view(()), torch.tensor(grid.quant_min), torch.tensor(grid.quant_max)
        for name, code in zip(("zero", "low", "high"), codes, strict=True):
            grid.register_buffer(f"onnx_{name}", (code + offset).to(kind))
        zero, scale = int(grid.zero_point), float(grid.scale)
        grid.onnx_values = (grid.quant_min - zero) * scale, (grid.quant_max - zero) * scale  # pyright: ignore[reportArgumentType]

    def _prepare_operand(self, constant: IntegerTensor) -> None:
        """The runtime adds codes of one type: signed ones become unsigned where those of activations do."""
        if hasattr(constant, SHIFTED):  # that of another sum, too
            return
        if self.placement.signed_codes == "none" and constant.number is None and constant.codes.dtype in UNSIGNED:
            kind = UNSIGNED[constant.codes.dtype]
            offset = 2 ** (torch.iinfo(kind).bits - 1)
            zero = (constant.zero_point.int() + offset).to(kind)
            constant.register_buffer(SHIFTED, (constant.codes.int() + offset).to(kind))
            constant.zero_point = zero

    def _code_type(self, grid: IntegerActivation) -> torch.dtype:
        wide, which = grid.spec.width > 8, self.placement.signed_codes
        if which == "all" or (which == "signed" and grid.spec.signed):
            return torch.int16 if wide else torch.int8
        return torch.uint16 if wide else torch.uint8

    def quantize_dequantize(self, x: Tensor, grid: IntegerActivation) -> Tensor:
        zero, scale = grid.get_buffer("onnx_zero"), grid.scale.view(())
        kind, fp8 = zero.dtype, grid.spec.float_format is not None
        # QuantizeLinear saturates fp8 at the largest number, which is where its grid ends.
        limited = not fp8 and grid.quant_max - grid.quant_min < 2 ** torch.iinfo(kind).bits - 1
        clips_codes = self.placement.clips_codes and kind.itemsize == 1
        if limited and not clips_codes:
            x = x.clamp(*grid.onnx_values)  # pyright: ignore[reportGeneralTypeIssues]
        codes = torch.onnx.ops.symbolic("QuantizeLinear", (x, scale, zero), dtype=kind, shape=x.shape)
        if limited and clips_codes:
            limits = grid.get_buffer("onnx_low"), grid.get_buffer("onnx_high")
            codes = torch.onnx.ops.symbolic("Clip", (codes, *limits), dtype=kind, shape=x.shape)
        return torch.onnx.ops.symbolic("DequantizeLinear", (codes, scale, zero), dtype=torch.float32, shape=x.shape)

    def dequantize(self, tensor: IntegerTensor) -> Tensor:
        if hasattr(tensor, "onnx_value"):
            return tensor.get_buffer("onnx_value")
        attributes: dict[str, Any] = {} if tensor.axis is None else {"axis": tensor.axis}
        scale, zero_point = tensor.scale, tensor.zero_point
        if tensor.group_size is not None:
            attributes["block_size"] = tensor.group_size
        elif tensor.axis is None:
            scale, zero_point = scale.view(()), zero_point.view(())
        shifted = hasattr(tensor, SHIFTED)
        codes, bits = (tensor.get_buffer(SHIFTED), 8) if shifted else (tensor.codes, tensor.bits)
        return torch.onnx.ops.symbolic(
            "DequantizeLinear",
            (codes, scale, zero_point),
            attributes,
            dtype=torch.float32,
            shape=codes.shape,
            metadata_props={BITS_KEY: str(bits)},
        )


def traceable(model: nn.Module, example: Tensor) -> nn.Module:
    """A copy of a model on the CPU in evaluation mode, if its forward can be exported at all.

    Raises:
        UserError: if it takes or returns something else than one tensor, or the example holds fewer than two samples.
    """
    name = type(model).__name__
    if not isinstance(example, Tensor):
        raise UserError(f"{name} is called with {type(example).__name__}: ONNX export needs a forward of one tensor")
    if len(example) < 2:
        raise UserError(
            "the example input must hold at least two samples: a batch of one would be taken for a constant"
        )
    model = copied(model).cpu().eval()
    with torch.no_grad():
        output = model(example)
    if not isinstance(output, Tensor):
        raise UserError(
            f"{name} returns a {type(output).__name__}: ONNX export needs a forward that returns one tensor; "
            "export=packed and export=none take any"
        )
    return model


def export_onnx(model: nn.Module, example: Tensor, path: str | Path, placement: Placement = ORT) -> None:
    """Writes `model`, a converted or a float one, with a dynamic batch dimension, one input and one output.

    Args:
        model: The model, whose forward takes one tensor `[N, ...]` and returns one. A copy of it is traced on the CPU
            in evaluation mode.
        example: An input of at least two samples (a batch of one would be taken for a constant).
        path: The file; written whole or not at all.
        placement: The rules of the engine that is going to read it.

    Raises:
        UserError: if the model takes or returns something else, or cannot be traced, with torch's reason.
    """
    model = traceable(model, example)
    emitter = OnnxEmitter(placement)
    emitter.prepare(model)
    with emitting(emitter):
        traced = trace(model, example)
    weights = dict(
        _named_codes(layer, module.integer_weight)
        for layer, module in model.named_modules()
        if isinstance(module, IntegerLayer)
    )
    names = {id(module): name for name, module in model.named_modules()}
    paths = {path: names[id(module)] for path, module in model.named_modules(remove_duplicate=False)}
    finished = run_passes(traced, weights, paths, placement)
    if placement.pads_images:
        pad_images(finished)
        common.RemoveUnusedNodesPass()(finished)
    if placement.steadies:
        steady_cascades(finished)
    if placement.evades:
        evade_rewrites(finished)
    content = slim(finished).SerializeToString()
    with atomic(path) as temporary:
        temporary.write_bytes(content)


def _named_codes(layer: str, weight: IntegerTensor) -> tuple[str, np.ndarray]:
    """The codes of a layer's weight as the file has them, and their name there."""
    if hasattr(weight, SHIFTED):
        return f"{layer}.{SHIFTED_WEIGHT}".removeprefix("."), weight.get_buffer(SHIFTED).numpy()
    return f"{layer}.weight".removeprefix("."), _array(weight.codes)


def _array(codes: Tensor) -> np.ndarray:
    """Codes, those of fp8 as bit patterns."""
    return (codes.view(torch.uint8) if codes.is_floating_point() else codes).numpy()
