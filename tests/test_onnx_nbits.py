"""MatMulNBits holds the trained codes, and ONNX Runtime computes with them what the model does."""

from typing import Any

import numpy as np
import pytest
import torch
from small_models import quantized
from torch import nn

from qat.convert import convert
from qat.errors import UserError
from qat.export.onnx.target import OnnxTarget
from qat.export.verify import Verdict, check_codes
from qat.models import GPT

torch.set_num_threads(1)


def case(weight: dict[str, Any], tmp_path, act: Any = None):
    torch.manual_seed(0)
    model: Any = GPT(num_classes=20, block=8, layers=1, heads=2, width=48).eval()
    x = torch.randint(20, (3, 8))
    rules = {"embeddings": {"match": ["te", "pe"], "weight": "off"}}
    plan = quantized(model, x, {"weight": weight, "act": act, "sites": None, "rules": rules})
    model.eval()
    target, path = OnnxTarget(weight_only="matmulnbits"), tmp_path / "model.onnx"
    converted = convert(model, plan)
    target.export(converted, plan, x, path)
    return model, converted, target, path, x


@pytest.mark.parametrize(
    "weight",
    [
        pytest.param({"bits": 4, "granularity": "group", "group_size": 16}, id="groups"),
        pytest.param({"bits": 4, "granularity": "channel"}, id="channels-of-no-power-of-two"),
        pytest.param({"bits": 8, "granularity": "tensor"}, id="8-bits"),
        pytest.param({"bits": None, "format": "ternary", "granularity": "channel"}, id="ternary"),
    ],
)
def test_the_packed_codes_are_the_trained_ones_and_compute_the_same(weight, tmp_path):
    model, converted, target, path, x = case(weight, tmp_path)
    verdict = Verdict()
    check_codes(verdict, converted, target.codes(path))
    assert verdict.passed
    for optimize in (True, False):
        runner: Any = target.load(path, model, optimize=optimize)
        assert runner.kernels()["MatMulNBits"] == 5
        assert np.allclose(runner(x.numpy()), model(x).detach().numpy(), atol=1e-5)


def test_a_zero_point_is_refused_with_the_layer(tmp_path):
    with pytest.raises(UserError, match=r"weight of 'b\.0\.qkv'.* set symmetric: true"):
        case({"bits": 4, "granularity": "channel", "symmetric": False}, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bits", [4, 8])
def test_a_weight_that_quantized_inputs_read_too_is_refused_by_name(bits, tmp_path):
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval(), torch.randn(4, 8)
    model[2].weight = model[0].weight
    rules = {"second": {"match": "2", "act": {"bits": 8}}}
    weight = {"bits": bits, "granularity": "channel"}
    plan = quantized(model, x, {"weight": weight, "act": None, "sites": None, "rules": rules})
    with torch.no_grad(), pytest.raises(UserError, match="is read by a float input and by another"):
        OnnxTarget(weight_only="matmulnbits").write(convert(model.eval(), plan), plan, x, tmp_path)
