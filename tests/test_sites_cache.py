"""What models with a cache, masks and position tables do between layers: empty concatenations, constants, float kinds
that come and go, and keys and values on grids of their own.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.calibrate import calibrate
from qat.convert import convert
from qat.errors import UserError
from qat.export.onnx.export import export_onnx
from qat.export.onnx.runtime import OnnxRunner
from qat.insert import apply_plan
from qat.planning.audit import audit
from qat.planning.plan import Plan
from qat.planning.planner import make_plan
from qat.policies.policy import QuantPolicy


class Cached(nn.Module):
    """Attention over what came before; `past` is empty at first."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.register_buffer("angle", torch.arange(8.0))
        self.use_cache = True

    def forward(self, x: Tensor, past: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.use_cache:
            k = torch.cat([torch.tensor([]) if past is None else past, k], -2)
        table = torch.sin(torch.stack([self.angle, self.angle * self.angle]).sum(0))
        return F.scaled_dot_product_attention(q + table, k, v if past is None else torch.cat([v, v], -2))


def planned(model: nn.Module, x: Tensor, **policy) -> Plan:
    settings = {"weight": {"bits": 8}, "act": {"bits": 8}, **policy}
    plan, _ = make_plan(model, QuantPolicy.from_dict(settings), lambda: model(x))
    return plan


X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))


def test_concatenating_with_an_empty_cache_passes_the_grid_through():
    plan = planned(Cached(), X)
    key = plan.sites["attention_0"][1]
    assert plan.sites["cat_0"] == [[], key]
    assert key == plan.sites["attention_0"][2]  # sliced from one projection


def test_what_is_computed_from_no_data_stays_float_and_says_so():
    model = Cached()
    policy = QuantPolicy.from_dict({"weight": {"bits": 8}, "act": {"bits": 8}, "kinds": "all"})
    plan, recording = make_plan(model, policy, lambda: model(X))
    assert "mul_0" not in plan.sites and "cat_1" not in plan.sites
    assert "add_0" in plan.sites  # of data and a constant
    reasons = {row.name: row.reason for row in audit(model, plan, recording)}
    assert reasons["mul_0"] == "computed from no data: the same for every input"


def causal_buffer(model: nn.Module, scores: Tensor) -> Tensor:
    return scores + model.causal  # pyright: ignore[reportOperatorIssue]


def causal_made(model: nn.Module, scores: Tensor) -> Tensor:
    return scores + torch.triu(torch.full((scores.shape[-1],) * 2, -torch.inf), 1)


def causal_alike(model: nn.Module, scores: Tensor) -> Tensor:
    return scores + torch.full_like(scores, -torch.inf).triu(1).to(scores)


def causal_in_place(model: nn.Module, scores: Tensor) -> Tensor:
    scores += torch.zeros_like(scores).masked_fill_(model.causal.isinf(), -torch.inf)  # pyright: ignore
    return scores


class Masked(nn.Module):
    """Attention written by hand, with a mask that is added."""

    def __init__(self, mask) -> None:
        super().__init__()
        self.qkv, self.mask = nn.Linear(8, 24), mask
        self.register_buffer("causal", torch.triu(torch.full((3, 3), -torch.inf), 1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.mask(self, q @ k.mT / 3).softmax(-1) @ v + x


MASKS = [
    pytest.param(causal_buffer, id="buffer"),
    pytest.param(causal_made, id="made-in-forward"),
    pytest.param(causal_alike, id="full-like"),
    pytest.param(causal_in_place, id="in-place"),
]


@pytest.mark.parametrize("mask", MASKS)
def test_a_mask_of_infinities_is_added_in_float_and_says_so(mask, tmp_path):
    torch.manual_seed(0)
    model = Masked(mask)
    plan, recording = make_plan(
        model, QuantPolicy.from_dict({"weight": {"bits": 8}, "act": {"bits": 8}}), lambda: model(X)
    )
    assert list(plan.sites) == ["matmul_0", "matmul_1", "add_1"]
    reasons = {row.name: row.reason for row in audit(model, plan, recording)}
    assert reasons["add_0"] == "one side is a constant that holds infinity (a mask), for which there is no grid"
    apply_plan(model, plan)
    calibrate(model, lambda: model(X))
    model.train()(X).sum().backward()
    assert model.qkv.weight.grad.isfinite().all()  # pyright: ignore[reportOptionalMemberAccess]
    export_onnx(convert(model, plan), X, tmp_path / "model.onnx")
    runner = OnnxRunner(tmp_path / "model.onnx")
    assert runner.integer_nodes() == 3
    with torch.no_grad():
        assert (torch.from_numpy(runner(X.numpy())) - model.eval()(X)).abs().max() < 0.02


def test_drawn_numbers_are_data():
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + (torch.randn(8) + torch.rand(8))

    assert list(planned(Noisy(), X).sites) == ["add_0", "add_1"]


def test_kinds_that_an_owner_leaves_float_may_come_and_go():
    block = nn.ModuleList([Cached(), Cached()])
    block.forward = lambda x: block[1](block[0](x))  # pyright: ignore
    plan = planned(block, X, rules={"cat": {"match": "0.cat_*", "act": False}})
    apply_plan(block, plan)
    calibrate(block, lambda: block(X))
    block[0].use_cache = False  # pyright: ignore
    block(X)
    block[1].use_cache = False  # pyright: ignore
    with pytest.raises(UserError, match=r"cat_\*"):
        block(X)


CACHE = {"match": "*", "type": "kv_cache"}


def test_keys_and_values_may_have_fewer_bits_than_the_query():
    plan = planned(Cached(), X, kinds=["attention"], rules={"kv": {**CACHE, "act": {"bits": 4}}})
    grids = [plan.activations[chain[-1]].bits for chain in plan.sites["attention_0"]]
    assert grids == [8, 4, 4]
    assert all(len(chain) == 1 for chain in plan.sites["attention_0"])  # not 8 bits first


def test_the_cache_is_left_to_the_grids_of_attention_unless_a_rule_names_it():
    assert (
        planned(Cached(), X, kinds=["attention"]).sites == planned(Cached(), X, kinds=["attention", "kv_cache"]).sites
    )


def test_a_cache_alone_leaves_query_and_layers_float():
    plan = planned(Cached(), X, act=False, weight=False, rules={"kv": {**CACHE, "act": {"bits": 8}}})
    assert not plan.weights and plan.layers["qkv"].input == []
    query, key, value = plan.sites["attention_0"]
    assert query == [] and key == value and len(key) == 1
