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


SHARED = {"second": {"match": "2", "act": {"bits": 8}}}


@pytest.mark.parametrize(
    ("weight", "rules", "says"),
    [
        pytest.param({"bits": 4, "symmetric": False}, {}, "weight of '0'.* set symmetric: true", id="a-zero-point"),
        pytest.param({"bits": 12}, {}, "weight of '0'.* at most 8 bits; use qdq", id="12-bits"),
        pytest.param({"bits": 8}, SHARED, "weight' is read by a float input and by another", id="read-by-codes-too"),
    ],
)
def test_what_the_operation_cannot_hold_is_refused_by_name(weight, rules, says, tmp_path):
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval(), torch.randn(4, 8)
    model[2].weight = model[0].weight if rules else model[2].weight
    policy = {"weight": weight | {"granularity": "channel"}, "act": None, "sites": None, "rules": rules}
    plan = quantized(model, x, policy)
    with pytest.raises(UserError, match=says):
        target = OnnxTarget(weight_only="matmulnbits")
        target.export(convert(model.eval(), plan), plan, x, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
