"""Attention: with fine grids the twin is the float layer under every mask and layout; the fused kernels that would skip
quantized layers are off; conversion and packed files keep the bits.
"""

import copy
import io

import pytest
import torch
from small_models import POLICY, both, quantized
from torch import Tensor, nn

from qat.calibrate import calibrate
from qat.convert import convert
from qat.export.packed import load_packed, save_packed
from qat.insert import apply_plan, named_quantizers, remove
from qat.planning.audit import audit, coverage
from qat.planning.planner import make_plan
from qat.policies.policy import QuantPolicy

FINE = {"weight": {"bits": 16, "granularity": "channel"}, "act": {"bits": 16}}
WEIGHTS_ONLY = {"weight": {"bits": 16, "granularity": "channel"}}
CAUSAL = torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)
PADDING = torch.tensor([[False, False, False, True, True], [False] * 5])


class Mine(nn.MultiheadAttention):
    """A subclass without a forward of its own."""


def inputs(kind: str) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(2, 5, 8)
    if kind == "cross":
        return x, torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    if kind == "widths":
        return x, torch.randn(2, 5, 6), torch.randn(2, 5, 4)
    if kind == "unbatched":
        return x[0], x[0], x[0]
    return x, x, x


VARIANTS = [
    pytest.param({"batch_first": True}, "self", {}, id="self"),
    pytest.param({"batch_first": True}, "cross", {"need_weights": False}, id="cross-without-weights"),
    pytest.param({"batch_first": True, "kdim": 6, "vdim": 4}, "widths", {}, id="keys-and-values-of-other-widths"),
    pytest.param({}, "unbatched", {"attn_mask": CAUSAL}, id="unbatched-causal"),
    pytest.param({"batch_first": True}, "self", {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False},
                 id="causal"),
    pytest.param({"batch_first": True}, "self", {"key_padding_mask": PADDING}, id="padding"),
    pytest.param({"batch_first": True}, "self",
                 {"key_padding_mask": PADDING.float(), "attn_mask": torch.randn(4, 5, 5)}, id="float-masks-per-head"),
    pytest.param({"batch_first": True, "add_bias_kv": True, "add_zero_attn": True}, "self",
                 {"key_padding_mask": PADDING, "attn_mask": CAUSAL}, id="extra-keys"),
    pytest.param({"batch_first": True, "bias": False}, "self", {"average_attn_weights": False}, id="without-bias"),
    pytest.param({}, "self", {}, id="sequence-first"),
]  # fmt: skip


class Attend(nn.Module):
    """Attention with fixed masks."""

    def __init__(self, options: dict, call: dict, cls: type[nn.MultiheadAttention] = nn.MultiheadAttention) -> None:
        super().__init__()
        self.attn = cls(8, 2, **options)
        self.call = call

    def forward(self, qkv: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
        return self.attn(*qkv, **self.call)


def fix(options: dict, kind: str, call: dict) -> tuple[Attend, tuple[Tensor, Tensor, Tensor]]:
    torch.manual_seed(0)
    qkv = inputs(kind)
    if not options.get("batch_first") and kind == "self":
        qkv = (qkv[0].transpose(0, 1),) * 3
    return Attend(options, call).eval(), qkv


def close(a, b, tolerance: float) -> None:
    for mine, theirs in zip(a, b, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("policy", [pytest.param(FINE, id="products"), pytest.param(WEIGHTS_ONLY, id="weights-only")])
@pytest.mark.parametrize(("options", "kind", "call"), VARIANTS)
def test_on_fine_grids_the_twin_is_the_float_layer(options, kind, call, policy):
    model, qkv = fix(options, kind, call)
    expected = model(qkv)
    quantized(model, qkv, policy)
    assert {"q_proj", "k_proj", "v_proj"} <= set(model.attn._modules)
    close(model(qkv), expected, 1e-3)


@pytest.mark.parametrize(("options", "kind", "call"), VARIANTS)
def test_the_converted_layer_computes_what_evaluation_did(options, kind, call, tmp_path):
    model, qkv = fix(options, kind, call)
    plan = quantized(model, qkv)
    converted = convert(model, plan)
    with torch.no_grad():
        close(converted(qkv), model(qkv), 1e-5)
        save_packed(converted, plan, tmp_path)
        close(load_packed(Attend(options, call), tmp_path)(qkv), converted(qkv), 0)
    assert {n for n, _ in converted.named_parameters()} <= {"attn.bias_k", "attn.bias_v"}


def test_projections_and_products_have_grids_of_their_own():
    model, qkv = fix({"batch_first": True}, "self", {})
    plan = quantized(model, qkv)
    assert set(plan.weights) == {"attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.out_proj"}
    assert plan.layers["attn.k_proj"].input == plan.layers["attn.q_proj"].input
    assert set(plan.sites) == {"attn.matmul_0", "attn.matmul_1"}
    assert plan.activations["attn.matmul_1.input_0"].signed is False  # probabilities
    assert len(list(named_quantizers(model))) == 4 + 1 + 4 + 1


def test_rules_address_projections_and_products():
    rules = {
        "value": {"match": "*.v_proj", "weight": {"bits": 8}},
        "scores": {"match": "*.matmul_0", "type": "matmul", "act": False},
        "attention": {"match": "*_proj", "type": "MultiheadAttention", "act": {"bits": 4}},
    }
    model, qkv = fix({"batch_first": True}, "self", {})
    expected = model(qkv)[0]
    plan = quantized(model, qkv, POLICY | {"rules": rules})
    assert plan.weights["attn.v_proj"].bits == 8 and plan.weights["attn.q_proj"].bits == 4
    assert set(plan.sites) == {"attn.matmul_1"}
    assert plan.activations["attn.q_proj.input"].bits == 4
    assert model(qkv)[0].shape == expected.shape


def test_a_projection_that_stays_float_keeps_the_shared_parameter_in_conversion():
    model, qkv = fix({"batch_first": True}, "self", {})
    rules = {"r": {"match": "attn.k_proj", "weight": False, "act": False}}
    fake, converted = both(model, qkv, POLICY | {"rules": rules})
    assert "attn.in_proj_weight" in dict(converted.named_parameters())
    with torch.no_grad():
        close(converted(qkv), fake(qkv), 1e-5)


@pytest.mark.parametrize(("options", "kind", "call"), VARIANTS)
def test_training_reaches_every_weight_and_every_scale(options, kind, call):
    model, qkv = fix(options, kind, call)
    policy = {"weight": {"bits": 8, "quantizer": "lsq"}, "act": {"bits": 8, "quantizer": "lsq"}}
    quantized(model, qkv, policy)
    model.train()(qkv)[0].square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_float_keys_stay_removal_restores_and_subclasses_pickle():
    torch.manual_seed(0)
    qkv = inputs("self")
    model = Attend({"batch_first": True}, {}, Mine).eval()
    keys, attributes, expected = list(model.state_dict()), set(vars(model.attn)), model(qkv)
    quantized(model, qkv)
    assert [k for k in model.state_dict() if "quantizer" not in k] == keys
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert isinstance(other.attn, Mine) and other.attn.q_proj.owner[0] is other.attn
        close(other(qkv), model(qkv), 0)
    remove(model)
    assert list(model.state_dict()) == keys and type(model.attn) is Mine and set(vars(model.attn)) == attributes
    close(model(qkv), expected, 0)


@pytest.mark.parametrize("train", [True, False], ids=["training", "evaluation"])
def test_it_compiles_in_one_graph(train):
    torch._dynamo.reset()
    x = torch.randn(2, 5, 8)
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    quantized(layer, x)
    layer.train(train)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x))


# -- Transformer layers and their fused kernels ------------------------------------------------------------------------


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


class Masked(nn.Module):
    """An encoder with a padding mask, which its fused path would turn into a nested tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = encoder()

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x, src_key_padding_mask=PADDING)


class Both(nn.Module):
    """Decoder on top of an encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Transformer(8, 2, 1, 1, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x, x.flip(1))


MODELS = [
    pytest.param(lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), id="layer"),
    pytest.param(lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True), id="norm-first"),
    pytest.param(encoder, id="encoder"),
    pytest.param(Masked, id="padded-encoder"),
    pytest.param(Both, id="decoder"),
]


@pytest.mark.parametrize("act", [False, {"bits": 8}], ids=["weights-only", "weights-and-inputs"])
@pytest.mark.parametrize("make", MODELS)
def test_evaluation_without_gradients_runs_the_quantized_layers(make, act):
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(2, 5, 8)
    expected = model(x)
    plan = quantized(model, x, {"weight": {"bits": 3}, "act": act})
    with_gradients = model(x)
    with torch.no_grad():  # no hooks here: they would turn torch's fused path off, too
        torch.testing.assert_close(model(x), with_gradients)
    assert not torch.allclose(with_gradients, expected, atol=1e-2)
    assert {name.rpartition(".")[2] for name in plan.layers} == {
        "q_proj", "k_proj", "v_proj", "out_proj", "linear1", "linear2"
    }  # fmt: skip


def test_the_fused_path_is_left_on_for_everybody_else():
    x = torch.randn(2, 5, 8)
    quantized(encoder(), x)
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("make", MODELS)
def test_on_fine_grids_a_transformer_is_the_float_one(make):
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(2, 5, 8)
    expected = model(x)
    quantized(model, x, FINE)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=2e-3)
    remove(model)
    torch.testing.assert_close(model(x), expected)


def test_a_converted_encoder_computes_what_evaluation_did():
    torch.manual_seed(0)
    model, x = Masked().eval(), torch.randn(2, 5, 8)
    fake, converted = both(model, x, FINE | {"weight": {"bits": 8, "granularity": "channel"}, "act": {"bits": 8}})
    with torch.no_grad():
        expected = fake(x)
        assert (converted(x) - expected).abs().mean() <= 1e-3 * expected.abs().mean()


def test_the_audit_counts_projections_and_products():
    torch.manual_seed(0)
    model = Attend({"batch_first": True}, {})
    query, memory = torch.randn(2, 5, 8), torch.randn(2, 7, 8)
    qkv = (query, memory, memory)
    count = sum(p.numel() for p in model.parameters())
    plan, recording = make_plan(model, QuantPolicy.from_dict(POLICY), lambda: model(qkv))
    before = audit(model, plan, recording)
    apply_plan(model, plan)
    calibrate(model, lambda: model(qkv))
    rows = audit(model, plan, recording)
    assert rows == before
    assert {r.name.removeprefix("attn."): r.macs for r in rows} == {
        "q_proj": 5 * 8 * 8, "k_proj": 7 * 8 * 8, "v_proj": 7 * 8 * 8, "out_proj": 5 * 8 * 8,
        "matmul_0": 5 * 7 * 8, "matmul_1": 5 * 7 * 8,
    }  # fmt: skip
    assert sum(r.params for r in rows) == count
    assert coverage(rows) == (1.0, 1.0) and all(r.reason is None for r in rows)
