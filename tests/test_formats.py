"""Every rounding equals its closed form or ml_dtypes, to the bit; codes and values are two views of one number."""

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qat.grid.formats import FLOATS, round_int, round_midrise
from qat.grid.functional import levels
from qat.grid.spec import QuantSpec
from qat.quantizers import create

REFERENCE = {
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
}
each_format = pytest.mark.parametrize("name", [pytest.param(n, id=n) for n in FLOATS])


def rounded(name, x):
    """`x` (float32 or float64, numpy) on the grid of a format."""
    return rounded_within(FLOATS[name], x.copy(), FLOATS[name].largest)


def check(name, x):
    largest = np.asarray(FLOATS[name].largest, dtype=x.dtype)
    expected = np.clip(x, -largest, largest).astype(REFERENCE[name])
    level = rounded(name, x)
    assert np.array_equal(level.numpy().view(f"i{x.itemsize}"), expected.astype(x.dtype).view(f"i{x.itemsize}"))
    codes = FLOATS[name].encode(level)
    assert np.array_equal(codes.numpy(), expected.view(np.uint8))
    assert np.array_equal(FLOATS[name].decode(codes).numpy().view("i4"), expected.astype(np.float32).view("i4"))


def bit_patterns(kind, rng):
    """float32 patterns: both signs of every exponent with telling or random mantissas, or subnormals."""
    if kind == "subnormals":
        mantissas = np.concatenate(
            [np.arange(1 << 10), (1 << 23) - 1 - np.arange(1 << 10), rng.integers(0, 1 << 23, 1000)]
        )
        bits = mantissas
    else:
        telling = [k << 18 for k in range(32)]  # all ties of formats with up to 4 mantissa bits, and their neighbours
        telling += [m + d for m in telling for d in (-1, 1) if 0 <= m + d < 1 << 23]
        mantissas = telling if kind == "ties" else rng.integers(0, 1 << 23, 200)
        bits = (np.arange(255)[:, None] << 23 | np.asarray(mantissas)[None]).ravel()
    bits = bits.astype(np.uint32)
    return np.concatenate([bits, bits | np.uint32(1 << 31)]).view(np.float32)


@each_format
def test_every_bfloat16_rounds_as_in_ml_dtypes(name):
    x = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)
    check(name, x[np.isfinite(x)])


@each_format
@pytest.mark.parametrize("kind", ["subnormals", "ties", "random"])
def test_every_exponent_of_float32_rounds_as_in_ml_dtypes(name, kind):
    check(name, bit_patterns(kind, np.random.default_rng(0)))


@each_format
def test_around_every_boundary_float32_rounds_as_in_ml_dtypes(name):
    values = np.array(FLOATS[name].magnitudes, np.float32)
    points = np.concatenate([values, (values[1:] + values[:-1]) / 2])
    x = np.concatenate([points, np.nextafter(points, np.float32(0)), np.nextafter(points, np.float32(1e9))])
    check(name, np.concatenate([x, -x]))


@each_format
def test_float64_is_rounded_once(name):
    values = np.array(FLOATS[name].magnitudes)  # ml_dtypes goes through float32, which makes ties of what is near one
    middles = (values[1:] + values[:-1]) / 2
    assert np.array_equal(rounded(name, np.nextafter(middles, 0)).numpy(), values[:-1])
    assert np.array_equal(rounded(name, np.nextafter(middles, 1e9)).numpy(), values[1:])
    assert np.array_equal(rounded(name, middles).numpy(), values[(np.arange(len(middles)) + 1) // 2 * 2])


@each_format
@settings(max_examples=50, deadline=None)
@given(x=hnp.arrays(np.float32, 20, elements=st.floats(width=32, allow_nan=False, allow_infinity=False)))
def test_any_float32_rounds_as_in_ml_dtypes(name, x):
    check(name, x)


@each_format
def test_all_codes_survive_decoding_and_encoding(name):
    magnitudes = len(FLOATS[name].magnitudes)
    codes = torch.cat([torch.arange(magnitudes), torch.arange(magnitudes) + 2 ** (FLOATS[name].bits - 1)]).to(
        torch.uint8
    )
    assert torch.equal(FLOATS[name].encode(FLOATS[name].decode(codes)), codes)


@each_format
def test_largest_and_smallest_are_those_of_ml_dtypes(name):
    info = ml_dtypes.finfo(REFERENCE[name])
    assert FLOATS[name].largest == float(info.max)
    assert FLOATS[name].smallest == float(info.smallest_subnormal)
    assert FLOATS[name].bits == info.bits


def rounded_within(rounding, x, limit: float, low: float | None = None) -> torch.Tensor:
    """Levels at scale 1."""
    bounds = torch.tensor([-limit if low is None else low]), torch.tensor([limit])
    return levels(torch.as_tensor(x), torch.ones(1), *bounds, rounding)


@pytest.mark.parametrize("name", ["int", "midrise", *FLOATS])
def test_nan_stays_and_infinity_saturates(name):
    rounding = {"int": round_int, "midrise": round_midrise}.get(name) or FLOATS[name]
    limit = torch.tensor([FLOATS[name].largest if name in FLOATS else 7.0])
    got = rounded_within(rounding, [float("nan"), float("inf"), -float("inf")], limit.item())
    assert got[0].isnan() and torch.equal(got[1:], torch.cat([limit, -limit]))


@each_format
def test_zeros_keep_their_sign(name):
    codes = FLOATS[name].encode(rounded(name, np.array([0.0, -0.0, -1e-30], np.float32)))
    assert codes.tolist() == [0, *[2 ** (FLOATS[name].bits - 1)] * 2]
    assert FLOATS[name].decode(codes).signbit().tolist() == [False, True, True]


ratios = hnp.arrays(
    np.float32, 30, elements=st.floats(-1e5, 1e5, width=32) | st.integers(-300, 300).map(lambda k: k / 2)
)


@given(x=ratios, bits=st.integers(1, 16), signed=st.booleans())
def test_int_rounds_half_to_even_and_clips(x, bits, signed):
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    got = rounded_within(round_int, x, float(high), float(low))
    assert np.array_equal(got.numpy(), np.clip(np.rint(x), low, high))


@given(x=ratios, bits=st.integers(1, 16))
def test_midrise_takes_the_nearest_odd_number_and_even_ones_go_up(x, bits):
    high = 2**bits - 1
    got = rounded_within(round_midrise, x, float(high)).numpy()
    assert (np.abs(got) % 2 == 1).all() and (np.abs(got) <= high).all()
    inside = np.abs(x) < high
    assert (np.abs(got - x)[inside] <= 1).all()
    even = inside & (x % 2 == 0)
    assert np.array_equal(got[even], x[even] + 1)


def test_binary_is_the_sign_and_that_of_zero_is_plus_one():
    x = torch.tensor([-5.0, -1e-45, -0.0, 0.0, 1e-45, 5.0])
    assert rounded_within(round_midrise, x, 1.0).tolist() == [-1, -1, 1, 1, 1, 1]


def test_ternary_has_its_thresholds_at_one_half():
    spec = QuantSpec(bits=None, format="ternary")
    assert (spec.quant_min, spec.quant_max) == (-1, 1)
    x = torch.tensor([-9.0, -0.51, -0.5, 0.0, 0.5, 0.51, 9.0])
    assert rounded_within(spec.rounding, x, 1.0).tolist() == [-1, -1, 0, 0, 0, 1, 1]


@pytest.mark.parametrize("format", ["int", "midrise"])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", range(2, 17))
def test_every_code_of_every_width_fits_its_type_and_comes_back(format, signed, bits):
    if format == "midrise" and not signed:
        return
    spec = QuantSpec(bits=bits, format=format, signed=signed, quantizer="fixed").resolved(
        nonnegative=not signed, weight=False
    )
    quantizer = create(spec)
    quantizer.calibrate(torch.tensor([-1.0, 1.0]))
    step = 2 if format == "midrise" else 1
    codes = torch.arange(spec.quant_min, spec.quant_max + 1, step)
    assert len(codes) == spec.size
    again = quantizer.quantize(quantizer.dequantize(codes.to(quantizer.code_dtype)))
    assert again.dtype == quantizer.code_dtype and torch.equal(again.long(), codes)
