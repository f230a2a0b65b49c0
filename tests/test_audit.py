"""The audit: every part of a model has a row, and what stays float says why."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from qat.errors import UserError
from qat.insert import apply_plan
from qat.planning.audit import AuditRow, audit, check_coverage, coverage, to_dict
from qat.planning.planner import make_plan
from qat.policies.policy import QuantPolicy
from qat.quantizers import Quantizer

POLICY = {"weight": {"bits": 4, "granularity": "channel"}, "act": {"bits": 4}, "sites": {"bits": 8}}


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, 2 * self.weight, self.bias)


class OwnWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix)


class Around(nn.Module):
    """A `Linear(8, 8)` that makes the model quantizable, and after it `call(part, x)` with the part in question."""

    def __init__(self, part: nn.Module | None, call) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.part = part
        self.offset = nn.Parameter(torch.zeros(8))
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.call(self, x)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(3)
        self.conv2 = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.head = nn.Linear(3, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.conv2(x) + x
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def audited(model: nn.Module, x: Tensor, **policy) -> dict[str, AuditRow]:
    plan, recording = make_plan(model, QuantPolicy.from_dict({**POLICY, **policy}), lambda: model(x))
    apply_plan(model, plan)
    return {row.name: row for row in audit(model, plan, recording)}


def pruned() -> nn.Linear:
    layer = nn.Linear(8, 8)
    prune.l1_unstructured(layer, "weight", 0.5)
    return layer


def plain(model: Around, x: Tensor) -> Tensor:
    return model.part(x)


COMPUTED = "weight is computed by pruning or a hook"


class OwnAttention(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, x, x)[0]


REASONS = [
    pytest.param(lambda: nn.PReLU(8), plain, "part", "no quantized version of PReLU", id="prelu"),
    pytest.param(lambda: nn.LayerNorm(8), plain, "part", "no quantized version of LayerNorm", id="layer-norm"),
    pytest.param(lambda: nn.LayerNorm(8, elementwise_affine=False), plain, "part",
                 "no quantized version of LayerNorm", id="norm-without-parameters"),
    pytest.param(lambda: Doubled(8, 8), plain, "part", "subclass of Linear with a forward of its own", id="subclass"),
    pytest.param(pruned, plain, "part", COMPUTED, id="pruned"),
    pytest.param(lambda: nn.Linear(8, 8), lambda m, x: x, "part", "its forward is never called", id="not-reached"),
    pytest.param(lambda: nn.BatchNorm1d(8), lambda m, x: x, "part",
                 "its forward is never called", id="norm-not-reached"),
    pytest.param(lambda: nn.Linear(8, 8), lambda m, x: F.linear(x, 2 * m.part.weight), "linear_0",
                 "linear in the forward of Around", id="functional-linear-of-a-computed-weight"),
    pytest.param(lambda: nn.Bilinear(8, 8, 8), lambda m, x: F.bilinear(x, x, m.part.weight), "part",
                 "functional use of its weight (F.bilinear)", id="functional-bilinear"),
    pytest.param(lambda: None, lambda m, x: m.offset @ x.T, "matmul_0",
                 "one side of the product is a vector of parameters", id="parameter-times-tensor"),
    pytest.param(lambda: OwnAttention(8, 2), plain, "part.out_proj",
                 "functional use of its weight (attention)", id="inside-multihead-attention"),
    pytest.param(lambda: nn.BatchNorm1d(8), lambda m, x: m.part(F.relu(x)), "part",
                 "kept in float: follows no layer it can fold into", id="batch-norm-after-relu"),
    pytest.param(lambda: nn.BatchNorm1d(8), plain, "part", "folds into first", id="batch-norm-that-folds"),
    pytest.param(lambda: None, lambda m, x: x + m.offset, "add_0",
                 "one side of the sum is a vector of parameters", id="adds-a-bias"),
    pytest.param(lambda: None, lambda m, x: x.view(-1, 2, 2, 2).mean(1), "avg_pool_0",
                 "mean over other axes than an image's", id="mean-over-channels"),
    pytest.param(lambda: None, lambda m, x: x * m.offset, "offset",
                 "parameter of Around itself, in no layer", id="parameter"),
]  # fmt: skip


@pytest.mark.parametrize(("part", "call", "name", "reason"), REASONS)
def test_what_stays_float_says_why(part, call, name, reason):
    rows = audited(Around(part(), call), torch.randn(4, 8))
    assert rows[name].reason == reason
    assert rows[name].weight is None and rows[name].act is None
    assert rows["first"].reason is None


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        pytest.param({"weight": "off", "act": "off"}, "rule 'r' leaves it float", id="both"),
        pytest.param({"weight": "off"}, "rule 'r' leaves its weight float", id="weight"),
        pytest.param({"act": "off"}, "rule 'r' leaves its input float", id="input"),
    ],
)
def test_a_rule_that_leaves_a_layer_float_is_named(rule, reason):
    rows = audited(Residual(), torch.randn(2, 3, 6, 6), rules={"r": {"match": "conv2", **rule}})
    assert rows["conv2"].reason == reason
    assert (rows["conv2"].weight is None) == ("weight" in rule)
    assert (rows["conv2"].act is None) == ("act" in rule)


def test_the_policy_itself_is_named_where_no_rule_decides():
    rows = audited(Residual(), torch.randn(2, 3, 6, 6), act="off", sites=None)
    assert rows["conv2"].reason == "policy leaves its input float"
    assert rows["add_0"].reason == rows["avg_pool_0"].reason == "policy leaves it float"


def test_two_deciders_are_both_named():
    rules = {"w": {"match": "conv2", "weight": "off"}}
    rows = audited(Residual(), torch.randn(2, 3, 6, 6), act="off", sites=None, weight={"bits": 8}, rules=rules)
    assert rows["conv2"].reason == "policy and rule 'w' leave it float"


def test_rows_come_in_execution_order_with_their_grids():
    rows = audited(Residual(), torch.randn(2, 3, 6, 6))
    assert list(rows) == ["conv1", "bn1", "conv2", "add_0", "avg_pool_0", "head"]
    assert (rows["conv2"].weight, rows["conv2"].act) == ("int4/channel", "uint8 > uint4")
    assert (rows["conv2"].weight_bits, rows["conv2"].act_bits) == (4, 4)
    assert (rows["add_0"].weight, rows["add_0"].act) == (None, "int8 + uint8")
    assert rows["bn1"].folds and not rows["conv1"].folds
    assert all(row.reason is None for row in rows.values() if not row.folds)


def test_an_embedding_needs_no_grid_for_its_indices():
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8))
    rows = audited(model, torch.randint(0, 10, (2, 5)))
    assert rows["0"].weight == "int4/channel" and rows["0"].act is None and rows["0"].reason is None


@pytest.mark.parametrize(
    ("part", "call", "expected"),
    [
        pytest.param(OwnWeight, plain, 8 * 8, id="linear"),
        pytest.param(lambda: None, lambda m, x: x[:, None] @ x[:, :, None], 8, id="matmul"),
        pytest.param(lambda: nn.Conv3d(1, 2, 2), lambda m, x: m.part(x.view(-1, 1, 2, 2, 2)), 2 * 8, id="convolution"),
        pytest.param(
            lambda: nn.ConvTranspose1d(2, 3, 5),
            lambda m, x: m.part(x.view(-1, 2, 4)),
            2 * 4 * 3 * 5,
            id="transposed-convolution",
        ),
    ],
)
def test_functions_count_their_macs_for_one_sample(part, call, expected):
    rows = audited(Around(part(), call), torch.randn(4, 8))
    assert rows.pop("first").macs == 64
    assert sum(row.macs for row in rows.values()) == expected


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(lambda: Around(nn.MultiheadAttention(8, 2), lambda m, x: m.part(x, x, x)[0]), id="attention"),
        pytest.param(lambda: Around(parametrizations.weight_norm(nn.Linear(8, 8)), plain), id="parametrized"),
        pytest.param(lambda: Around(nn.TransformerEncoderLayer(8, 2, 16), plain), id="nested"),
        pytest.param(lambda: Around(OwnWeight(), lambda m, x: m.part(x) + m.offset), id="lone"),
    ],
)
def test_every_parameter_is_counted_once(model):
    model = model()
    total = sum(p.numel() for p in model.parameters())
    assert sum(row.params for row in audited(model, torch.randn(4, 8)).values()) == total
    assert any(isinstance(m, Quantizer) for m in model.modules())


def test_a_model_that_is_one_layer_has_one_row():
    assert audited(nn.Linear(8, 8), torch.randn(4, 8)) == {
        "": AuditRow("", "Linear", "int4/channel", "int4", 4, 4, macs=64, params=72, integer_weight=True)
    }


def test_a_layer_that_runs_twice_has_one_row_with_both_passes():
    layer = nn.Linear(8, 8)
    rows = audited(nn.Sequential(layer, nn.ReLU(), layer), torch.randn(4, 8))
    assert [(row.name, row.macs, row.params) for row in rows.values()] == [("0", 128, 72)]


def test_a_tied_weight_is_counted_where_it_appears_first():
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 10, bias=False))
    model[1].weight = model[0].weight
    rows = audited(model, torch.randint(0, 10, (2, 5)))
    assert [row.params for row in rows.values()] == [80, 0]
    assert rows["1"].weight == "int4/channel"


def test_coverage_is_the_share_of_macs_and_of_parameters():
    model = Residual()
    rows = list(audited(model, torch.randn(2, 3, 6, 6), rules={"r": {"match": "conv2", "act": "off"}}).values())
    conv, head = 36 * 3 * 27, 30
    share_macs, share_params = coverage(rows)
    assert share_macs == pytest.approx((conv + head) / (2 * conv + head))
    assert share_params == 1  # what folds is no gap, and conv2 still stores integers
    assert coverage([]) == (1.0, 1.0)


def test_the_audit_is_plain_containers():
    rows = list(audited(Residual(), torch.randn(2, 3, 6, 6)).values())
    stored = json.loads(json.dumps(to_dict(rows)))
    assert [AuditRow(**row) for row in stored["rows"]] == rows
    assert stored["coverage"] == {"macs": 1.0, "params": 1.0}


def test_what_falls_short_by_little_never_looks_like_enough():
    rows = [AuditRow("a", "Linear", macs=99_999), AuditRow("b", "Linear", macs=1, reason="policy leaves it float")]
    with pytest.raises(UserError, match=r"require_coverage=1.0: 99\.99% of"):
        check_coverage(rows, {"": 1.0})


def test_the_largest_gaps_are_named_first():
    rows = [AuditRow("small", "Linear", macs=10, reason="why"), AuditRow("large", "Linear", macs=90, reason="why")]
    with pytest.raises(UserError, match=r"float are 'large' 90\.0% \(why\); 'small' 10\.0%"):
        check_coverage(rows, {"": 1.0})


def test_a_weight_without_a_grid_counts_as_float_beside_its_input():
    assert AuditRow("a", "Linear", act_bits=8, macs=10, reason="policy leaves it float").bops == 10 * 32 * 8
    assert AuditRow("a", "matmul", act_bits=8, macs=10).bops == 10 * 8 * 8
