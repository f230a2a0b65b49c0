"""Scale formats against independent numpy versions of their specifications, bit for bit."""

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qat.errors import UserError
from qat.grid.functional import TINY
from qat.grid.scales import POW2_FLOOR, SnapSTE, binade, power_of_two, snap
from qat.grid.spec import QuantSpec
from qat.quantizers import create

MX = {  # format: (settings, ml_dtypes element, emax of table 1, code units per element unit)
    "e4m3": ({"bits": None, "format": "e4m3"}, ml_dtypes.float8_e4m3fn, 8),
    "e5m2": ({"bits": None, "format": "e5m2"}, ml_dtypes.float8_e5m2, 15),
    "e3m2": ({"bits": None, "format": "e3m2"}, ml_dtypes.float6_e3m2fn, 4),
    "e2m3": ({"bits": None, "format": "e2m3"}, ml_dtypes.float6_e2m3fn, 2),
    "e2m1": ({"bits": None, "format": "e2m1"}, ml_dtypes.float4_e2m1fn, 2),
    "int8": ({"bits": 8, "signed": True, "narrow": False}, None, 0),
}


def blocks(kind, size, seed=0):
    """`[rows, 2 * size]` float32: two blocks in each row."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((64, 2, size)).astype(np.float32)
    if kind == "magnitudes":  # from 2^-100 to 2^100, row by row
        x *= np.exp2(np.linspace(-100, 100, 64, dtype=np.float32))[:, None, None]
    if kind == "powers":  # the largest magnitude is a power of two, or one ulp to either side of it
        top = np.exp2(rng.integers(-20, 20, (64, 2)).astype(np.float32))
        top = np.stack([top, np.nextafter(top, np.float32(0)), np.nextafter(top, np.float32(1e30))])[
            rng.integers(0, 3, 64), range(64)
        ]
        x = np.clip(x, -1, 1) * top[..., None] * np.float32(0.99)
        x[:, :, 3] = top * rng.choice([-1, 1], (64, 2)).astype(np.float32)
    if kind == "zeros":
        x[::2, 0] = 0
        x[::3, 1, 4:] = 0
    if kind == "negative":  # the lowest code of int8 would fit
        x = -np.abs(x)
    return x.reshape(64, 2 * size)


KINDS = ["normal", "magnitudes", "powers", "zeros", "negative"]
each_kind = pytest.mark.parametrize("kind", KINDS)


def microscaled(x, element, emax):
    """OCP Microscaling v1.0, section 6.3, with shared exponents as float8_e8m0fnu."""
    grouped = x.reshape(len(x), -1, 32)
    top = np.abs(grouped).max(-1, keepdims=True)
    exponent = np.frexp(np.where(top == 0, 1, top))[1] - 1 - emax
    shared = (
        np.exp2(np.clip(exponent, -126, 127).astype(np.float64)).astype(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    )
    ratio = grouped / shared
    if element is None:  # int8 elements are code / 64
        level = np.clip(np.rint(ratio * 64), -128, 127) / 64
    else:
        largest = float(ml_dtypes.finfo(element).max)
        level = np.clip(ratio, -largest, largest).astype(np.float32).astype(element).astype(np.float64)
    return (level * shared).astype(np.float32).reshape(x.shape)


def nvfp4(x):
    """Elements e2m1 in blocks of 16, block scales float8_e4m3fn, tensor scale amax / 6 / 448."""
    grouped = x.reshape(len(x), -1, 16)
    wanted = np.abs(grouped).max(-1, keepdims=True) / np.float32(6)
    wanted = np.where(wanted == 0, wanted.max(), wanted)
    tensor = wanted.max() / np.float32(448)
    stored = np.maximum(wanted / tensor, np.float32(2.0**-9)).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    scale = stored * tensor
    level = np.clip(grouped / scale, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    return (level * scale).reshape(x.shape)


def block_quantizer(name, size, scale, role, settings):
    changes = {"quantizer": "dynamic"} if role == "act" else {"quantizer": name}
    spec = QuantSpec(granularity="group", group_size=size, scale=scale, range="minmax", **settings, **changes)
    shape = torch.Size((64, 2 * size)) if role == "weight" else None
    return create(spec.resolved(nonnegative=False, weight=role == "weight"), shape)


ROLES = [("act", "dynamic"), ("weight", "dynamic"), ("weight", "minmax"), ("weight", "lsq"), ("weight", "fixed")]
each_role = pytest.mark.parametrize(("role", "name"), ROLES, ids=["-".join(r) for r in ROLES])


@each_kind
@each_role
@pytest.mark.parametrize("format", MX)
def test_microscaling_is_the_specifications_to_the_bit(format, role, name, kind):
    settings, element, emax = MX[format]
    quantizer, x = block_quantizer(name, 32, "e8m0", role, settings), blocks(kind, 32)
    quantizer.calibrate(torch.from_numpy(x))
    got = quantizer(torch.from_numpy(x)).detach().numpy()
    assert np.array_equal(got, microscaled(x, element, emax))


@each_role
@pytest.mark.parametrize("format", [format for format in MX if format != "int8"])  # whose scale is of other units
def test_blocks_below_the_smallest_power_have_it_for_a_scale(format, role, name):
    settings, element, emax = MX[format]
    x = blocks("normal", 32) * np.exp2(np.linspace(-125, -100, 64, dtype=np.float32))[:, None]
    quantizer = block_quantizer(name, 32, "e8m0", role, settings)
    quantizer.calibrate(torch.from_numpy(x))
    got = quantizer(torch.from_numpy(x)).detach().numpy()
    assert np.array_equal(got, microscaled(x, element, emax)) and got[8].any()


@each_kind
@each_role
def test_nvfp4_is_its_two_levels_to_the_bit(role, name, kind):
    settings = {"bits": None, "format": "e2m1"}
    quantizer, x = block_quantizer(name, 16, "e4m3", role, settings), blocks(kind, 16)
    quantizer.calibrate(torch.from_numpy(x))
    assert np.array_equal(quantizer(torch.from_numpy(x)).detach().numpy(), nvfp4(x))


def test_nvfp4s_tensor_scale_puts_the_largest_value_of_the_tensor_on_6_times_448():
    scale = torch.rand(1000, generator=torch.Generator().manual_seed(0)) / 6
    stored = snap(scale, QuantSpec(granularity="group", group_size=16, scale="e4m3"))
    assert stored.max().item() == pytest.approx(scale.max().item(), rel=1e-7)


@pytest.mark.parametrize("exponent", [-126, -100, 0, 100, 127])
def test_a_binade_starts_at_its_power_of_two(exponent):
    power = torch.tensor(2.0**exponent)
    below = torch.nextafter(power, torch.tensor(0.0))
    assert binade(power) == power and binade(power * 1.99) == power
    assert binade(below) == power / 2 if exponent > -126 else binade(below) == power


@pytest.mark.parametrize("value", [0.0, -1.0, 1e-45, 3.4e38, float("inf")])
@pytest.mark.parametrize("scale", ["float32", "pow2", "e8m0", "e4m3"])
def test_whatever_an_optimizer_does_to_a_scale_it_acts_as_a_positive_number(scale, value):
    block = {"granularity": "group", "group_size": 4} if scale in ("e8m0", "e4m3") else {}
    values = torch.tensor([value, 0.5]) if value != float("inf") or scale in ("pow2", "e8m0") else torch.tensor([0.5])
    acting = snap(values, QuantSpec(scale=scale, **block))
    assert (acting > 0).all() and acting.isfinite().all()


@settings(deadline=None)
@given(st.floats(POW2_FLOOR, 2.0**120, width=32))
def test_pow2_is_the_nearest_by_ratio(value):
    got = power_of_two(torch.tensor([value])).item()
    assert np.frexp(got)[0] == 0.5
    assert 2**-0.5 * (1 - 1e-6) <= value / got <= 2**0.5 * (1 + 1e-6)


def test_float32_scales_are_not_touched_above_their_floor():
    scale = torch.tensor([1e-7, 0.3, 1e30])
    assert torch.equal(snap(scale, QuantSpec()), scale)
    assert snap(torch.tensor([-0.1]), QuantSpec()).item() == TINY


@pytest.mark.parametrize("scale", ["float32", "pow2", "e8m0", "e4m3"])
def test_the_gradient_of_a_learned_scale_passes_its_format(scale):
    block = {"granularity": "group", "group_size": 4} if scale in ("e8m0", "e4m3") else {}
    learned = torch.tensor([-1.0, 0.3, 1e-12], requires_grad=True)
    SnapSTE.apply(learned, QuantSpec(scale=scale, **block)).backward(torch.tensor([1.0, 2.0, 3.0]))
    assert learned.grad.tolist() == [1, 2, 3]


@pytest.mark.parametrize(("size", "scale"), [(32, "e8m0"), (16, "e4m3")])
@pytest.mark.parametrize("name", ["lsq", "minmax", "fixed", "dynamic"])
def test_a_ragged_weight_is_refused_by_its_numbers(name, size, scale):
    spec = QuantSpec(None, "e2m1", granularity="group", group_size=size, scale=scale, quantizer=name)
    with pytest.raises(
        UserError, match=rf"group_size={size} does not divide the 50 input channels .*\(8, 50\).*ragged"
    ):
        create(spec, torch.Size((8, 50)))
