"""OpenVINO computes what training measured, once training knows which grids it forgets."""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from random_models import Attention
from small_models import quantized
from test_targets import skip_if_saturating
from torch import Tensor, nn

from qat.convert import convert
from qat.errors import UserError
from qat.export.onnx.engines import OpenVinoOnnx
from qat.export.openvino_ir import OpenVinoTarget
from qat.export.verify import Comparison, Verdict, check_codes

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


def mean_steps(shortcut: bool, engine: str, folder: Path) -> float:
    torch.manual_seed(0)
    model, x = Residual(shortcut).eval(), torch.randn(32, 3, 16, 16)
    plan = quantized(model, x, W8A8 | {"engine": engine})
    exporter, comparison = OpenVinoTarget(), Comparison()
    unchecked = dataclasses.replace(plan, residuals={})  # or a model with other rules would be refused
    exporter.export(convert(model, plan), unchecked, x[:4], folder / "model.xml")
    with torch.no_grad():
        comparison.update(model(x).numpy(), exporter.load(folder / "model.xml", model)(x.numpy()))
    return comparison.mean_steps


@pytest.mark.parametrize("shortcut", [pytest.param(False, id="identity"), pytest.param(True, id="convolution")])
def test_openvino_forgets_the_grid_between_a_convolution_and_an_addition(shortcut, tmp_path):
    skip_if_saturating("openvino")
    assert mean_steps(shortcut, "openvino", tmp_path) < 1e-3
    assert mean_steps(shortcut, "ort", tmp_path) > 0.02, "if it keeps the grid, the rule in qat.policies.engines can go"


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
    policy = W8A8 | {"engine": "openvino", "kinds": kinds if kinds == "all" else [kinds]}
    plan = quantized(model, x, policy)
    exporter, converted, verdict = OpenVinoTarget(), convert(model, plan), Verdict()
    exporter.export(converted, plan, x[:4], tmp_path / "model.xml")
    exporter.check_kernels(verdict, converted, exporter.load(tmp_path / "model.xml", converted))
    assert verdict.passed, verdict.checks
    assert verdict.facts["integer_nodes"] == verdict.facts["expected_integer_nodes"] == integers


def relu_and_tanh(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([F.relu(a), torch.tanh(b)], 1)


def silu_and_tanh(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([F.silu(a), torch.tanh(b)], 1)


def two_tanh(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([torch.tanh(a), torch.tanh(b)], 1)


def two_relu(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([F.relu(a), F.relu(b) * 5], 1)


def gated_maximum(a: Tensor, b: Tensor) -> Tensor:
    return (F.relu(a) * torch.sigmoid(b.mean((2, 3), keepdim=True))).amax((2, 3), keepdim=True)


def minimum(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).amin((2, 3), keepdim=True)


def average_and_norm(a: Tensor, b: Tensor) -> Tensor:
    return F.instance_norm(F.avg_pool2d(a, 3, 1, 1, count_include_pad=False)) + b


def mean_and_norm(a: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm((a + b).mean((2, 3)), (8,), eps=0.1)[..., None, None]


def average_and_product(a: Tensor, b: Tensor) -> Tensor:
    return F.avg_pool2d(F.relu(a), 2) * F.avg_pool2d(b, 2)[:, :1]


JOINED = (relu_and_tanh, silu_and_tanh, two_tanh)
REWRITTEN = [
    *(pytest.param(function, {}, id=function.__name__) for function in (*JOINED, two_relu)),
    *(pytest.param(function, {"concat": "shared"}, id=f"{function.__name__}-shared") for function in JOINED),
    pytest.param(relu_and_tanh, {"act": {"bits": 4}}, id="relu_and_tanh-a4"),
    *(
        pytest.param(function, {}, id=function.__name__)
        for function in (
            gated_maximum, minimum, average_and_norm, mean_and_norm, average_and_product,
        )
    ),
]  # fmt: skip


class Between(nn.Module):
    """Two convolutions, a function of both, and a convolution that reads it."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.function = nn.Conv2d(4, 8, 1), nn.Conv2d(4, 8, 1), function
        self.head = nn.LazyConv2d(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self.a(x), self.b(x)))


def _exported(model, x, folder, settings=None) -> tuple[Comparison, Verdict]:
    """How far the file of a quantized model is from it, and whether it runs on integers."""
    plan = quantized(model, x, W8A8 | {"engine": "openvino"} | (settings or {}))
    exporter, converted, verdict, comparison = OpenVinoTarget(), convert(model, plan), Verdict(), Comparison()
    exporter.export(converted, plan, x[:4], folder / "model.xml")
    runner = exporter.load(folder / "model.xml", model)
    with torch.no_grad():
        comparison.update(model(x).numpy(), runner(x.numpy()))
    exporter.check_kernels(verdict, converted, runner)
    return comparison, verdict


@pytest.mark.parametrize(("function", "settings"), REWRITTEN)
def test_openvino_computes_what_was_trained_where_its_plugin_rewrites_graphs(function, settings, tmp_path):
    skip_if_saturating("openvino")
    torch.manual_seed(0)
    model, x = Between(function), torch.randn(32, 4, 8, 8) * 1.5 + 0.3
    model(x)
    comparison, verdict = _exported(model, x, tmp_path, settings)
    assert comparison.mean_steps < 0.1  # single neighbouring codes; half a step and more where it is rewritten
    assert verdict.passed, verdict.checks


class Headless(nn.Module):
    """A layer without a bias whose channels differ in scale, and what follows it."""

    def __init__(self, layer: nn.Module, then: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.then = layer, then
        with torch.no_grad():
            layer.weight.mul_(torch.logspace(-2, 1, 4).view(-1, *[1] * (layer.weight.ndim - 1)))  # pyright: ignore

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self.layer(x))


class Averaged(nn.Module):
    """An attention whose biases are zeros, as they start."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


UNBIASED = [
    pytest.param(lambda: Headless(nn.Linear(8, 4, bias=False), torch.sigmoid), (16, 9, 8), id="longer-than-channels"),
    pytest.param(lambda: Headless(nn.Linear(8, 4, bias=False), F.relu), (16, 8, 8), id="a-multiple-of-them"),
    pytest.param(
        lambda: Headless(nn.Conv2d(3, 4, 3, bias=False), lambda y: y.reshape(-1, 8, 8)), (16, 3, 6, 6), id="images"
    ),
    pytest.param(Averaged, (16, 4, 8), id="averaged"),
]


@pytest.mark.parametrize(("make", "shape"), UNBIASED)
def test_openvino_keeps_the_scales_of_layers_without_biases_to_their_channels(make, shape, tmp_path):
    skip_if_saturating("openvino")
    torch.manual_seed(0)
    model, x = make(), torch.randn(shape)
    comparison, verdict = _exported(model, x, tmp_path)
    assert comparison.mean_steps < 0.1
    assert verdict.passed, verdict.checks


@pytest.mark.parametrize("optimize", [True, False])
def test_openvino_rounds_no_float_input_of_integer_weights(optimize, tmp_path):
    torch.manual_seed(0)
    model, x, comparison = nn.Sequential(nn.Linear(64, 64, bias=False)), torch.randn(64, 64), Comparison()
    plan = quantized(model, x, {"weight": W8A8["weight"], "act": None, "engine": "openvino"})
    OpenVinoTarget().export(convert(model, plan), plan, x[:4], tmp_path / "model.xml")
    with torch.no_grad():
        found = OpenVinoTarget().load(tmp_path / "model.xml", model, optimize=optimize)(x.numpy())
        comparison.update(model(x).numpy(), found)
    assert comparison.mean_steps < 1e-3


@pytest.mark.parametrize("exporter", [OpenVinoTarget, OpenVinoOnnx])
def test_what_openvino_refuses_to_load_is_one_line_and_no_file(exporter, tmp_path, monkeypatch):
    monkeypatch.setattr("qat.export.onnx.export.evade_rewrites", lambda model: None)
    model, x = Headless(nn.Linear(8, 4, bias=False), F.relu), torch.randn(16, 9, 8)
    plan = quantized(model, x, W8A8 | {"engine": "openvino"})
    path = tmp_path / exporter.file
    with pytest.raises(UserError, match=rf"^{path.name}: openvino refuses it: Requested output shape") as caught:
        exporter().export(convert(model, plan), plan, x, path)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("exporter", [OpenVinoTarget, OpenVinoOnnx])
@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(3, 4, 3)], ids=["conv", "transposed"])
def test_openvino_is_given_no_convolution_with_zero_points_of_weights(layer, exporter):
    weight = {"bits": 4, "granularity": "channel", "symmetric": False}
    model, x, name = nn.Sequential(copy.deepcopy(layer)), torch.randn(4, 3, 6, 6), type(layer).__name__
    plan = quantized(model, x, W8A8 | {"weight": weight})
    for each in (model, convert(model, plan)):
        reason = exporter().model_refusal(each, plan) or ""
        assert reason.endswith(f"which openvino does not compute for a {name}: train it with symmetric=true"), reason


@pytest.mark.parametrize("bits", [3, 4])
def test_an_odd_number_of_codes_of_4_bits_comes_back(bits, tmp_path):
    weight = {"bits": bits, "granularity": "channel"}
    model, x, verdict = nn.Sequential(nn.Conv2d(5, 7, 3)), torch.randn(4, 5, 6, 6), Verdict()
    plan = quantized(model, x, W8A8 | {"weight": weight, "engine": "openvino"})
    converted = convert(model, plan)
    OpenVinoTarget().export(converted, plan, x, tmp_path / "model.xml")
    check_codes(verdict, converted, OpenVinoTarget().codes(tmp_path / "model.xml"))
    assert verdict.passed, verdict.checks


def test_what_openvino_cannot_convert_is_one_line_and_no_file(tmp_path):
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")), torch.randn(4, 3, 8, 8)
    plan = quantized(model, x, W8A8 | {"engine": "openvino"})
    with pytest.raises(UserError, match=r"model\.xml cannot hold this model: .*Pad-21") as caught:
        OpenVinoTarget().export(convert(model, plan), plan, x, tmp_path / "model.xml")
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())
