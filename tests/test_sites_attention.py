"""Explicit attention computes what torch's own does, in every form of the call, and lets its probabilities be
quantized.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from test_insert import Model, inserted, planned
from torch import nn

from qat.layers.explicit_attention import explicit_attention

MASK = torch.tensor([[True, False, True, True, False], [False] * 5, [True] * 5])
CALLS = [
    pytest.param({}, id="plain"),
    pytest.param({"scale": 0.3}, id="scale"),
    pytest.param({"is_causal": True}, id="causal"),
    pytest.param({"attn_mask": MASK}, id="mask-with-a-row-of-nothing"),
    pytest.param({"attn_mask": torch.randn(3, 5).double()}, id="float-mask"),
    pytest.param(
        {"attn_mask": torch.zeros(3, 5).double().masked_fill(~MASK, -math.inf)}, id="float-mask-with-infinity"
    ),
    pytest.param({"attn_mask": MASK.view(1, 1, 3, 5).expand(2, 4, 3, 5)}, id="mask-per-head"),
]


def tensors(heads: int = 4) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = (2, 4, 3, 6), (2, heads, 5, 6), (2, heads, 5, 7)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("settings", CALLS)
@pytest.mark.parametrize("grouped", [pytest.param(False, id="heads"), pytest.param(True, id="grouped-heads")])
def test_values_and_gradients_are_those_of_torch(settings, grouped):
    settings = {**settings, "enable_gqa": grouped}
    qkv = tensors(2 if grouped else 4)
    expected = F.scaled_dot_product_attention(*qkv, **settings)
    actual = explicit_attention(*qkv, **settings, probabilities=lambda p: p)
    torch.testing.assert_close(actual, expected)
    weight = torch.randn_like(expected)
    for mine, theirs in zip(
        torch.autograd.grad((actual * weight).sum(), qkv),
        torch.autograd.grad((expected * weight).sum(), qkv),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


def test_dropout_acts_on_the_quantized_probabilities():
    q, k, v = (t.detach() for t in tensors())
    seen = []
    torch.manual_seed(1)
    y = explicit_attention(q, k, v, dropout_p=0.5, probabilities=lambda p: seen.append(p) or torch.ones_like(p))
    torch.manual_seed(1)
    kept = F.dropout(torch.ones_like(seen[0]), 0.5)
    torch.testing.assert_close(y, kept @ v)


def test_a_mask_beside_is_causal_is_refused_as_torch_does():
    with pytest.raises(RuntimeError, match="is_causal"):
        explicit_attention(*tensors(), attn_mask=MASK, is_causal=True, probabilities=lambda p: p)


def test_groups_that_do_not_divide_the_heads_are_refused_as_torch_does():
    with pytest.raises(RuntimeError, match="must divide the number of heads in query"):
        explicit_attention(*tensors(3), enable_gqa=True, probabilities=lambda p: p)


def test_grouped_heads_may_have_no_queries():
    q, k, v = tensors(2)
    y = explicit_attention(q[:, :, :0], k, v, enable_gqa=True, probabilities=lambda p: p)
    assert y.shape == (2, 4, 0, 7)


def attend(m, x):
    q, k, v = m.qkv(x).chunk(3, -1)
    return m.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))


def attention_model() -> nn.Module:
    torch.manual_seed(0)
    return Model(attend, qkv=nn.Linear(8, 24), out=nn.Linear(8, 8))


@pytest.mark.parametrize(
    ("policy", "explicit"),
    [
        pytest.param({}, False, id="by-default-fused"),
        pytest.param({"kinds": "all"}, True, id="every-kind"),
        pytest.param(
            {"rules": {"r": {"match": "*", "type": "probabilities", "act": {"bits": 4}}}}, True, id="a-rule-asks"
        ),
        pytest.param({"kinds": ["probabilities"]}, True, id="probabilities-alone"),
    ],
)
def test_probabilities_are_formed_only_where_the_policy_asks(policy, explicit):
    x = torch.randn(4, 6, 8)
    model = inserted(attention_model(), x, act={"bits": 8}, **policy)
    site = model.attention_0
    assert site.explicit is explicit
    if explicit:
        grid = site.probability_quantizer.spec
        assert grid.signed is False
        assert grid.bits == (4 if "rules" in policy else 8)
        assert 0.9 < float(site.probability_quantizer.scale.detach()) * site.probability_quantizer.quant_max < 1.1


def test_query_key_and_value_of_one_projection_share_its_grid():
    plan = planned(attention_model(), torch.randn(4, 6, 8))
    assert plan.sites["attention_0"] == [["attention_0.input_0"]] * 3


def test_values_lie_on_the_grids():
    x = torch.randn(4, 6, 8)
    model = inserted(attention_model(), x, act={"bits": 8}, kinds="all")
    site = model.attention_0
    q, k, v = (site.input_quantizer_0(t) for t in model.qkv(x).chunk(3, -1))
    expected = explicit_attention(q, k, v, is_causal=True, probabilities=site.probability_quantizer)
    assert torch.equal(model(x), model.out(expected))
