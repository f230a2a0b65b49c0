"""Multiply-accumulates against numbers counted by hand, and against torch's own counter."""

import pytest
import torch
import torch.nn.functional as F
from test_insert import Model
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from qat.planning.audit import audit
from qat.planning.macs import einsum_macs
from qat.planning.planner import make_plan
from qat.policies.policy import QuantPolicy

N, T, C = 3, 5, 8


def macs(forward, x: torch.Tensor, **parts: nn.Module) -> dict[str, int]:
    model = Model(forward, a=nn.Linear(C, C), **parts)
    plan, recording = make_plan(model, QuantPolicy.from_dict({"weight": {}, "act": {}}), lambda: model(x))
    found = {row.name: row.macs for row in audit(model, plan, recording)}
    assert found.pop("a") == T * C * C
    return {name: count for name, count in found.items() if count}


def heads(y: torch.Tensor) -> torch.Tensor:
    return y.view(N, T, 2, C // 2).transpose(1, 2)


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        pytest.param(lambda m, x: m.a(x) @ x.mT, {"matmul_0": T * T * C}, id="matmul"),
        pytest.param(lambda m, x: x.__rmatmul__(m.a(x).mT), {"matmul_0": C * C * T}, id="reversed-matmul"),
        pytest.param(lambda m, x: m.a(x) @ x[0, 0], {"matmul_0": T * C}, id="matrix-times-vector"),
        pytest.param(
            lambda m, x: torch.bmm(heads(m.a(x)).flatten(0, 1), heads(x).flatten(0, 1).mT),
            {"matmul_0": 2 * T * T * C // 2},
            id="bmm-with-folded-heads",
        ),
        pytest.param(lambda m, x: torch.baddbmm(x.new_zeros(1), m.a(x), x.mT), {"matmul_0": T * T * C}, id="baddbmm"),
        pytest.param(
            lambda m, x: F.scaled_dot_product_attention(heads(m.a(x)), heads(x)[:, :, :4], heads(x)[:, :, :4, :3]),
            {"attention_0": 2 * T * 4 * C // 2, "attention_0.probabilities": 2 * T * 4 * 3},
            id="attention-of-other-lengths-and-widths",
        ),
        pytest.param(
            lambda m, x: torch.einsum("bthd,bshd->bhts", m.a(x).view(N, T, 2, 4), x.view(N, T, 2, 4)),
            {"einsum_0": T * T * 2 * 4},
            id="einsum",
        ),
        pytest.param(
            lambda m, x: F.conv1d(m.a(x).mT, m.kernel.weight),
            {"conv1d_0": (T - 2) * 6 * C * 3},
            id="functional-convolution",
        ),
    ],
)
def test_products_count_what_one_sample_needs(forward, expected):
    assert macs(forward, torch.randn(N, T, C), kernel=nn.Conv1d(C, 6, 3)) == expected


@pytest.mark.parametrize(
    ("equation", "shapes", "expected"),
    [
        pytest.param("ij,jk->ik", [(2, 3), (3, 4)], 24, id="matrices"),
        pytest.param("ij,jk", [(2, 3), (3, 4)], 24, id="implicit-output"),
        pytest.param("...ij,...jk->...ik", [(5, 1, 2, 3), (7, 3, 4)], 5 * 7 * 24, id="broadcast"),
        pytest.param("i,j->ij", [(2,), (3,)], 6, id="outer"),
        pytest.param("ij->i", [(2, 3)], 0, id="no-product"),
        pytest.param("ab,bc,cd->ad", [(2, 3), (3, 4), (4, 5)], 2 * 3 * 4 + 2 * 4 * 5, id="left-to-right"),
        pytest.param("ab,bc,cd", [(2, 3), (3, 4), (4, 5)], 2 * 3 * 4 + 2 * 4 * 5, id="left-to-right-implicit"),
    ],
)
def test_einsums_count_each_contraction(equation, shapes, expected):
    assert einsum_macs(equation, shapes) == expected


def test_a_transformer_block_agrees_with_torch_s_counter():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.up = nn.Linear(C, 3 * C), nn.Linear(C, 4 * C)
            self.down = nn.Parameter(torch.randn(C, 4 * C))

        def forward(self, x):
            q, k, v = self.qkv(x.reshape(-1, C)).view(N, T, 3, 2, -1).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(N, T, C)
            return F.linear(F.gelu(self.up(y + torch.softmax(y @ y.mT, -1) @ y)), self.down)

    model, x = Block(), torch.randn(N, T, C)
    plan, recording = make_plan(model, QuantPolicy.from_dict({"weight": {}, "act": {}}), lambda: model(x))
    # It knows no fused kernel of CPUs.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(x)
    rows = audit(model, plan, recording)
    assert sum(row.macs for row in rows) * N * 2 == counter.get_total_flops()
    assert sum(row.params for row in rows) == sum(p.numel() for p in model.parameters())
