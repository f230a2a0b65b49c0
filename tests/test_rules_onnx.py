"""Each engine's ONNX files keep the rules that it documents, and compute what training measured."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from small_models import Drawn, Shape, lived, quantized
from torch import nn

from qat.config.exports import target_named
from qat.convert import convert
from qat.export.onnx.checks import qnn_violations, tensorrt_violations
from qat.export.onnx.runtime import OnnxRunner
from qat.export.verify import Verdict

torch.set_num_threads(1)

SHAPES = [
    pytest.param(Shape(kind="strided", max_pool=True), id="strided"),
    pytest.param(Shape(kind="depthwise", activation="relu6"), id="depthwise-relu6"),
]


def written(engine: str, shape: Shape, folder: Path, **act: Any) -> tuple[Verdict, onnx.ModelProto]:
    """What the checkers say of a drawn model's file, once its numbers are right; and the file."""
    model: Any = lived(Drawn(shape))
    x, exporter = model.example(16), target_named(f"onnx_{engine}", {})
    policy = {"weight": {"granularity": "channel"}, "act": {"bits": 8} | act, "engine": engine}
    plan = quantized(model, x, policy)
    converted, path = convert(model, plan), folder / "model.onnx"
    exporter.export(converted, plan, x[:4], path)
    with torch.no_grad():
        expected = model(x).numpy()
    runner, verdict = OnnxRunner(path, optimize=False, threads=1), Verdict()
    assert np.abs(runner(x.numpy()) - expected).max() <= 1e-5 * np.abs(expected).max()
    exporter.check_kernels(verdict, converted, runner)
    return verdict, onnx.load(path)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_file_for_tensorrt_has_int8_codes_without_zero_points_and_float_biases(shape, tmp_path):
    verdict, model = written("tensorrt", shape, tmp_path)
    assert verdict.passed, verdict.checks
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert not {onnx.TensorProto.INT32, onnx.TensorProto.UINT8}.intersection(kinds.values())
    assert kinds["stem.bias"] == onnx.TensorProto.FLOAT


class Patches(nn.Module):
    """How a vision transformer begins."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 8)
        self.positions = nn.Parameter(torch.randn(16, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return x + self.head(x)


def test_int8_activations_that_onnxruntime_stumbles_over_are_left_as_they_are(tmp_path):
    model, x, path = Patches().eval(), torch.randn(4, 3, 16, 16), tmp_path / "model.onnx"
    plan = quantized(model, x, {"weight": {"granularity": "channel"}, "act": {"bits": 8}, "engine": "tensorrt"})
    target_named("onnx_tensorrt", {}).export(convert(model, plan), plan, x, path)
    with pytest.raises(Exception, match="does not match"):
        onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        np.testing.assert_allclose(OnnxRunner(path)(x.numpy()), model(x), rtol=0, atol=1e-4)


@pytest.mark.parametrize("act", [{}, {"bits": 16}, {"symmetric": False}], ids=["u8", "u16", "affine"])
def test_every_operation_of_a_file_for_qnn_is_a_unit_between_q_and_dq(act, tmp_path):
    verdict, model = written("qnn", Shape(kind="strided", max_pool=True), tmp_path, **act)
    assert verdict.passed, verdict.checks
    kinds = {tensor.data_type for tensor in model.graph.initializer}
    assert (onnx.TensorProto.UINT16 in kinds) == ("bits" in act)


@pytest.mark.parametrize("engine", ["tensorrt", "qnn"])
def test_a_grid_without_its_lowest_code_is_limited_in_front_of_quantization(engine, tmp_path):
    _, model = written(engine, Shape(kind="linear", activation="none"), tmp_path, signed=True, narrow=True)
    readers = {name: node for node in model.graph.node for name in node.input}
    clips = [node for node in model.graph.node if node.op_type == "Clip"]
    assert clips and all(readers[clip.output[0]].op_type == "QuantizeLinear" for clip in clips)


def test_the_checkers_see_what_is_broken(tmp_path):
    _, model = written("qnn", Shape(), tmp_path)
    assert any("UINT8, not int8" in said for said in tensorrt_violations(model))
    broken = copy.deepcopy(model)
    conv = next(node for node in broken.graph.node if node.op_type == "Conv")
    conv.input[0] = broken.graph.input[0].name
    assert any("reads a float tensor" in said for said in qnn_violations(broken))
    zero = next(n.input[2] for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] == "stem.weight")
    for tensor in model.graph.initializer:
        if tensor.name == zero:
            tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) + np.int8(1), zero))
    assert any("weights with a zero point" in said for said in qnn_violations(model))
    assert any("zero point that is not zero" in said for said in tensorrt_violations(model))
