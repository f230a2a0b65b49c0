"""Grids that are measured as tensors pass: of the right vectors, with nothing to calibrate; and their configs."""

import pytest
import torch
from torch import nn

import qat
from qat.errors import UserError
from qat.grid.spec import QuantSpec
from qat.insert import named_quantizers
from qat.quantizers import create


def dynamic(shape=None, nonnegative=False, **settings):
    spec = QuantSpec.from_dict({"quantizer": "dynamic", "range": "minmax", **settings})
    return create(spec.resolved(nonnegative=nonnegative, weight=shape is not None), shape)


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


GROUP = {"granularity": "group", "group_size": 8}
GRIDS = {
    "tensor": {},
    "token": {"granularity": "token"},
    "token-affine": {"granularity": "token", "symmetric": False},
    "group": GROUP,
    "group-affine": {**GROUP, "symmetric": False, "bits": 4},
    "mxfp4": {**GROUP, "bits": None, "format": "e2m1", "scale": "e8m0"},
    "token-e4m3": {"granularity": "token", "bits": None, "format": "e4m3"},
}
each_grid = pytest.mark.parametrize("settings", [pytest.param(s, id=n) for n, s in GRIDS.items()])


@each_grid
def test_it_quantizes_at_once_and_keeps_quantizing_what_differs(settings):
    quantizer = dynamic(**settings)
    assert quantizer.on and quantizer.initialised
    for magnitude in (1e-3, 1.0, 1e3):
        x = numbers(2, 3, 16) * magnitude
        y = quantizer(x)
        assert not torch.equal(y, x)
        assert (y - x).abs().max() < x.abs().max() * 0.2
        assert torch.equal(y, quantizer.dequantize(quantizer.quantize(x), quantizer.grid(x)))


@each_grid
def test_its_state_never_changes(settings):
    quantizer = dynamic(**settings)
    before = {k: v.clone() for k, v in quantizer.state_dict().items()}
    quantizer.observe()
    x = numbers(4, 16)
    assert torch.equal(quantizer(x), x), "while others calibrate, it passes the float tensor on"
    quantizer.calibrate()
    quantizer(x)
    after = quantizer.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e30])
def test_a_tokens_codes_fill_the_grid_whatever_its_magnitude_and_its_neighbours(magnitude):
    quantizer = dynamic(granularity="token", signed=True)
    x = numbers(5, 16)
    x[2] *= magnitude
    scale, _, _ = quantizer.grid(x)
    assert scale.shape == (5, 1)
    expected = (x.abs().amax(1, keepdim=True) / 127).clamp_min(1e-8)
    torch.testing.assert_close(scale, expected, rtol=1e-2, atol=0)
    alone = torch.cat([quantizer(row[None]) for row in x])
    assert torch.equal(quantizer(x), alone)


def test_an_affine_token_spends_all_codes_between_its_extremes():
    x = numbers(50, 64) + 5
    quantizer = dynamic(granularity="token", symmetric=False)
    codes = quantizer.quantize(x)
    assert codes.dtype == torch.uint8
    x[:, 0] = -1  # else the range starts at zero
    codes = quantizer.quantize(x)
    assert (codes.amin(1) == 0).all() and (codes.amax(1) >= 254).all()


def test_groups_run_along_the_last_axis():
    x = numbers(3, 4, 16)
    x[..., 8:] *= 100
    scale, _, _ = dynamic(**GROUP).grid(x)
    assert scale.shape == (3, 4, 2, 1)
    assert (scale[..., 1, :] > 10 * scale[..., 0, :]).all()


@pytest.mark.parametrize("settings", [{}, {"granularity": "channel"}, GROUP, {**GROUP, "symmetric": False}])
def test_weights_are_measured_in_every_pass(settings):
    weight = numbers(6, 16, 3)
    quantizer = dynamic(shape=weight.shape, **settings)
    fixed = create(
        QuantSpec(quantizer="fixed", range="minmax", **settings).resolved(nonnegative=False, weight=True), weight.shape
    )
    for factor in (1, 3):
        fixed.calibrate(weight * factor)
        assert torch.equal(quantizer(weight * factor), fixed(weight * factor))


@each_grid
def test_all_values_pass_their_gradient_but_those_that_a_block_scale_saturates(settings):
    quantizer, x = dynamic(**settings), numbers(64, 16).requires_grad_()
    y = quantizer(x)
    y.backward(torch.full_like(y, 3.0))
    scale, _, high = quantizer.grid(x)
    if settings.get("scale") == "e8m0":
        clipped = ((quantizer.partition.grouped(x) / scale).abs() > high + 0.5).view_as(x)
        assert clipped.any() and torch.equal(x.grad, 3.0 * ~clipped)
    else:
        assert (x.grad == 3).all()


@each_grid
@pytest.mark.parametrize("shape", [(0, 16), (2, 0), (2, 0, 16)])
def test_nothing_is_quantized_to_nothing(settings, shape):
    assert dynamic(**settings)(torch.zeros(shape)).shape == shape


CALIBRATED = {
    **GROUP, "bits": None, "format": "e2m1", "scale": "e4m3", "options": {"calibrated": True},
}  # fmt: skip


def test_a_calibrated_scale_above_those_of_blocks_stays_and_mixes_no_samples():
    quantizer, measured = dynamic(**CALIBRATED), dynamic(**{**CALIBRATED, "options": None})
    x = numbers(6, 16)
    with pytest.raises(RuntimeError, match="no range yet"):
        quantizer(x)
    quantizer.observe()
    quantizer(x)
    quantizer.calibrate()
    assert quantizer.on and torch.equal(quantizer.scale, x.abs().amax().view(1) / 6 / 448)
    assert torch.equal(quantizer(x), measured(x)), "where the largest magnitude is that of calibration"
    small = x[:2] / 50
    assert torch.equal(quantizer(torch.cat([small, x]))[:2], quantizer(small))
    assert not torch.equal(quantizer(small), measured(small))
    assert torch.isclose(quantizer(4 * x).abs().max(), x.abs().max()), "what is larger saturates"
    fresh = dynamic(**CALIBRATED)
    fresh.load_state_dict(quantizer.state_dict())
    assert torch.equal(fresh(small), quantizer(small))


@pytest.mark.parametrize(
    ("settings", "shape"),
    [
        pytest.param({**CALIBRATED, "scale": "e8m0"}, None, id="no-scale-above"),
        pytest.param(CALIBRATED, torch.Size((4, 8)), id="weight"),
    ],
)
def test_a_calibrated_scale_is_for_activations_with_two_levels_of_them(settings, shape):
    with pytest.raises(UserError, match=r"options\.calibrated=true: is for activations with block scales of e4m3"):
        dynamic(shape=shape, **settings)


def test_zeros_and_nan_stay_what_they_are_beside_numbers():
    x = torch.tensor([[0.0] * 4, [1.0, float("nan"), -2.0, 3.0], [1.0, 2.0, 3.0, 4.0]])
    y = dynamic(granularity="token")(x)
    assert not y[0].any() and y[1].isnan().tolist() == [False, True, False, False]
    assert torch.equal(y[2:], dynamic(granularity="token")(x[2:]))


@pytest.mark.parametrize(
    ("settings", "shape", "message"),
    [
        pytest.param(
            {"granularity": "channel"}, None, "granularity=channel: an activation is measured by", id="channel"
        ),
        pytest.param({"granularity": "token"}, torch.Size((4, 8)), "token is for activations", id="weight-tokens"),
        pytest.param(GROUP, torch.Size((4, 12)), "does not divide the 12 input channels", id="ragged-weight"),
    ],
)
def test_granularities_that_make_no_sense_are_refused(settings, shape, message):
    with pytest.raises(UserError, match=message):
        dynamic(shape=shape, **settings)


@pytest.mark.parametrize("shape", [(4, 12), ()], ids=["ragged", "scalar"])
def test_a_ragged_activation_is_refused_by_its_shape(shape):
    with pytest.raises(UserError, match=r"group_size=8 does not divide axis -1 of an activation of shape \("):
        dynamic(**GROUP)(torch.zeros(shape))


def test_codes_alone_are_not_enough():
    quantizer = dynamic(granularity="token")
    with pytest.raises(ValueError, match=r"grid\(x\)"):
        quantizer.dequantize(quantizer.quantize(numbers(2, 4)))


def test_biases_stay_float_where_the_accumulators_scale_is_not_known_beforehand():
    model, x = nn.Sequential(nn.Linear(16, 4)).eval(), numbers(8, 16)
    policy = {
        "weight": {"granularity": "channel"},
        "act": {"quantizer": "dynamic", "granularity": "token", "range": "minmax"},
    }
    qat.quantize(model, policy, x)
    assert torch.equal(model[0].quantized_bias(), model[0].bias)


CONFIGS = ["mxfp8", "mxfp4", "mxint8", "nvfp4", "fp8", "dynamic"]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_trains_one_batch(name):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4)), numbers(8, 64)
    qat.quantize(model, name, x)
    assert len(list(named_quantizers(model))) == 4
    for layer in (model[0], model[2]):
        # A fp4 block whose largest magnitude is just below 8 saturates at 6.
        assert 0 < (layer.quantized_weight() - layer.weight).abs().max() < 0.26 * layer.weight.abs().max()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = model[0].weight.detach().clone()
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    assert loss.isfinite() and not torch.equal(before, model[0].weight)
