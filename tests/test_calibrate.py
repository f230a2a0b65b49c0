"""Calibration: every quantizer gets a range from the float model, errors name the quantizer, and nothing else is
touched.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric

from qat.calibrate import calibrate, needs_calibration
from qat.errors import UserError
from qat.grid.sample import SAMPLES_PER_BATCH, spread_out
from qat.grid.spec import QuantSpec
from qat.insert import apply_plan, named_quantizers
from qat.planning.planner import make_plan
from qat.policies.policy import QuantPolicy
from qat.quantizers import create


class Net(nn.Module):
    """A branch that small inputs do not take, dropout, a norm and a metric."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.5)
        self.large = nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)
        self.metric = MeanMetric()

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(F.relu(self.norm(self.first(x))))
        if x.abs().max() > 1:
            y = self.large(y)
        return self.head(y)


LARGE = torch.linspace(-2, 2, 64).view(8, 8)


def inserted(**policy) -> Net:
    torch.manual_seed(0)
    model = Net()
    settings = {"weight": {"bits": 8, "granularity": "channel"}, "act": {"bits": 8, "range": "minmax"}, **policy}
    plan, _ = make_plan(model, QuantPolicy.from_dict(settings), lambda: model(LARGE))
    apply_plan(model, plan)
    return model


def test_every_quantizer_has_a_range_afterwards():
    model = inserted()
    assert needs_calibration(model)
    calibrate(model, lambda: model(LARGE))
    assert not needs_calibration(model)
    assert all(q.on and (q.step() > 0).all() for _, q in named_quantizers(model))


def test_the_range_is_that_of_the_float_tensor_over_all_batches():
    model = inserted()
    calibrate(model, lambda: [model(LARGE), model(3 * LARGE), model(LARGE)])
    grid = model.first.input_quantizer
    assert grid.step().item() == pytest.approx(6 / grid.quant_max, rel=0.02)
    with torch.no_grad():
        float_model = copy.deepcopy(model)
        for _, q in named_quantizers(float_model):
            q.enable(False)
        float_model.eval()
        largest = max(F.relu(float_model.norm(float_model.first(x))).max() for x in (LARGE, 3 * LARGE))
    assert model.large.input_quantizer.step().item() == pytest.approx(largest.item() / 255, rel=0.02)


def test_weights_are_read_where_they_lie():
    model = inserted()
    calibrate(model, lambda: model(LARGE))
    quantizer, weight = model.head.weight_quantizer, model.head.weight
    error = (quantizer(weight) - weight).abs().amax(1)
    assert (error <= quantizer.step() * 2).all() and quantizer.step().shape == (2,)


def test_a_second_calibration_starts_anew():
    model = inserted()
    calibrate(model, lambda: model(10 * LARGE))
    calibrate(model, lambda: model(LARGE))
    again = inserted()
    calibrate(again, lambda: again(LARGE))
    for (_, a), (_, b) in zip(named_quantizers(model), named_quantizers(again), strict=True):
        assert torch.equal(a.step(), b.step())


def test_an_uncalibrated_model_refuses_to_run():
    with pytest.raises(RuntimeError, match=r"no range yet: qat\.calibrate\.calibrate\(model, run\)"):
        inserted()(LARGE)


@torch.no_grad()
def broken_norm(model: Net) -> None:
    model.norm.bias[0] = torch.nan


@torch.no_grad()
def broken_weight(model: Net) -> None:
    model.large.weight[0, 0] = torch.nan


@pytest.mark.parametrize(
    ("data", "prepare", "message"),
    [
        pytest.param(
            LARGE * torch.nan, None, "calibrating 'first.input_quantizer': calibration data holds NaN", id="nan"
        ),
        pytest.param(
            LARGE / 0, None, "calibrating 'first.input_quantizer': calibration data holds NaN or inf", id="infinity"
        ),
        pytest.param(LARGE / 4, None, "calibrating 'large.input_quantizer': nothing passed", id="layer-not-reached"),
        pytest.param(
            LARGE, broken_norm, "calibrating 'large.input_quantizer': calibration data holds NaN", id="nan-in-between"
        ),
        pytest.param(
            LARGE, broken_weight, "calibrating 'large.weight_quantizer': the weight holds NaN", id="nan-in-a-weight"
        ),
    ],
)
def test_an_error_names_the_quantizer(data, prepare, message):
    model = inserted()
    if prepare:
        prepare(model)
    with pytest.raises(UserError) as error:
        calibrate(model, lambda: model(data))
    assert str(error.value).startswith(message)


def test_infinity_in_data_names_the_rule_that_leaves_its_reader_float():
    model = inserted()
    broken_norm(model)
    with pytest.raises(UserError, match=r"if it belongs there \(a mask\), leave it float with .*'large', act: off"):
        calibrate(model, lambda: model(LARGE))


def test_nan_in_a_weight_that_nothing_passes_names_its_quantizer():
    model = inserted(act=False)
    broken_weight(model)
    with pytest.raises(UserError, match=r"calibrating 'large\.weight_quantizer': holds NaN or infinity"):
        calibrate(model, lambda: model(LARGE / 4))


def test_an_error_of_the_data_keeps_its_own_words():
    def no_data() -> None:
        raise UserError("data.root: no such folder")

    with pytest.raises(UserError) as error:
        calibrate(inserted(), no_data)
    assert str(error.value) == "data.root: no such folder"


def test_after_an_error_it_can_be_calibrated_with_better_data():
    model = inserted()
    with pytest.raises(UserError):
        calibrate(model, lambda: [model(LARGE), model(LARGE * torch.nan)])
    assert not any(q.observing or q._forward_hooks or q._forward_pre_hooks for _, q in named_quantizers(model))
    calibrate(model, lambda: model(LARGE))
    assert model(LARGE).isfinite().all()


def test_modes_statistics_random_numbers_gradients_and_metrics_are_left_alone():
    model = inserted().train()
    model.norm.eval()  # frozen
    model.metric.update(3.0)
    own = {name for name, q in named_quantizers(model)}
    before = {k: v.clone() for k, v in model.state_dict().items() if k.rpartition(".")[0] not in own}
    modes, random = [m.training for m in model.modules()], torch.get_rng_state()
    calibrate(model, lambda: model(LARGE))
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items()) and "norm.running_mean" in before
    assert all(p.grad is None for p in model.parameters())
    assert model.metric.compute() == 3.0
    assert not any(q._forward_hooks or q._forward_pre_hooks for _, q in named_quantizers(model))


def test_both_grids_of_a_cascade_are_calibrated_on_the_float_tensor():
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.coarse, self.fine = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.coarse(x) + self.fine(x)

    model = Fork()
    settings = {"act": {"bits": 4, "range": "minmax"}, "rules": {"r": {"match": "fine", "act": {"bits": 8}}}}
    apply_plan(model, make_plan(model, QuantPolicy.from_dict(settings), lambda: model(LARGE))[0])
    calibrate(model, lambda: model(LARGE))
    fine, coarse = model.coarse.input_quantizer
    assert fine.step().item() == pytest.approx(2 / fine.quant_max, rel=0.02)
    assert coarse.step().item() == pytest.approx(2 / coarse.quant_max, rel=0.02)


class Mixture(nn.Module):
    """Experts as a list of modules, of which the router uses those that it is told to."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.used = (0, 1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(self.experts[i](x * (i + 1)) for i in self.used)  # pyright: ignore


def test_an_expert_that_no_token_was_sent_to_starts_with_the_widest_range_of_the_others():
    model, x = Mixture().eval(), torch.randn(8, 4)
    settings = {"act": {"bits": 8, "range": "minmax"}, "sites": False}
    plan, _ = make_plan(model, QuantPolicy.from_dict(settings), lambda: model(x))
    apply_plan(model, plan)
    model.used = (0, 1)
    with pytest.warns(UserWarning, match=r"nothing passed through 'experts.2.input_quantizer'.*'experts.1"):
        calibrate(model, lambda: model(x))
    grids = [expert.input_quantizer for expert in model.experts]
    assert torch.equal(grids[2].scale, grids[1].scale) and grids[1].scale > grids[0].scale
    assert all(grid.on for grid in grids)


def test_so_does_the_scale_above_its_measured_block_scales():
    model, x = Mixture(16).eval(), torch.randn(8, 16)
    blocks = {"format": "e2m1", "bits": None, "granularity": "group", "group_size": 16, "scale": "e4m3"}
    act = {**blocks, "range": "minmax", "quantizer": "dynamic", "options": {"calibrated": True}}
    plan, _ = make_plan(model, QuantPolicy.from_dict({"act": act, "sites": False}), lambda: model(x))
    apply_plan(model, plan)
    model.used = (0, 1)
    with pytest.warns(UserWarning, match=r"nothing passed through 'experts.2.input_quantizer'.*'experts.1"):
        calibrate(model, lambda: model(x))
    assert model.experts[2].input_quantizer.scale == model.experts[1].input_quantizer.scale


def test_an_expert_that_is_called_with_no_tokens_has_a_grid_too():
    model = Mixture().eval()
    plan, _ = make_plan(model, QuantPolicy.from_dict({"act": {"bits": 8}}), lambda: model(torch.randn(0, 4)))
    assert plan.layers["experts.2"].input == ["experts.2.input"]


@pytest.mark.parametrize("shape", [(16, 512, 1024), (512, 16, 32, 32), (8, 192, 14, 14), (1, 3, 210, 420)], ids=str)
def test_the_sample_of_a_large_batch_holds_all_channels_and_columns_alike(shape):
    taken = spread_out(torch.arange(math.prod(shape)))
    assert len(taken) == len(taken.unique()) == SAMPLES_PER_BATCH
    for index, size in zip(torch.unravel_index(taken, shape), shape, strict=True):
        often = torch.bincount(index, minlength=size) / (SAMPLES_PER_BATCH / size)
        assert often.min() > 0.95 and often.max() < 1.05


def _loud_channels() -> Tensor:
    x = torch.randn(8, 128, 1024)
    x[..., [1, 10, 100, 333, 555, 1021]] *= 30
    return x


def _padded_convolution() -> Tensor:
    with torch.no_grad():
        return F.relu(nn.Conv2d(16, 16, 3, padding=1)(torch.rand(128, 16, 32, 32)))


@pytest.mark.parametrize("search", ["lsq", "mse"])
@pytest.mark.parametrize("make", [_loud_channels, _padded_convolution])
def test_a_large_batch_gets_the_range_that_all_of_its_values_give(make, search):
    torch.manual_seed(0)
    x, spec = make(), QuantSpec(bits=4, range=search).resolved(nonnegative=False, weight=False)
    sampled, whole = create(spec), create(spec)
    sampled.observe()
    sampled(x)
    sampled.calibrate()
    whole.calibrate(x)
    scales, noise = zip(*((q.scale.item(), (q(x) - x).square().sum().item()) for q in (sampled, whole)), strict=True)
    if search == "lsq":
        assert scales[0] == pytest.approx(scales[1], rel=0.01)
    else:  # few loud values make for many scales that are about as good
        assert noise[0] == pytest.approx(noise[1], rel=0.03)
