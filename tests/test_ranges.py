"""Range estimators: each does what its formula says, and no numbers make a grid that has no zero, or no scale."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qat.grid import ranges
from qat.grid.functional import SCALE_FLOOR, levels, values
from qat.grid.scales import snap
from qat.grid.spec import QuantSpec

INT8 = QuantSpec(8, signed=True, narrow=False)
UINT8 = QuantSpec(8, signed=False)
AFFINE = QuantSpec(8, symmetric=False, signed=False)
GRIDS = {
    "int8": INT8,
    "int4-narrow": QuantSpec(4, signed=True, narrow=True),
    "uint8": UINT8,
    "uint2-affine": QuantSpec(2, symmetric=False, signed=False),
    "int8-affine": QuantSpec(8, symmetric=False, signed=True, narrow=False),
    "uint1-affine": QuantSpec(1, symmetric=False, signed=False),
    "int16": QuantSpec(16, signed=True, narrow=False),
    "ternary": QuantSpec(None, "ternary", signed=True),
    "binary": QuantSpec(None, "binary", signed=True),
    "midrise2": QuantSpec(2, "midrise", signed=True),
    "e4m3": QuantSpec(None, "e4m3", signed=True),
    "e2m1": QuantSpec(None, "e2m1", signed=True),
    "int8-pow2": QuantSpec(8, signed=True, narrow=False, scale="pow2"),
    "uint8-affine-pow2": QuantSpec(8, signed=False, symmetric=False, scale="pow2"),
    "mxfp4": QuantSpec(None, "e2m1", granularity="group", group_size=4, scale="e8m0"),
    "nvfp4": QuantSpec(None, "e2m1", granularity="group", group_size=4, scale="e4m3"),
}
each_grid = pytest.mark.parametrize("spec", [pytest.param(s, id=n) for n, s in GRIDS.items()])
each_range = pytest.mark.parametrize("name", ranges.ESTIMATORS)

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
ROWS = hnp.arrays(
    "float32", st.tuples(st.integers(1, 3), st.integers(1, 12)), elements=FINITE | st.floats(-2, 2, width=32)
)


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def on_grid(x, low, high, spec):
    """`x` on the grid that covers the interval, and whether zero is on it."""
    scale, zero_point = ranges.scale_and_zero_point(low, high, spec)
    scale, zero = snap(scale, spec)[:, None], zero_point[:, None]
    return values(levels(x, scale, spec.quant_min - zero, spec.quant_max - zero, spec.rounding), scale, x.dtype)


def check_grid(low, high, spec):
    scale, zero_point = ranges.scale_and_zero_point(low, high, spec)
    acting = snap(scale, spec)
    for s in (scale, acting):
        assert s.dtype == torch.float32 and s.isfinite().all() and (s > 0).all()
    assert zero_point.dtype == torch.int32
    if spec.symmetric:
        assert not zero_point.any()
    assert ((spec.quant_min <= zero_point) & (zero_point <= spec.quant_max)).all()
    if spec.format not in ("binary", "midrise"):
        assert not on_grid(torch.zeros(len(low), 1), low, high, spec).any()


@each_range
@each_grid
@settings(max_examples=6, deadline=None)
@given(x=ROWS)
@example(x=[[0.0, 0.0, 0.0], [1.0, -2.0, 3.0]])
@example(x=[[5.0]])
@example(x=[[-7.0, -7.0, -7.0]])
@example(x=[[3.4e38, -3.4e38], [0.0, 0.0]])
@example(x=[[1e-45, -1e-45], [1e-38, 0.0]])
@example(x=[[1e-12, 2e-12]])
def test_any_finite_numbers_give_a_grid_with_a_positive_scale_and_an_exact_zero(spec, name, x):
    x = torch.as_tensor(x)
    low, high = ranges.ESTIMATORS[name](x, spec)
    assert low.shape == high.shape == (len(x),)
    assert (low <= 0).all() and (high >= 0).all()
    assert low.isfinite().all() and high.isfinite().all()
    check_grid(low, high, spec)


def test_minmax_of_a_symmetric_grid_is_the_largest_magnitude_and_clips_nothing():
    x = numbers(5, 100)
    spec = QuantSpec(8, signed=True, narrow=True)
    scale, _ = ranges.scale_and_zero_point(*ranges.minmax(x, spec), spec)
    assert torch.equal(scale, x.abs().amax(1) / 127)


@pytest.mark.parametrize("spec", [AFFINE, GRIDS["int8-affine"], INT8, GRIDS["int16"]], ids=["u8a", "s8a", "s8", "s16"])
def test_minmax_leaves_no_error_above_one_step(spec):
    x = numbers(5, 100) + 0.7
    error = (on_grid(x, *ranges.minmax(x, spec), spec) - x).abs().amax(1)
    step, _ = ranges.scale_and_zero_point(*ranges.minmax(x, spec), spec)
    # Half of it by rounding to the grid, half by rounding the zero point.
    assert (error <= step * (0.5 if spec.symmetric else 1) * (1 + 1e-3)).all()


def test_an_unsigned_grid_spends_nothing_on_negative_values():
    scale, _ = ranges.scale_and_zero_point(torch.tensor([-9.0]), torch.tensor([2.55]), UINT8)
    assert scale.item() == pytest.approx(0.01)


def test_a_full_range_grid_uses_its_lowest_code():
    scale, _ = ranges.scale_and_zero_point(torch.tensor([-128.0]), torch.tensor([1.0]), INT8)
    assert scale.item() == 1


@pytest.mark.parametrize("amax", [1.0, 0.9999999, 2.0, 6.0, 7.999, 448.0, 1e-20])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    "spec", [GRIDS["mxfp4"], QuantSpec(8, signed=True, granularity="group", group_size=4, scale="e8m0")]
)
def test_a_microscaling_scale_is_set_by_the_largest_magnitude_of_either_sign(spec, sign, amax):
    x = torch.tensor([[amax * sign, amax * 0.1]])
    scale, _ = ranges.scale_and_zero_point(*ranges.minmax(x, spec), spec)
    exponent = math.frexp(x.abs().max().item())[1] - 1 - {4: 2, 8: 6}[spec.width]
    assert snap(scale, spec).item() == 2.0**exponent


def test_an_affine_grid_s_zero_is_where_the_scale_that_is_stored_puts_it():
    scale, zero_point = ranges.scale_and_zero_point(
        torch.tensor([-1.0]), torch.tensor([2.0]), GRIDS["uint8-affine-pow2"]
    )
    stored = snap(scale, GRIDS["uint8-affine-pow2"])
    assert stored.item() != scale.item() and zero_point.item() == round(1 / stored.item())


def test_rows_of_zeros_take_the_largest_scale_of_the_others_or_one():
    x = torch.tensor([[0.0, 0.0], [1.0, -127.0], [3.0, 2.0]])
    scale, _ = ranges.scale_and_zero_point(*ranges.minmax(x, GRIDS["int4-narrow"]), GRIDS["int4-narrow"])
    assert scale[0] == scale[1] > scale[2]
    assert ranges.scale_and_zero_point(torch.zeros(2), torch.zeros(2), AFFINE)[0].tolist() == [1, 1]


def test_tiny_rows_are_raised_to_the_floor_of_learned_scales_but_block_scales_are_not():
    low, high = torch.tensor([0.0]), torch.tensor([1e-12])
    assert ranges.scale_and_zero_point(low, high, INT8)[0].item() == pytest.approx(SCALE_FLOOR)
    assert ranges.scale_and_zero_point(low, high, GRIDS["mxfp4"])[0].item() == pytest.approx(1e-12 / 4)


@pytest.mark.parametrize("count", [1, 2, 3, 10, 100])
def test_percentile_of_few_values_is_minmax(count):
    x = numbers(3, count)
    assert all(map(torch.equal, ranges.percentile(x, INT8), ranges.minmax(x, INT8)))


@pytest.mark.parametrize(
    ("count", "share", "each"), [(100_000, 0.99, 500), (60_000, 0.9999, 3), (20_000, 0.9999, 1), (9_000, 0.9999, 0)]
)
def test_percentile_leaves_out_the_share_it_says(count, share, each):
    x = (torch.randperm(count, generator=torch.Generator().manual_seed(0)) - count // 2).float()[None]
    low, high = ranges.percentile(x, INT8, share)
    assert ((x < low).sum().item(), (x > high).sum().item()) == (each, each)


@each_grid
@settings(max_examples=15, deadline=None)
@given(x=hnp.arrays("float32", (2, 9), elements=st.floats(-3, 3, width=32)), power=st.sampled_from([0, 60, -60]))
def test_mse_is_the_best_of_its_candidates_row_by_row(spec, x, power):
    x = torch.from_numpy(x) * 2.0**power
    if spec.scale == "e4m3" or (power < 0 and spec.scale != "e8m0"):
        return  # rows share a tensor scale, or all candidates stand on the floor
    x = x[x.abs().amax(1) > 2.0 ** (power - 6)]
    if not len(x):
        return
    low, high = ranges.minmax(x, spec)

    def errors(low, high):
        return ((on_grid(x, low, high, spec).double() - x.double()) / 2.0**power).square().sum(1)

    found = errors(*ranges.mse(x, spec))
    for step in range(1, 65):
        assert (found <= errors(low * (step / 64), high * (step / 64)) * (1 + 1e-4) + 1e-9).all()


def test_mse_clips_outliers_where_codes_are_few_and_does_not_where_they_are_many():
    x = torch.cat([numbers(1, 4000), torch.tensor([[12.0]])], 1)
    assert ranges.mse(x, QuantSpec(3, signed=True))[1].item() < 6
    assert ranges.mse(x, GRIDS["int16"])[1].item() == 12


@each_grid
def test_lsq_starts_at_twice_the_mean_magnitude_over_the_root_of_the_highest_code(spec):
    x = numbers(4, 50) + 1
    scale, _ = ranges.scale_and_zero_point(*ranges.lsq(x, spec), spec)
    if spec.symmetric and spec.scale != "e8m0":
        torch.testing.assert_close(scale, 2 * x.abs().mean(1) / spec.quant_max**0.5)
    if not spec.symmetric:
        half = (spec.quant_max - spec.quant_min) / 2
        reach = 2 * (x - x.mean(1, True)).abs().mean(1) * half**0.5
        torch.testing.assert_close(scale, 2 * reach / (2 * half), rtol=0.2, atol=0)


def entropy_calibration(x, bins, codes):
    """Migacz's algorithm as on his slides, on |x|, one threshold per bin: KL divergences by threshold."""
    counts = torch.histc(x.abs(), bins, 0, x.abs().max().item()).tolist()
    result = {}
    for i in range(codes, bins + 1, codes):  # where every code takes the same number of bins
        p = counts[:i]
        p[-1] += sum(counts[i:])
        q, width = [0.0] * i, i // codes
        for k in range(codes):
            part = counts[k * width : (k + 1) * width]
            share = sum(part) / max(sum(c > 0 for c in part), 1)
            q[k * width : (k + 1) * width] = [share if c else 0.0 for c in part]
        total_p, total_q = sum(p), sum(q)
        result[i] = sum(
            a / total_p * math.log((a / total_p) / max(b / total_q, 1e-9)) for a, b in zip(p, q, strict=True) if a
        )
    return result


def test_kl_finds_the_threshold_of_entropy_calibration():
    x = numbers(1, 200_000).abs()
    x = torch.cat([x, torch.full((1, 20), 16.0)], 1)
    spec = QuantSpec(4, signed=False)
    expected = entropy_calibration(x, ranges.BINS, 16)
    best = min(expected, key=expected.__getitem__) / ranges.BINS * 16
    assert ranges.kl(x, spec)[1].item() == pytest.approx(best, rel=0.15)
    assert best < 8  # the outliers are clipped


def test_kl_counts_outliers_at_the_end_of_what_is_kept_and_not_in_what_the_grid_leaves_of_it(monkeypatch):
    monkeypatch.setattr(ranges, "BINS", 4)
    counts, centres = torch.tensor([[4.0, 2.0, 1.0, 3.0]]), torch.tensor([[0.5, 1.5, 2.5, 3.5]])
    found = ranges._divergence(
        counts, centres, *torch.tensor([1.0, 0.0, 1.0]).view(3, 1, 1), QuantSpec(1, signed=False)
    )
    assert found.item() == pytest.approx(sum(p * math.log(p / q) for p, q in ((4 / 10, 4 / 6), (6 / 10, 2 / 6))))


def test_kl_ignores_zeros_and_treats_rows_alone(monkeypatch):
    x = numbers(1, 20_000).relu()
    with_zeros = torch.cat([x, torch.zeros(1, 200_000)], 1)
    assert torch.equal(ranges.kl(x, UINT8)[1], ranges.kl(with_zeros, UINT8)[1])
    monkeypatch.setattr(ranges, "ROWS", 2)
    rows = numbers(5, 40)
    together = ranges.kl(rows, INT8)
    assert torch.equal(together[1][-1:], ranges.kl(rows[-1:], INT8)[1])


@each_range
def test_a_default_dtype_changes_no_range(name):
    rows = numbers(3, 500)
    expected = ranges.ESTIMATORS[name](rows, INT8)
    for dtype in (torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            found = ranges.ESTIMATORS[name](rows, INT8)
        finally:
            torch.set_default_dtype(torch.float32)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
