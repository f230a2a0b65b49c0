"""Oscillations are counted, dampened and frozen by the paper's formulas; a weight between grid points comes to rest."""

import math
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from qat.calibrate import calibrate
from qat.convert import convert
from qat.grid.spec import QuantSpec
from qat.insert import apply_plan
from qat.lightning import QATCallback
from qat.lightning.schedules import DampenOscillations, FreezeOscillations, TrackOscillations
from qat.lightning.schedules.dampen import pull
from qat.lightning.schedules.oscillation import Oscillation, on_grid
from qat.planning.planner import make_plan
from qat.policies.policy import QuantPolicy
from qat.quantizers import create

# -- formulas ----------------------------------------------------------------------------------------------------------


def test_a_flip_is_a_change_against_the_last_one():
    state = Oscillation.start(torch.tensor([0.0]), width=4)
    #        up, up, rest, down (flip), rest, down, up (flip)
    levels = [1.0, 2.0, 2.0, 1.0, 1.0, 0.0, 1.0]
    frequency = average = 0.0
    for level, flip in zip(levels, [0, 0, 0, 1, 0, 0, 1], strict=True):
        state.update(torch.tensor([level]), 0.01)
        frequency = 0.01 * flip + 0.99 * frequency
        average = 0.01 * level + 0.99 * average
        assert state.frequency.item() == pytest.approx(frequency)
        assert state.average.item() == pytest.approx(average)


def test_a_weight_is_frozen_to_its_average_level_and_stays_there():
    quantizer = create(QuantSpec(bits=4, signed=True, narrow=False, quantizer="fixed"), torch.Size([2]))
    state = Oscillation.start(torch.tensor([2.0, 2.0]), width=4)
    for step in range(12):  # the first mostly at 3, the second never moves
        state.update(torch.tensor([2.0 if step % 3 == 2 else 3.0, 2.0]), 0.2)
    state.freeze(0.05, quantizer)
    assert state.frozen.tolist() == [True, False] and state.previous.tolist() == [3, 2]
    assert not state.frequency.any(), "what is frozen has come to rest"
    state.update(torch.tensor([-5.0, -5.0]), 0.2)
    assert state.previous.tolist() == [3, -5]


def test_only_frequencies_above_the_threshold_freeze():
    quantizer = create(QuantSpec(bits=4, signed=True, narrow=False, quantizer="fixed"), torch.Size([1]))
    state = Oscillation.start(torch.zeros(1), width=4)
    for level in (1.0, 0.0):
        state.update(torch.tensor([level]), 0.01)
    state.freeze(0.01, quantizer)
    assert not state.frozen.any(), "one flip is a frequency of exactly the momentum"
    state.freeze(0.009, quantizer)
    assert state.frozen.all()


SPECS = [
    pytest.param({"bits": 3, "granularity": "tensor"}, id="tensor"),
    pytest.param({"bits": 2, "granularity": "channel"}, id="channel"),
    pytest.param({"bits": 4, "granularity": "group", "group_size": 4}, id="group"),
    pytest.param({"bits": 4, "granularity": "channel", "symmetric": False}, id="affine"),
    pytest.param({"bits": 2, "format": "midrise", "granularity": "channel"}, id="midrise"),
]


def weight_grid(settings):
    torch.manual_seed(0)
    weight = torch.randn(6, 8)
    spec = QuantSpec.from_dict(settings).resolved(nonnegative=False, weight=True)
    quantizer = create(spec, weight.shape, 0)
    quantizer.calibrate(weight)
    return quantizer, weight


@pytest.mark.parametrize("settings", SPECS)
def test_the_pull_is_half_the_gradient_of_the_dampening_loss(settings):
    quantizer, weight = weight_grid(settings)
    w = weight.clone().requires_grad_()
    x = quantizer.partition.grouped(w)
    scale, low, high = quantizer.grid(w)
    target = quantizer.partition.grouped(quantizer.dequantize(quantizer.quantize(weight)))
    clipped = torch.minimum(torch.maximum(x, (low * scale).detach()), (high * scale).detach())
    (target.detach() - clipped).square().sum().backward()
    assert w.grad is not None and w.grad.count_nonzero() > 20
    torch.testing.assert_close(2 * pull(quantizer, weight).detach(), w.grad)


@pytest.mark.parametrize("settings", SPECS)
def test_levels_on_the_grid_are_the_quantized_weight(settings):
    quantizer, weight = weight_grid(settings)
    assert torch.equal(on_grid(quantizer, quantizer.levels(weight)), quantizer.dequantize(quantizer.quantize(weight)))


# -- a toy that oscillates ---------------------------------------------------------------------------------------------


class Toy(pl.LightningModule):
    """Regression onto weights between grid points: the gradient drives each over its threshold, back and forth."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 1, bias=False)
        with torch.no_grad():
            self.layer.weight.copy_(torch.tensor([[-1.0, -0.8, -0.5, -0.2, 0.1, 0.3, 0.6, 1.0]]))

    def forward(self, x):
        return self.layer(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return (self(x) - y).square().mean()

    def configure_optimizers(self):
        return SGD(self.parameters(), lr=0.02)


class Log(pl.Callback):
    """Keeps the metrics of every epoch, the weight's levels after every step, and the latest gradient."""

    def __init__(self) -> None:
        self.metrics, self.levels = [], []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.levels.append(pl_module.layer.weight_quantizer.levels(pl_module.layer.weight).clone())

    def on_train_epoch_end(self, trainer, pl_module):
        self.metrics.append({k: v.item() for k, v in trainer.callback_metrics.items()})


def toy_run(tmp_path, *callbacks, quantizer="fixed", **settings) -> tuple[Toy, Log]:
    x = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([[-0.9, -0.7, -0.45, -0.15, 0.12, 0.27, 0.55, 0.95]])
    loader = DataLoader(TensorDataset(x, x @ target.T), 16)
    log, model = Log(), Toy()
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    quiet |= {"accelerator": "cpu", "max_epochs": 20, "default_root_dir": tmp_path}
    qat = QATCallback({"weight": {"bits": 3, "quantizer": quantizer}}, 64)
    pl.Trainer(callbacks=[qat, *callbacks, log], **(quiet | settings)).fit(model, loader)
    return model, log


def moving(log: Log, epochs: int) -> float:
    """The share of elements whose level still changed in the last epochs."""
    last = torch.stack(log.levels[-16 * epochs :])
    return (last != last[0]).any(0).float().mean().item()


def test_without_help_the_toy_oscillates_to_the_end(tmp_path):
    _, log = toy_run(tmp_path, TrackOscillations())
    assert moving(log, 2) >= 0.5
    assert min(m["oscillation/layer"] for m in log.metrics[5:]) >= 0.5


def test_dampening_calms_the_toy(tmp_path):
    _, log = toy_run(tmp_path, TrackOscillations(momentum=0.05, threshold=0.02), DampenOscillations(5.0))
    shares = [m["oscillation/layer"] for m in log.metrics]
    assert shares[2] >= 0.5 and shares[-1] == moving(log, 2) == 0


@pytest.mark.parametrize("quantizer", ["fixed", "lsq"])
def test_freezing_calms_the_toy_and_exports_the_frozen_codes(quantizer, tmp_path):
    freeze = FreezeOscillations((0.1, 0.01))
    model, log = toy_run(tmp_path, freeze, quantizer=quantizer, max_epochs=40)
    shares = [m["oscillation/layer"] for m in log.metrics]
    assert max(shares) >= 0.5 and shares[-1] <= 1 / 8, "but for one that starts late"
    assert moving(log, 2) < 0.3
    state = freeze.weights["layer"]
    assert state.frozen.float().mean().item() == log.metrics[-1]["frozen/layer"] >= 0.5
    codes = convert(model, model.quantization_plan).layer.integer_weight.codes
    assert torch.equal(codes[state.frozen].float(), state.previous[state.frozen])


def test_a_frozen_code_does_not_move_while_its_scale_does(tmp_path):
    class FreezeAll(FreezeOscillations):
        def on_train_start(self, trainer, pl_module):
            super().on_train_start(trainer, pl_module)
            self.weights["layer"].frozen.fill_(True)

    model, log = toy_run(tmp_path, FreezeAll(), quantizer="lsq", max_epochs=3)
    assert all(torch.equal(levels, log.levels[0]) for levels in log.levels)
    before = Toy()
    assert not torch.equal(model.layer.weight, before.layer.weight)
    assert torch.equal(model.layer.weight_quantizer(model.layer.weight), model.layer.weight), (
        "it lies on its grid point"
    )


def test_flips_are_counted_once_per_optimizer_step(tmp_path):
    counted = []

    class Count(TrackOscillations):
        def after_update(self, trainer, *args):
            counted.append(trainer.global_step)

    toy_run(tmp_path, Count(), accumulate_grad_batches=4, max_epochs=2)
    assert counted == list(range(1, 9))


def test_dampening_is_added_once_per_optimizer_step_at_the_strength_of_the_moment(tmp_path):
    seen = []

    class Around(DampenOscillations):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            weight = pl_module.layer.weight
            before = weight.grad.clone()
            super().on_before_optimizer_step(trainer, pl_module, optimizer)
            strength = 1.5 * (1 - math.cos(math.pi * trainer.global_step / 8)) / 2
            torch.testing.assert_close(
                weight.grad, before + 2 * strength * pull(pl_module.layer.weight_quantizer, weight)
            )
            seen.append(not torch.equal(before, weight.grad))

    toy_run(tmp_path, Around(1.5), max_steps=8, max_epochs=-1, accumulate_grad_batches=2)
    assert seen == [False] + [True] * 7


def test_dampening_is_for_the_weights_that_the_optimizer_moves():
    x = torch.randn(4, 8)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    plan, _ = make_plan(model, QuantPolicy.from_dict({"weight": {"bits": 3}}), lambda: model(x))
    apply_plan(model, plan)
    calibrate(model, lambda: model(x))
    for layer in model:
        layer.weight.grad = torch.zeros_like(layer.weight)
    now = SimpleNamespace(max_epochs=None, max_steps=2, global_step=1)
    DampenOscillations().on_before_optimizer_step(now, model, SGD(model[0].parameters(), lr=0.1))
    assert model[0].weight.grad.any() and not model[1].weight.grad.any()
