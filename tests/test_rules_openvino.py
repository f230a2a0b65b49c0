"""OpenVINO computes what training measured, once training knows which grids it forgets."""

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from random_models import Attention
from small_models import quantized
from torch import Tensor, nn

from qat.convert import convert
from qat.export.openvino_ir import OpenVinoTarget
from qat.export.verify import Comparison, Verdict

pytest.importorskip("openvino", reason="needs the extra `openvino`")
torch.set_num_threads(1)

W8A8 = {"weight": {"bits": 8, "granularity": "channel"}, "act": {"bits": 8}}


class Residual(nn.Module):
    """A block whose shortcut is the block's input, or a convolution of it."""

    def __init__(self, shortcut: bool) -> None:
        super().__init__()
        self.stem, self.a = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.b, self.head = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 10)
        self.shortcut = nn.Conv2d(16, 16, 1) if shortcut else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.b(F.relu(self.a(x))) + self.shortcut(x))
        return self.head(x.mean((2, 3)))


def mean_steps(shortcut: bool, target: str, folder: Path) -> float:
    torch.manual_seed(0)
    model, x = Residual(shortcut).eval(), torch.randn(32, 3, 16, 16)
    plan = quantized(model, x, W8A8 | {"target": target})
    exporter, comparison = OpenVinoTarget(), Comparison()
    unchecked = dataclasses.replace(plan, residuals={})  # or a model with other rules would be refused
    exporter.export(convert(model, plan), unchecked, x[:4], folder / "model.xml")
    with torch.no_grad():
        comparison.update(model(x).numpy(), exporter.load(folder / "model.xml", model)(x.numpy()))
    return comparison.mean_steps


@pytest.mark.parametrize("shortcut", [pytest.param(False, id="identity"), pytest.param(True, id="convolution")])
def test_openvino_forgets_the_grid_between_a_convolution_and_an_addition(shortcut, tmp_path):
    assert mean_steps(shortcut, "openvino", tmp_path) < 1e-3
    assert mean_steps(shortcut, "ort", tmp_path) > 0.02, "if it keeps the grid by now, the rule in qat.engines can go"


class Attentive(nn.Module):
    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.attention = Attention(16, 2, fused=True, causal=causal, bias=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x).mean(1))


@pytest.mark.parametrize("causal", [pytest.param(False, id="in-one-kernel"), pytest.param(True, id="causal")])
@pytest.mark.parametrize(
    ("kinds", "integers"), [pytest.param("attention", 4, id="scores"), pytest.param("all", 5, id="probabilities")]
)
def test_openvino_multiplies_queries_and_keys_as_integers(causal, kinds, integers, tmp_path):
    model, x = Attentive(causal).eval(), torch.randn(16, 9, 16)
    policy = W8A8 | {"target": "openvino", "kinds": kinds if kinds == "all" else [kinds]}
    plan = quantized(model, x, policy)
    exporter, converted, verdict = OpenVinoTarget(), convert(model, plan), Verdict()
    exporter.export(converted, plan, x[:4], tmp_path / "model.xml")
    exporter.check_kernels(verdict, converted, exporter.load(tmp_path / "model.xml", converted))
    assert verdict.passed, verdict.checks
    assert verdict.facts["integer_nodes"] == verdict.facts["expected_integer_nodes"] == integers
