"""Models that use torch in ways of their own, from insertion to the file: none of them was written for quantization."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import POLICY
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import qat
from qat.convert import convert
from qat.export.onnx.export import export_onnx
from qat.export.onnx.runtime import OnnxRunner
from qat.insert import apply_plan, named_quantizers, remove
from qat.planning.audit import audit
from qat.planning.functions import flat
from qat.planning.plan import Plan
from qat.planning.planner import make_plan
from qat.policies.policy import QuantPolicy


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@dataclass
class Batch:
    x: Tensor
    scale: float = 1.0


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)


class TakesDataclass(Base):
    def forward(self, batch: Batch, *, relu: bool = False) -> dict[str, Tensor]:
        h = self.a(batch.x) + batch.x * batch.scale
        return {"y": self.b(F.relu(h) if relu else h), "h": h}


class TakesKeywords(Base):
    def forward(self, **batch: Tensor) -> tuple[Tensor, None, list[Tensor]]:
        h = torch.stack([self.a(x) for x in batch.values()]).sum(0)
        return self.b(h), None, [h]


class ReadsTransposedWeight(nn.Module):
    """An autoencoder whose decoder is the encoder's weight, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.bias = nn.Linear(8, 6), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.relu(self.encoder(x)), self.encoder.weight.t(), self.bias)


class MultipliesByLayersWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.encoder(x)) @ self.encoder.weight


class RunsSequenceThrice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.core = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.both = nn.Sequential(self.core, nn.ReLU(), self.core)

    def forward(self, x: Tensor) -> Tensor:
        return self.both(x) + self.core(x)


class ShrinksInALoop(nn.Module):
    """One convolution at three sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        pooled = []
        for _ in range(3):
            x = F.relu(self.conv(x))
            pooled.append(x.mean((2, 3)))
            x = F.avg_pool2d(x, 2)
        return self.head(pooled[0] + pooled[1] + pooled[2])


class HasComplexLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.head = nn.Linear(5, 5, dtype=torch.cfloat), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.fft.irfft(self.mix(torch.fft.rfft(x)), n=8) + x)


class WritesToGivenTensor(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        with torch.no_grad():
            shift = torch.empty_like(y)
            torch.add(y.detach(), x.detach(), out=shift)
        return self.b(y + shift)


class WritesToSlices(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).clone()
        y[:, :4] += x[:, :4]
        return self.b(y)


class CountsIndices(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix, self.head = nn.Embedding(10, 8), nn.Linear(10, 8), nn.Linear(8, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.table(tokens).mean(1) + self.mix(F.one_hot(tokens, 10).float().sum(1)))


class RecomputesBlocks(Base):
    def block(self, x: Tensor) -> Tensor:
        return F.gelu(self.a(x))

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.block, x, use_reentrant=False) + x
        return self.b(checkpoint(self.block, x, use_reentrant=False) + x)


class HalfPrecision(Base):
    """Its parameters are bfloat16, but for the head."""

    def __init__(self) -> None:
        super().__init__()
        self.a.bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        x = x.bfloat16()
        return self.b((self.a(x) + x).float())


def rows() -> Tensor:
    return torch.randn(16, 8)


CASES = [
    pytest.param(TakesDataclass, lambda: ((Batch(rows(), 0.5),), {"relu": True}), False, id="dataclass"),
    pytest.param(TakesKeywords, lambda: ((), {"left": rows(), "right": rows()}), False, id="keywords"),
    pytest.param(ReadsTransposedWeight, lambda: ((rows(),), {}), True, id="transposed-weight"),
    pytest.param(MultipliesByLayersWeight, lambda: ((rows(),), {}), True, id="weight-of-a-layer"),
    pytest.param(RunsSequenceThrice, lambda: ((rows(),), {}), True, id="reused-sequential"),
    pytest.param(ShrinksInALoop, lambda: ((torch.randn(4, 3, 16, 16),), {}), True, id="changing-shapes"),
    pytest.param(HasComplexLayer, lambda: ((rows(),), {}), False, id="complex-layer"),
    pytest.param(WritesToGivenTensor, lambda: ((rows(),), {}), True, id="out-argument"),
    pytest.param(WritesToSlices, lambda: ((rows(),), {}), True, id="slices-written"),
    pytest.param(CountsIndices, lambda: ((torch.randint(10, (16, 5)),), {}), True, id="integer-input"),
    pytest.param(RecomputesBlocks, lambda: ((rows(),), {}), True, id="checkpointed-method"),
    pytest.param(HalfPrecision, lambda: ((rows(),), {}), False, id="bfloat16-parameters"),
]


def outputs(model: nn.Module, call: tuple[Any, Any]) -> list[Tensor]:
    output = model(*call[0], **call[1])
    return [t for t in flat((output,)) if isinstance(t, Tensor)]


@pytest.mark.parametrize(("make", "call", "exports"), CASES)
def test_it_trains_reloads_converts_and_is_given_back(
    make: Callable[[], nn.Module], call: Callable[[], tuple[Any, Any]], exports: bool, tmp_path
):
    model, given = make().eval(), call()
    fresh, plain = copy.deepcopy(model), outputs(model, given)
    plan = qat.quantize(model, POLICY, lambda: outputs(model, given))
    outputs(model.train(), given)[0].float().square().sum().backward()
    learned = {n: q.scale.grad for n, q in named_quantizers(model) if isinstance(q.scale, nn.Parameter)}
    assert learned and all(grad is not None and grad.any() for grad in learned.values())

    expected = outputs(model.eval(), given)
    apply_plan(fresh, Plan.from_dict(plan.to_dict()))
    fresh.load_state_dict(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(outputs(fresh.eval(), given), expected, strict=True))
    converted = convert(model, plan)
    for a, b in zip(outputs(converted, given), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    if exports:
        export_onnx(converted, given[0][0], tmp_path / "model.onnx")
        found = torch.from_numpy(OnnxRunner(tmp_path / "model.onnx")(given[0][0].numpy()))
        torch.testing.assert_close(found, expected[0].detach(), atol=1e-5, rtol=1e-5)
    remove(model)
    assert all(torch.equal(a, b) for a, b in zip(outputs(model, given), plain, strict=True))


@pytest.mark.parametrize(
    ("make", "name", "reason"),
    [
        pytest.param(HasComplexLayer, "mix", "its weight is complex", id="complex"),
        pytest.param(ReadsTransposedWeight, "linear_0", "functional use of a weight (F.linear)", id="transposed"),
        pytest.param(
            MultipliesByLayersWeight, "matmul_0",
            "its weight has the scales of a layer that it is tied to, which run along the sum", id="tied",
        ),
    ],
)  # fmt: skip
def test_what_no_integer_kernel_computes_says_why(make, name, reason):
    model, x = make(), rows()
    plan, recording = make_plan(model, QuantPolicy.from_dict(POLICY), lambda: model(x))
    assert {row.name: row.reason for row in audit(model, plan, recording)}[name] == reason
