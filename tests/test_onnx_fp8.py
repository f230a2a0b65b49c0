"""fp8 in ONNX: the file holds training's bit patterns, and ONNX Runtime computes training's numbers."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import Drawn, Shape, lived, quantized
from torch import nn

from qat.errors import UserError
from qat.export.onnx.engines import TensorRtOnnx
from qat.export.onnx.target import OnnxTarget
from qat.export.verify import Comparison, Verdict, check_codes, check_outputs
from qat.planning.plan import Plan

TYPES = {"e4m3": onnx.TensorProto.FLOAT8E4M3FN, "e5m2": onnx.TensorProto.FLOAT8E5M2}


def policy(number: str, granularity: str = "channel", act: str | None = None) -> dict:
    group = 4 if granularity == "group" else None
    weight = {"format": number, "bits": None, "granularity": granularity, "group_size": group}
    return {"weight": weight, "act": {"format": act, "bits": None} if act else "off", "sites": {} if act else "off"}


def written(shape: Shape, quant: dict, folder: Path) -> tuple[Drawn, Plan, nn.Module, Path]:
    model = lived(Drawn(shape))
    plan, target = quantized(model, model.example(16), quant), OnnxTarget()
    assert target.refusal(model, plan) is None
    prepared, path = target.prepared(model, plan), folder / "model.onnx"
    target.export(prepared, plan, model.example(2), path)
    return model, plan, prepared, path


CONV = Shape(bias=True, max_pool=True)
LINEAR = Shape(kind="linear", bias=True)


@pytest.mark.parametrize("optimize", [pytest.param(True, id="optimized"), pytest.param(False, id="as-written")])
@pytest.mark.parametrize(
    ("shape", "quant"),
    [
        pytest.param(CONV, policy("e4m3", act="e4m3"), id="conv-e4m3"),
        pytest.param(CONV, policy("e5m2", act="e5m2"), id="conv-e5m2"),
        pytest.param(Shape(kind="strided", activation="relu6"), policy("e4m3", "tensor", "e5m2"), id="mixed-relu6"),
        pytest.param(Shape(kind="depthwise"), policy("e5m2", "tensor", "e4m3"), id="depthwise"),
        pytest.param(LINEAR, policy("e4m3", "group", "e4m3"), id="groups"),
        pytest.param(LINEAR, policy("e5m2", act="e5m2"), id="linear-e5m2"),
        pytest.param(LINEAR, policy("e4m3"), id="weights-alone"),
    ],
)
def test_onnx_runtime_computes_what_was_trained_to_the_last_bits(shape, quant, optimize, tmp_path):
    model, _, prepared, path = written(shape, quant, tmp_path)
    x, target, comparison, verdict = model.example(64, 1), OnnxTarget(), Comparison(), Verdict()
    check_codes(verdict, prepared, target.codes(path))
    runner = target.load(path, prepared, optimize=optimize)
    target.check_kernels(verdict, prepared, runner)
    with torch.no_grad():
        comparison.update(model(x).numpy(), runner(x.numpy()))
    check_outputs(verdict, comparison, 1.0, 1e-4)
    assert verdict.passed, verdict.checks
    assert verdict.facts["integer_nodes"] == verdict.facts["expected_integer_nodes"] == 0
    assert comparison.deviation_steps < 1e-3


def test_the_file_holds_fp8_types_and_one_byte_a_weight(tmp_path):
    path = written(LINEAR, policy("e4m3", act="e5m2"), tmp_path)[3]
    model = onnx.load(str(path))
    (weight,) = (t for t in model.graph.initializer if t.name == "stem.weight")
    assert weight.data_type == TYPES["e4m3"] and len(weight.raw_data) == 8 * 12
    assert {t.data_type for t in model.graph.initializer if not t.dims} >= {TYPES["e5m2"]}


def test_a_flipped_bit_of_a_weight_is_found(tmp_path):
    _, _, prepared, path = written(LINEAR, policy("e4m3"), tmp_path)
    model = onnx.load(str(path))
    (weight,) = (t for t in model.graph.initializer if t.name == "stem.weight")
    weight.raw_data = bytes([weight.raw_data[0] ^ 1]) + weight.raw_data[1:]
    onnx.save(model, str(path))
    verdict = Verdict()
    check_codes(verdict, prepared, OnnxTarget().codes(path))
    assert not verdict.passed and "'stem' differ" in verdict.checks[0].detail


@settings(deadline=None, max_examples=20)
@given(st.sampled_from(sorted(TYPES)), st.lists(st.floats(-1e5, 1e5, width=32), min_size=8, max_size=8))
def test_every_number_rounds_as_in_training(activation_file, number, values):
    model, path = activation_file[number]
    x = torch.tensor([values, values[::-1]])
    with torch.no_grad():
        expected = model(x).numpy()
    assert np.array_equal(OnnxTarget().load(path, model)(x.numpy()), expected)


@pytest.fixture(scope="module")
def activation_file(tmp_path_factory) -> dict[str, tuple[nn.Module, Path]]:
    """A layer that gives back its input, on a grid of either type whose scale is no power of two."""
    found = {}
    for number in TYPES:
        model, path = nn.Sequential(nn.Linear(8, 8, bias=False)).eval(), tmp_path_factory.mktemp(number) / "model.onnx"
        with torch.no_grad():
            model[0].weight.copy_(torch.eye(8))
        plan, target = quantized(model, 300 * torch.randn(64, 8), policy(number, "tensor", number)), OnnxTarget()
        target.export(target.prepared(model, plan), plan, torch.randn(2, 8), path)
        found[number] = model, path
    return found


def test_engines_without_fp8_refuse_it_before_anything_is_written(tmp_path):
    model = lived(Drawn(LINEAR))
    plan = quantized(model, model.example(16), policy("e4m3", act="e4m3"))
    assert "format=e4m3 has no integers" in (TensorRtOnnx().refusal(model, plan) or "")
    with pytest.raises(UserError, match="format=e4m3 has no integers"):
        TensorRtOnnx().prepared(model, plan)


def test_packed_matrix_products_refuse_fp8(tmp_path):
    model = lived(Drawn(LINEAR))
    plan = quantized(model, model.example(16), policy("e4m3"))
    assert "MatMulNBits holds integers" in (OnnxTarget(weight_only="matmulnbits").refusal(model, plan) or "")
