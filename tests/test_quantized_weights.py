"""Every weight on a grid is known to everybody who looks at weights, wherever it is: in a layer, a part of one, a
functional site, a module of experts, behind a parametrization.
"""

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from tiny_module import trainer
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.data import DataLoader, TensorDataset

from qat.calibrate import calibrate
from qat.errors import UserError
from qat.export.verify import expected_codes
from qat.insert import apply_plan, named_quantizers
from qat.layers.weights import quantized_weights
from qat.lightning import AnnealBits, DampenOscillations, FreezeOscillations, QuantizerHealth, TrackOscillations
from qat.lightning.schedules.dampen import pull
from qat.lightning.schedules.moments import cosine, progress
from qat.lightning.schedules.oscillation import on_grid
from qat.measure.stats import quantizer_stats, weight_stats
from qat.planning.planner import make_plan
from qat.policies.policy import QuantPolicy

W, POLICY = 8, {"weight": {"bits": 4, "granularity": "channel", "quantizer": "lsq"}, "act": {"bits": 4}}


class Product(nn.Module):
    """A functional site with a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(W, W) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix)


class Attention(nn.Module):
    """Its first three projections are rows of one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(W, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x[:, None], x[:, None], x[:, None], need_weights=False)[0][:, 0]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(W, W, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x[:, None])[0][:, 0]


class Experts(nn.Module):
    """Two, of which each gets half of the rows; as those of `transformers`, in either order of axes."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.transposed = transposed
        up = (2, W, 2 * W) if transposed else (2, 2 * W, W)
        self.gate_up_proj = nn.Parameter(torch.randn(up) * 0.3)
        self.down_proj = nn.Parameter(torch.randn(2, W, W) * 0.3)

    def _apply_gate(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        ends = torch.tensor([len(x) // 2, len(x)], dtype=torch.int32)
        return F.grouped_mm(x, weight if self.transposed else weight.transpose(-2, -1), offs=ends)

    def forward(self, x: Tensor) -> Tensor:
        return self._product(self._apply_gate(self._product(x, self.gate_up_proj)), self.down_proj)


BODIES = [
    pytest.param(lambda: nn.Linear(W, W), ["body"], id="layer"),
    pytest.param(Recurrent, ["body.rnn.ih_l0", "body.rnn.hh_l0"], id="recurrent"),
    pytest.param(Attention, [f"body.attention.{p}_proj" for p in ("out", "q", "k", "v")], id="attention"),
    pytest.param(Product, ["body.linear_0"], id="site"),
    pytest.param(lambda: Experts(False), ["body.grouped_mm_0", "body.grouped_mm_1"], id="experts"),
    pytest.param(lambda: Experts(True), ["body.grouped_mm_0", "body.grouped_mm_1"], id="experts-transposed"),
    pytest.param(lambda: weight_norm(nn.Linear(W, W)), ["body"], id="weight-norm"),
    pytest.param(lambda: spectral_norm(nn.Linear(W, W)), ["body"], id="spectral-norm"),
]
MOVED = [*BODIES[:-2], pytest.param(BODIES[-2].values[0], [], id="weight-norm")]


class Net(pl.LightningModule):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(W, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).relu())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def net(make: Any) -> Net:
    torch.manual_seed(0)
    return Net(make())


def batch() -> Tensor:
    return torch.randn(16, W, generator=torch.Generator().manual_seed(1))


def fit(tmp_path: Any, model: Net, *callbacks: pl.Callback) -> Net:
    data = DataLoader(TensorDataset(batch(), torch.arange(16) % 3), 4)
    trainer(tmp_path, *callbacks, policy=POLICY).fit(model, data)
    return model


def inserted(make: Any) -> Net:
    model, x = net(make).eval(), batch()
    plan, _ = make_plan(model, QuantPolicy.from_dict(POLICY), lambda: model(x))
    apply_plan(model, plan)
    calibrate(model, lambda: model(x))
    return model


@pytest.mark.parametrize(("make", "names"), BODIES)
def test_who_measures_weights_measures_all_of_them(make, names):
    model, wanted = inserted(make), {*names, "head"}
    grids = {f"{name}.weight_quantizer" for name in wanted}
    assert {n for n, q in named_quantizers(model) if q.is_weight} == grids
    assert {w.name for w in quantized_weights(model).values()} == wanted
    assert {s.name for s in weight_stats(model)} == grids
    assert {s.name for s in quantizer_stats(model, lambda: model(batch())) if s.role == "weight"} == grids
    assert expected_codes(model).keys() == wanted


@pytest.mark.parametrize(("make", "names"), BODIES)
def test_callbacks_that_look_on_in_training_see_all_weights_and_leave_them_as_they_are(make, names, tmp_path):
    health, track = QuantizerHealth(2), TrackOscillations()
    seen = fit(tmp_path, net(make), health, track, AnnealBits([[0, 4]]))
    assert {row.layer for row in health.rows if row.role == "weight"} == {*names, "head"} == track.weights.keys()
    alone = fit(tmp_path, net(make)).state_dict()
    assert all(torch.equal(value, alone[key]) for key, value in seen.state_dict().items())


class FreezeAll(FreezeOscillations):
    def on_train_start(self, trainer, pl_module):
        super().on_train_start(trainer, pl_module)
        for state in self.weights.values():
            state.frozen.fill_(True)


@pytest.mark.parametrize(("make", "names"), MOVED)
def test_freezing_puts_all_weights_on_their_grid_but_computed_ones(make, names, tmp_path):
    freeze = FreezeAll()
    model = fit(tmp_path, net(make), freeze)
    assert freeze.weights.keys() == {*names, "head"}
    for weight in quantized_weights(model).values():
        if weight.name in freeze.weights:
            level = freeze.weights[weight.name].previous
            assert torch.equal(weight.tensor, on_grid(weight.quantizer, level))


@pytest.mark.parametrize(("make", "names"), MOVED)
def test_dampening_pulls_all_weights_but_computed_ones(make, names, tmp_path):
    moved = set()

    class Pulled(DampenOscillations):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            before = {p: p.grad.clone() for p in pl_module.parameters()}
            super().on_before_optimizer_step(trainer, pl_module, optimizer)
            for weight in filter(lambda w: w.writable, quantized_weights(pl_module).values()):
                change = weight.within(weight.parameter.grad - before[weight.parameter])
                wanted = pull(weight.quantizer, weight.tensor).reshape(change.shape)
                strength = 2 * cosine(0, self.strength, progress(trainer))
                torch.testing.assert_close(change, strength * wanted, atol=1e-6, rtol=1e-4)
                moved.update([weight.name] if change.any() else [])

    fit(tmp_path, net(make), Pulled(1.0))
    assert moved == {*names, "head"}


@pytest.mark.parametrize("callback", [FreezeOscillations, DampenOscillations])
def test_who_moves_weights_says_which_it_leaves_out(callback, tmp_path):
    said = f"{callback.__name__}: leaves out 'body': a parametrization computes the weight anew each time"
    with pytest.warns(UserWarning, match=said):
        fit(tmp_path, net(lambda: weight_norm(nn.Linear(W, W))), callback())


def test_weights_that_are_all_computed_cannot_be_moved(tmp_path):
    model = net(lambda: weight_norm(nn.Linear(W, W)))
    model.head = weight_norm(model.head)
    with pytest.raises(UserError, match=r"FreezeOscillations: leaves out 'body' and 1 more: .*no other weight has"):
        fit(tmp_path, model, FreezeOscillations())
