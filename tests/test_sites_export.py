"""Sites on integers: what conversion stores, which kernels ONNX Runtime picks, and that the file computes what training
measured."""

import pytest
import torch
import torch.nn.functional as F
from small_models import both, quantized
from test_insert import Model
from torch import Tensor, nn

from qat.convert import convert
from qat.export.onnx.export import export_onnx
from qat.export.onnx.target import OnnxTarget
from qat.export.packed import load_packed, save_packed
from qat.export.torch.target import TorchTarget
from qat.integer import IntegerTensor

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from qat.export.onnx.runtime import OnnxRunner, weight_codes  # noqa: E402
from qat.export.verify import Comparison, Verdict, check_codes, check_outputs  # noqa: E402

W8A8 = {"weight": {"bits": 8, "granularity": "channel"}, "act": {"bits": 8}}
SEQUENCE, IMAGE = (32, 6, 16), (32, 3, 8, 8)


class Attention(nn.Module):
    """A projection, attention of four heads, a functional output layer and a residual add."""

    def __init__(self, bias: bool = False, **settings) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.head = nn.Linear(16, 48), nn.Linear(16, 5)
        self.out = nn.Parameter(torch.randn(16, 16) / 4)
        self.bias = nn.Parameter(torch.randn(16)) if bias else None
        self.settings = settings

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        q, k, v = self.qkv(x).view(batch, time, 3, 4, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, **self.settings)
        x = F.linear(y.transpose(1, 2).reshape(batch, time, width), self.out, self.bias) + x
        return self.head(x[:, -1])


def handmade(m, x):
    """Attention as people write it, gated."""
    q, k = m.a(x), m.b(x)
    y = torch.softmax(q @ k.transpose(1, 2) / 4, -1) @ k
    return m.head((y * q - x)[:, 0])


def grouped(m, x):
    """Four queries, two keys and values."""
    q, k, v = (layer(x).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (m.a, m.b, m.c))
    return m.head(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2))


def inception(m, x):
    y = torch.cat([F.relu(m.a(x)), m.b(x)], 1)
    return m.head(F.relu(m.c(y)).mean((2, 3)))


MODELS = {
    "attention": (Attention, SEQUENCE),
    "causal": (lambda: Attention(is_causal=True), SEQUENCE),
    "bias": (lambda: Attention(bias=True), SEQUENCE),
    "handmade": (
        lambda: Model(handmade, a=nn.Linear(16, 16), b=nn.Linear(16, 16), head=nn.Linear(16, 5)), SEQUENCE,
    ),
    "grouped": (
        lambda: Model(
            grouped, a=nn.Linear(16, 16), b=nn.Linear(16, 8), c=nn.Linear(16, 8), head=nn.Linear(16, 5)
        ), SEQUENCE,
    ),
    "inception": (
        lambda: Model(
            inception, a=nn.Conv2d(3, 8, 3, padding=1), b=nn.Conv2d(3, 8, 3, padding=1), c=nn.Conv2d(16, 8, 1),
            head=nn.Linear(8, 5),
        ), IMAGE,
    ),
}  # fmt: skip


def addmm() -> nn.Module:
    """What GPT-2 calls Conv1D."""
    model = Model(lambda m, x: m.head(torch.addmm(m.b, F.relu(m.a(x[:, 0])), m.w)), a=nn.Linear(16, 16))
    model.head, model.w, model.b = nn.Linear(8, 5), nn.Parameter(torch.randn(16, 8)), nn.Parameter(torch.randn(8))
    return model


MODELS["addmm"] = (addmm, SEQUENCE)
ALL, SHARED = {"kinds": "all"}, {"kinds": "all", "concat": "shared"}
EXPORTED = [
    pytest.param("attention", {}, {"QGemm": 3, "MatMulIntegerToFloat": 1, "MatMul": 1}, id="attention"),
    pytest.param("attention", ALL, {"QGemm": 3, "MatMulIntegerToFloat": 1, "QLinearMatMul": 1}, id="every-edge"),
    pytest.param("causal", ALL, {"QGemm": 3, "MatMulIntegerToFloat": 1, "QLinearMatMul": 1}, id="causal"),
    pytest.param("grouped", ALL, {"MatMulIntegerToFloat": 1, "QLinearMatMul": 1, "MatMul": 0}, id="grouped-heads"),
    pytest.param("bias", ALL, {"QGemm": 3, "MatMulIntegerToFloat": 1, "QLinearMatMul": 1}, id="functional-bias"),
    pytest.param("handmade", {}, {"QGemm": 3, "MatMulIntegerToFloat": 2}, id="handmade"),
    pytest.param("handmade", ALL, {"QGemm": 3, "QLinearMatMul": 1, "QLinearMul": 1}, id="handmade-every-edge"),
    pytest.param("addmm", {}, {"QGemm": 3}, id="product-that-accumulates"),
    pytest.param("inception", {}, {"QLinearConv": 3, "QLinearConcat": 1}, id="concatenation"),
    pytest.param("inception", SHARED, {"QLinearConv": 3, "QLinearConcat": 1}, id="shared-concatenation"),
]


@pytest.mark.parametrize(("name", "policy", "kernels"), EXPORTED)
def test_sites_run_on_integer_kernels_and_compute_what_training_did(name, policy, kernels, tmp_path):
    make, shape = MODELS[name]
    torch.manual_seed(0)
    x, path = torch.randn(shape), str(tmp_path / "model.onnx")
    fake, converted = both(make(), x, {**W8A8, **policy})
    export_onnx(converted, x, path)
    runner, verdict, comparison = OnnxRunner(path), Verdict(), Comparison()
    found = runner.kernels()
    assert {kind: found[kind] for kind in kernels} == kernels
    test = torch.randn(shape)
    with torch.no_grad():
        expected = fake(test)
        torch.testing.assert_close(converted(test), expected, atol=1e-5, rtol=1e-5)
    comparison.update(expected.numpy(), runner(test.numpy()))
    check_codes(verdict, converted, weight_codes(path))
    OnnxTarget().check_kernels(verdict, converted, runner)
    check_outputs(verdict, comparison, 0.95, 1.0)
    assert verdict.passed, verdict.to_dict()
    assert verdict.facts["integer_nodes"] == verdict.facts["expected_integer_nodes"]


# -- what is stored ----------------------------------------------------------------------------------------------------


def by_identity(m, x):
    """Joins behind its first layer and adds behind the others; a grid that both read has two paths."""
    for layer in m.layers:
        x = torch.cat([layer(x), layer(x)], 1) if layer is m.layers[0] else layer(x) + x
    return x.mean((2, 3))


@pytest.mark.parametrize("target", [OnnxTarget(), TorchTarget()], ids=["onnx", "torch"])
def test_a_forward_that_compares_its_layers_takes_the_same_way_in_a_file(target, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(IMAGE)
    model = Model(by_identity, layers=nn.ModuleList([nn.Conv2d(3, 4, 1), nn.Conv2d(8, 8, 1)]))
    plan = quantized(model, x, W8A8)
    path = tmp_path / target.file
    converted = convert(model, plan)
    target.export(converted, plan, x, path)
    with torch.no_grad():
        torch.testing.assert_close(
            torch.from_numpy(target.load(path, model)(x.numpy())), converted(x), atol=0.05, rtol=0
        )


def test_a_functional_weight_is_stored_as_codes_and_nothing_else():
    _, converted = both(Attention(), torch.randn(SEQUENCE), W8A8)
    assert isinstance(converted.linear_0.integer_weight, IntegerTensor)
    assert "out" not in converted.state_dict() and converted.out.shape == (16, 16)
    assert not [k for k, v in converted.state_dict().items() if v.is_floating_point() and v.numel() > 48]


def doubly_read(m, x):
    return F.linear(m.a(x), m.w) + m.w.sum()


def test_a_weight_that_others_read_stays_float_beside_its_codes():
    model = Model(doubly_read, a=nn.Linear(16, 16))
    model.w = nn.Parameter(torch.randn(16, 16))
    x = torch.randn(SEQUENCE)
    fake, converted = both(model, x, W8A8)
    assert torch.equal(converted.w, fake.w)
    torch.testing.assert_close(converted(x), fake(x), atol=1e-5, rtol=1e-5)


def test_a_weight_tied_to_a_layer_is_one_tensor_of_codes():
    model = Model(
        lambda m, x: F.linear(m.a(m.embed(x)), m.embed.weight), embed=nn.Embedding(11, 16), a=nn.Linear(16, 16)
    )
    x = torch.randint(11, (4, 5))
    fake, converted = both(model, x, W8A8)
    assert torch.equal(converted.linear_0.integer_weight.codes, converted.embed.integer_weight.codes)
    torch.testing.assert_close(converted(x), fake(x), atol=1e-5, rtol=1e-5)


def test_a_packed_model_with_sites_is_rebuilt(tmp_path):
    x = torch.randn(SEQUENCE)
    model = Attention()
    plan = quantized(model, x, {**W8A8, "weight": {"bits": 4, "granularity": "channel"}, **ALL})
    converted = convert(model, plan)
    save_packed(converted, plan, tmp_path)
    rebuilt = load_packed(Attention(), tmp_path)
    assert torch.equal(rebuilt(x), converted(x))
