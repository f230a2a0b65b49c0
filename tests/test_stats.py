"""Statistics of quantizers: against closed forms, in one pass, without a trace."""

import math

import pytest
import torch
from torch import Tensor, nn

import qat
from qat.errors import UserError
from qat.grid.formats import FLOATS
from qat.grid.spec import QuantSpec
from qat.insert import apply_plan
from qat.measure.health import Health
from qat.measure.stats import QuantizerStats, Tally, quantizer_stats, summarize, weight_stats
from qat.planning.planner import make_plan
from qat.policies.policy import QuantPolicy
from qat.quantizers import create

POLICY = {"weight": {"bits": 4, "granularity": "channel"}, "act": {"bits": 8}}


class Fork(nn.Module):
    """Two layers read one tensor, and their outputs are added."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(8, 4)
        self.right = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.right(x)


def quantized(model: nn.Module, x: Tensor, **policy) -> nn.Module:
    qat.quantize(model, {**POLICY, **policy}, x)
    return model


def linear(x: Tensor, **policy) -> nn.Module:
    torch.manual_seed(0)
    return quantized(nn.Sequential(nn.Linear(x.shape[1], 4)), x, **policy)


def by_name(stats: list[QuantizerStats]) -> dict[str, QuantizerStats]:
    return {s.name: s for s in stats}


def test_sqnr_is_the_ratio_of_the_sums_of_squares_over_all_batches():
    batches = [torch.randn(5, 8), 3 * torch.randn(7, 8)]
    model = linear(torch.cat(batches))
    stats = by_name(quantizer_stats(model, lambda: [model(b) for b in batches]))
    x = torch.cat(batches).double()
    error = x - model[0].input_quantizer(x.float()).detach().double()
    expected = 10 * math.log10(x.square().sum() / error.square().sum())
    assert stats["0.input_quantizer"].sqnr_db == pytest.approx(expected, abs=1e-4)


def test_sqnr_of_a_full_scale_uniform_input_is_six_decibels_a_bit():
    x = torch.linspace(-1, 1, 4096).view(-1, 8)
    model = linear(x, act={"bits": 6, "range": "minmax"})
    (stats,) = [s for s in quantizer_stats(model, lambda: model(x)) if s.role == "act"]
    # Uniform on +-31 steps: signal 31^2 / 3, noise 1 / 12 of a squared step.
    assert stats.sqnr_db == pytest.approx(10 * math.log10(31**2 / 3 * 12), abs=0.1)


def test_sqnr_of_values_on_the_grid_is_none():
    model = linear(torch.randn(4, 8), act={"bits": 8, "narrow": True})
    scale = model[0].input_quantizer.scale.detach()
    on_grid = torch.arange(-4, 4).float()[None] * scale
    stats = by_name(quantizer_stats(model, lambda: model(on_grid)))
    assert stats["0.input_quantizer"].sqnr_db is None
    assert stats["0.input_quantizer"].used_codes == 8 / 255


def test_a_constant_uses_one_code():
    model = linear(torch.randn(4, 8), act={"bits": 4, "narrow": True})
    stats = by_name(quantizer_stats(model, lambda: model(torch.full((3, 8), 0.7))))
    assert stats["0.input_quantizer"].used_codes == 1 / 15


@pytest.mark.parametrize("symmetric", [pytest.param(True, id="symmetric"), pytest.param(False, id="affine")])
def test_clip_rate_counts_values_that_round_beyond_the_grid(symmetric):
    x = torch.linspace(-1, 1, 64).view(8, 8)
    model = linear(x, act={"range": "minmax", "symmetric": symmetric})
    inside = by_name(quantizer_stats(model, lambda: model(x)))
    assert inside["0.input_quantizer"].clip_rate == 0
    outside = torch.zeros(8, 8)
    outside[0, :3] = torch.tensor([2.0, -2.0, 1.5])
    stats = by_name(quantizer_stats(model, lambda: model(outside)))
    assert stats["0.input_quantizer"].clip_rate == 3 / 64


@pytest.mark.parametrize(
    ("format", "bits", "within", "beyond"),
    [  # just short of half the last step, and just beyond it
        pytest.param("int", 4, 7.49, 7.51, id="int4"),
        pytest.param("midrise", 2, 3.99, 4.01, id="midrise2"),
        pytest.param("ternary", None, 1.49, 1.51, id="ternary"),
        pytest.param("e4m3", None, 463, 465, id="e4m3"),
        pytest.param("e5m2", None, 61400, 61500, id="e5m2"),
        pytest.param("e2m3", None, 7.74, 7.76, id="e2m3"),
        pytest.param("e2m1", None, 6.99, 7.01, id="e2m1"),
    ],
)
def test_values_are_clipped_from_half_the_last_step_on(format, bits, within, beyond):
    spec = QuantSpec(bits=bits, format=format, quantizer="fixed").resolved(nonnegative=False, weight=True)
    quantizer, tally = create(spec, torch.Size((8,))), Tally()
    tally.add("w", quantizer, torch.tensor([0, 1, within, -within, beyond, -beyond, 3 * beyond, -within]))
    assert tally.clipped == 3


@pytest.mark.parametrize("format", ["e4m3", "e5m2", "e3m2", "e2m3", "e2m1"])
def test_the_two_zeros_of_a_floating_point_format_are_one_code(format):
    spec = QuantSpec(bits=None, format=format, quantizer="fixed").resolved(nonnegative=False, weight=True)
    quantizer, tally = create(spec, torch.Size((4,))), Tally()
    tally.add("w", quantizer, torch.tensor([1e-9, -1e-9, 0.0, -0.0]))
    assert Health.of(summarize("w", quantizer, tally, ("w",)), len(tally.codes)).findings() == ["all codes are equal"]
    magnitudes = torch.tensor(FLOATS[format].magnitudes)
    tally.add("w", quantizer, torch.cat([magnitudes, -magnitudes]))
    assert summarize("w", quantizer, tally, ("w",)).used_codes == 1


@pytest.mark.parametrize("scale", ["float32", "float16", "pow2"])
def test_a_scale_is_at_the_floor_of_its_format(scale):
    spec = QuantSpec(scale=scale, quantizer="fixed").resolved(nonnegative=False, weight=True)
    quantizer, tally = create(spec, torch.Size((3,))), Tally()
    x = torch.tensor([0.0, 1e-8, 2e-8])

    def findings():
        tally.add("w", quantizer, x)
        return Health.of(summarize("w", quantizer, tally, ("w",)), len(tally.codes)).findings()

    quantizer.scale.fill_(-1)
    assert any(finding.startswith("a scale is at its floor") for finding in findings())
    quantizer.scale.fill_(1e-3)
    assert not any("floor" in finding for finding in findings())


def test_block_scales_may_be_as_small_as_blocks_are():
    blocks = {"granularity": "group", "group_size": 4, "scale": "e8m0"}
    spec = QuantSpec(bits=None, format="e2m1", quantizer="fixed", **blocks).resolved(nonnegative=False, weight=True)
    quantizer, tally = create(spec, torch.Size((2, 4))), Tally()
    x = torch.randn(2, 4) * 1e-12
    quantizer.calibrate(x)
    tally.add("w", quantizer, x)
    assert not Health.of(summarize("w", quantizer, tally, ("w",)), len(tally.codes)).findings()


@pytest.mark.parametrize(
    "grid",
    [
        pytest.param({"granularity": "tensor"}, id="tensor"),
        pytest.param({"granularity": "channel"}, id="channel"),
        pytest.param({"granularity": "group", "group_size": 4}, id="group"),
    ],
)
def test_weight_statistics_need_no_data_and_agree_with_those_of_a_pass(grid):
    x = torch.randn(4, 8)
    model = linear(x, weight={"bits": 4, **grid})
    (stats,) = weight_stats(model)
    assert [stats] == [s for s in quantizer_stats(model, lambda: model(x)) if s.role == "weight"]
    weight, scale = model[0].weight.detach(), model[0].weight_quantizer.scale.detach()
    error = weight - model[0].quantized_weight().detach()
    assert stats.sqnr_db == pytest.approx(10 * (weight.square().sum() / error.square().sum()).log10().item(), abs=1e-4)
    assert (stats.scale_min, stats.scale_max) == (scale.min().item(), scale.max().item())
    assert stats.scale_mean == pytest.approx(scale.mean().item())


def test_a_shared_quantizer_appears_once_under_its_first_reader():
    x = torch.randn(4, 8)
    model = quantized(Fork(), x)
    stats = by_name(quantizer_stats(model, lambda: model(x)))
    assert stats["left.input_quantizer"].readers == ("left", "right")
    assert stats["left.input_quantizer"].layer == "left"
    assert "right.input_quantizer" not in stats
    assert stats["add_0.input_quantizer_1"].layer == "add_0"


def test_two_grids_in_a_row_are_told_apart():
    x = torch.randn(4, 8)
    rules = {"coarse": {"match": "right", "act": {"bits": 4}}}
    model = quantized(Fork(), x, rules=rules)
    stats = by_name(quantizer_stats(model, lambda: model(x)))
    assert stats["right.input_quantizer.1"].bits == 4
    assert stats["left.input_quantizer"].readers == ("left", "right")


def test_a_pass_leaves_no_trace():
    x = torch.randn(4, 8)
    model = quantized(Fork(), x)
    model.train()
    model.right.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = []
    quantizer_stats(model, lambda: modes.append((model.training, torch.is_grad_enabled(), model(x).requires_grad)))
    assert modes == [(False, False, False)]
    assert model.training and model.left.training and not model.right.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_hooks_go_even_if_the_pass_fails():
    x = torch.randn(4, 8)
    model = quantized(Fork(), x)
    with pytest.raises(ZeroDivisionError):
        quantizer_stats(model, lambda: 1 // 0)
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert model.training


def test_quantizers_that_nothing_passes_are_left_out():
    x = torch.randn(4, 8)
    model = quantized(Fork(), x)
    names = [s.name for s in quantizer_stats(model, lambda: model.left(x))]
    assert names == ["left.input_quantizer", "left.weight_quantizer", "right.weight_quantizer"]


@pytest.mark.parametrize("bad", [pytest.param(math.nan, id="nan"), pytest.param(math.inf, id="infinity")])
def test_values_without_a_code_are_an_error_that_names_the_quantizer(bad):
    model = linear(torch.randn(4, 8))
    with pytest.raises(UserError, match=r"'0\.input_quantizer'.*NaN or infinity"):
        quantizer_stats(model, lambda: model(torch.full((2, 8), bad)))


def test_an_uncalibrated_model_is_an_error():
    x = torch.randn(4, 8)
    model = Fork()
    apply_plan(model, make_plan(model, QuantPolicy.from_dict(POLICY), lambda: model(x))[0])
    with pytest.raises(UserError, match=r"'left\.weight_quantizer'.*calibrate"):
        weight_stats(model)
    with pytest.raises(UserError, match=r"qat\.calibrate\.calibrate\(model, run\)"):
        quantizer_stats(model, lambda: model(x))
