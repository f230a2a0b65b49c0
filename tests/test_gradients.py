"""Every quantizer against closed forms: the papers' formulas in numpy float64, element by element, written without the
code under test.

A formula gets `v = x / scale` and the incoming gradient `g`, and gives the level, d value / d x and d value / d scale
of each element; sums over the elements that share a scale are taken here, by shape. Inputs include exact ties and
zeros; the exact ends of the range, where conventions differ, have tests of their own.
"""

from itertools import pairwise

import numpy as np
import pytest
import torch

from qat import quantizers
from qat.grid.spec import QuantSpec

SHAPE = (4, 6, 8)


def int_level(v, low, high):
    return np.clip(np.round(v), low, high)  # numpy too rounds ties to even


def odd_level(v, low, high):
    return np.clip(2 * np.floor(v / 2) + 1, low, high)


def clipped_ste(v, g, low, high, level=int_level):
    return level(v, low, high), (v >= low) & (v <= high), np.zeros_like(v)


def lsq(v, g, low, high, level=int_level):
    q, inside = level(v, low, high), (v >= low) & (v <= high)
    return q, inside, np.where(v < low, low, np.where(v > high, high, q - v))


def pact(v, g, low, high):
    return int_level(v, low, high), (v >= low) & (v <= high), np.where(v >= high, high, np.where(v < low, low, 0))


def ewgs(v, g, low, high, delta=0.3, level=int_level):
    q, inside = level(v, low, high), (v >= low) & (v <= high)
    dx = inside * (1 + delta * np.sign(g) * (v - q) / (high - low))
    return q, dx, q - np.where(inside, dx * v, 0)


def dsq(v, g, low, high, k=2.5):
    q, inside = int_level(v, low, high), (v >= low) & (v <= high)
    cell = v - np.floor(v) - 0.5
    slope = k / 2 / np.tanh(k / 2) / np.cosh(k * cell) ** 2
    return q, inside * slope, lsq(v, g, low, high)[2]


def seq(end, level=int_level):
    def formula(v, g, low, high):
        q, inside = level(v, low, high), np.abs(v) < end
        return q, inside, np.where(inside, q - v, q)

    return formula


def seq_binary(v, g, low, high):
    sign = np.where(v >= 0, 1, -1)
    return sign, np.abs(v) <= 1, sign


def lsq_binary(v, g, low, high):
    return lsq(v, g, low, high, odd_level)


def ewgs_midrise(v, g, low, high):
    return ewgs(v, g, low, high, level=odd_level)


W, C, G = {}, {"granularity": "channel"}, {"granularity": "group", "group_size": 3}
CASES = [  # role, spec, formula
    pytest.param("weight", {"quantizer": "fixed", "bits": 3, **W}, clipped_ste, id="fixed-w3-tensor"),
    pytest.param("act", {"quantizer": "fixed", "bits": 3, "signed": False}, clipped_ste, id="fixed-u3"),
    pytest.param("weight", {"quantizer": "lsq", "bits": 3, **W}, lsq, id="lsq-w3-tensor"),
    pytest.param("weight", {"quantizer": "lsq", "bits": 3, **C}, lsq, id="lsq-w3-channel"),
    pytest.param("weight", {"quantizer": "lsq", "bits": 3, **G}, lsq, id="lsq-w3-group"),
    pytest.param("weight", {"quantizer": "lsq", "format": "binary", "bits": None, **C}, lsq_binary, id="lsq-binary"),
    pytest.param("act", {"quantizer": "lsq", "bits": 3, "signed": False}, lsq, id="lsq-u3"),
    pytest.param("weight", {"quantizer": "lsq_plus", "bits": 3, **C}, lsq, id="lsq_plus-w3-channel"),
    pytest.param("act", {"quantizer": "pact", "bits": 3, "signed": False}, pact, id="pact-u3"),
    pytest.param("act", {"quantizer": "pact", "bits": 3}, pact, id="pact-s3"),
    pytest.param("act", {"quantizer": "dorefa", "bits": 3, "signed": False}, clipped_ste, id="dorefa-u3"),
    pytest.param("weight", {"quantizer": "ewgs", "bits": 3, **W, "options": {"delta": 0.3}}, ewgs, id="ewgs-w3-tensor"),
    pytest.param(
        "weight",
        {"quantizer": "ewgs", "bits": 2, "format": "midrise", **G, "options": {"delta": 0.3}},
        ewgs_midrise,
        id="ewgs-midrise2-group",
    ),
    pytest.param(
        "act", {"quantizer": "ewgs", "bits": 2, "signed": False, "options": {"delta": 0.3}}, ewgs, id="ewgs-u2"
    ),
    pytest.param("weight", {"quantizer": "dsq", "bits": 3, **C, "options": {"start": 2.5}}, dsq, id="dsq-w3-channel"),
    pytest.param("act", {"quantizer": "dsq", "bits": 2, "signed": False, "options": {"start": 2.5}}, dsq, id="dsq-u2"),
    pytest.param(
        "weight", {"quantizer": "seq", "format": "ternary", "bits": None, **C}, seq(1.485), id="seq-ternary-channel"
    ),
    pytest.param(
        "weight",
        {"quantizer": "seq", "format": "midrise", "bits": 2, **G},
        seq(3.96, odd_level),
        id="seq-midrise2-group",
    ),
    pytest.param(
        "weight", {"quantizer": "seq", "format": "binary", "bits": None, **W}, seq_binary, id="seq-binary-tensor"
    ),
]
each = pytest.mark.parametrize(("role", "settings", "formula"), CASES)


def build(role, settings):
    """A quantizer whose scales are powers of two, so that ties are exact, and its scales spread over SHAPE."""
    spec = QuantSpec.from_dict(settings).resolved(nonnegative=False, weight=role == "weight")
    quantizer = quantizers.create(spec, torch.Size(SHAPE) if role == "weight" else None)
    quantizer.calibrate(torch.ones(SHAPE))
    shape = tuple(quantizer.scale.shape)
    scale = 2.0 ** (np.arange(np.prod(shape)) % 4 - 2).reshape(shape)
    with torch.no_grad():
        quantizer.scale.copy_(torch.tensor(scale))
    spread = {"tensor": lambda s: s, "channel": lambda s: s[:, None, None], "group": lambda s: np.repeat(s, 3, axis=1)}
    return quantizer, np.broadcast_to(spread[spec.granularity](scale), SHAPE)


def inputs(quantizer, scale, seed=0):
    """Random numbers on both sides of the range, exact ties, and zeros; never an exact end of the range."""
    rng = np.random.default_rng(seed)
    reach = 1.5 * max(quantizer.quant_max, 1)
    v = rng.uniform(-reach, reach, SHAPE)
    v.flat[::5] = np.floor(v.flat[::5]) + 0.5
    v.flat[::7] = 0
    on_end = (v == quantizer.quant_min) | (v == quantizer.quant_max)
    v[on_end] += 0.25
    return v * scale, rng.standard_normal(SHAPE)


def summed(elements, granularity):
    """Sums over the elements that share a scale."""
    if granularity == "group":
        return elements.reshape(4, 2, 3, 8).sum(2)
    return elements.sum((1, 2)) if granularity == "channel" else elements.sum().reshape(1)


def run(quantizer, x, g):
    x = torch.tensor(x, requires_grad=True)
    y = quantizer(x)
    y.backward(torch.tensor(g, dtype=y.dtype))
    return y.detach().numpy(), x.grad.numpy(), {n: p.grad.double().numpy() for n, p in quantizer.named_parameters()}


def factor(quantizer):
    """What each paper multiplies the gradient of a scale by."""
    if quantizer.spec.quantizer == "pact":
        return quantizer.quant_max**-2
    count = np.prod(SHAPE[1:]) if not quantizer.is_weight else np.prod(SHAPE) / quantizer.scale.numel()
    return (count * quantizer.quant_max) ** -0.5


@each
@pytest.mark.parametrize("seed", range(3))
def test_forward_and_gradients_are_the_closed_forms(role, settings, formula, seed):
    quantizer, scale = build(role, settings)
    x, g = inputs(quantizer, scale, seed)
    y, grad, learned = run(quantizer, x, g)
    level, dx, ds = formula(x / scale, g, quantizer.quant_min, quantizer.quant_max)
    np.testing.assert_array_equal(y, level * scale)
    np.testing.assert_allclose(grad, g * dx, rtol=1e-6, atol=1e-9)
    if "scale" in learned:
        expected = summed(g * ds, quantizer.spec.granularity) * factor(quantizer)
        np.testing.assert_allclose(learned["scale"], expected, rtol=1e-5, atol=1e-6)
    assert set(learned) == ({"scale"} if ds.any() else set())


@each
def test_at_the_ends_of_the_range_either_convention_will_do(role, settings, formula):
    quantizer, scale = build(role, settings)
    for end in (quantizer.quant_min, quantizer.quant_max):
        g = np.ones(SHAPE)
        y, grad, learned = run(quantizer, end * scale, g)
        np.testing.assert_array_equal(y, end * scale)
        sides = [formula(np.full(SHAPE, end + e), g, quantizer.quant_min, quantizer.quant_max) for e in (-1e-9, 1e-9)]
        _, dx, ds = (np.stack(parts) for parts in zip(*sides, strict=True))
        assert (dx.min(0) - 1e-6 <= grad).all() and (grad <= dx.max(0) + 1e-6).all()
        if "scale" in learned:
            sums = np.stack([summed(e, quantizer.spec.granularity) * factor(quantizer) for e in ds])
            assert (sums.min(0) - 1e-4 <= learned["scale"]).all() and (learned["scale"] <= sums.max(0) + 1e-4).all()
        quantizer.zero_grad()


def test_lsq_plus_learns_offset_and_scale():
    spec = QuantSpec(bits=3, quantizer="lsq_plus", symmetric=False, signed=False, narrow=False)
    quantizer = quantizers.create(spec)
    quantizer.calibrate(torch.tensor([-1.0, 1.0]))
    with torch.no_grad():
        quantizer.scale.fill_(0.25)
        quantizer.offset.fill_(-0.55)
    rng = np.random.default_rng(0)
    x, g = rng.uniform(-1.5, 2.5, SHAPE), rng.standard_normal(SHAPE)
    y, grad, learned = run(quantizer, x, g)
    zero_point = 2  # round(0.55 / 0.25)
    assert quantizer.zero_point.tolist() == [zero_point]
    code = np.round(x / 0.25) + zero_point
    below, above = x / 0.25 + zero_point < 0, x / 0.25 + zero_point > 7
    inside = ~below & ~above
    np.testing.assert_array_equal(y, (np.clip(code, 0, 7) - zero_point) * 0.25)
    np.testing.assert_array_equal(grad, g * inside)
    gs = (np.prod(SHAPE[1:]) * 7) ** -0.5
    ds = np.where(below, 0, np.where(above, 7, np.round(x / 0.25) - x / 0.25))
    np.testing.assert_allclose(learned["scale"], [(g * ds).sum() * gs], rtol=1e-5)
    np.testing.assert_allclose(learned["offset"], [(g * ~inside).sum() * gs], rtol=1e-5)


@pytest.mark.parametrize("narrow", [True, False])
def test_lsq_plus_weights_start_at_three_deviations(narrow):
    w = np.random.default_rng(0).normal(0.3, 1, (4, 96))
    spec = QuantSpec(bits=4, quantizer="lsq_plus", granularity="channel", signed=True, narrow=narrow)
    quantizer = quantizers.create(spec, torch.Size(w.shape))
    quantizer.calibrate(torch.tensor(w))
    mean, deviation = w.mean(1), w.std(1)
    reach = np.maximum(abs(mean - 3 * deviation), abs(mean + 3 * deviation))
    np.testing.assert_allclose(quantizer.scale.detach(), reach / (7 if narrow else 8), rtol=1e-5)


def test_pact_decay_is_that_of_alpha_under_sgd():
    spec = QuantSpec(bits=4, quantizer="pact", signed=False, narrow=False, options={"decay": 0.1})
    quantizer = quantizers.create(spec)
    quantizer.calibrate(torch.linspace(0, 3, 100))
    alpha = 15 * quantizer.scale.item()
    x = torch.tensor([0.5, 1.0, 10.0, 20.0])
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.05)
    quantizer(x).sum().backward()
    optimizer.step()
    assert 15 * quantizer.scale.item() == pytest.approx(alpha - 0.05 * (2 + 0.1 * alpha), rel=1e-5)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("bits", [2, 3])
def test_dorefa_weights_are_those_of_the_paper(bits, granularity):
    w, g = np.random.default_rng(0).normal(0, 1, (2, 4, 96))
    spec = QuantSpec(bits=bits, format="midrise", quantizer="dorefa", granularity=granularity)
    quantizer = quantizers.create(spec.resolved(nonnegative=False, weight=True), torch.Size(w.shape))
    quantizer.calibrate(torch.tensor(w))
    y, grad, _ = run(quantizer, w, g)
    t, steps = np.tanh(w), 2**bits - 1
    largest = abs(t).max() if granularity == "tensor" else abs(t).max(1, keepdims=True)
    q = np.round((t / (2 * largest) + 0.5) * steps) / steps
    np.testing.assert_allclose(y, largest * (2 * q - 1), rtol=1e-6)
    np.testing.assert_allclose(grad, g * (1 - t**2), rtol=1e-6)


def test_dorefa_binary_weights_are_their_mean_magnitude_with_sign():
    w, g = np.random.default_rng(0).normal(0, 1, (2, 4, 96))
    w[0, 0] = 0
    spec = QuantSpec(bits=1, format="binary", quantizer="dorefa").resolved(nonnegative=False, weight=True)
    quantizer = quantizers.create(spec, torch.Size(w.shape))
    quantizer.calibrate(torch.tensor(w))
    y, grad, _ = run(quantizer, w, g)
    np.testing.assert_allclose(y, abs(w).mean() * np.where(w >= 0, 1, -1), rtol=1e-6)
    np.testing.assert_array_equal(grad, g)


def test_dorefa_scale_follows_the_weights_in_training_only():
    spec = QuantSpec(bits=2, format="midrise", quantizer="dorefa").resolved(nonnegative=False, weight=True)
    quantizer, w = quantizers.create(spec, torch.Size((2, 2))), torch.tensor([[0.1, -0.2], [0.3, 0.4]])
    quantizer.calibrate(w)
    quantizer.eval()(2 * w)
    assert quantizer.scale.item() == pytest.approx(np.tanh(0.4) / 3)
    quantizer.train()(2 * w)
    assert quantizer.scale.item() == pytest.approx(np.tanh(0.8) / 3)


def test_dsq_slope_averages_to_one_and_hardens():
    spec = QuantSpec(bits=4, quantizer="dsq", options={"start": 1.0, "end": 8.0, "steps": 3}).resolved(
        nonnegative=False, weight=True
    )
    quantizer = quantizers.create(spec, torch.Size((10001,)))
    quantizer.calibrate(torch.ones(10001))
    with torch.no_grad():
        quantizer.scale.fill_(1.0)
    x, peaks = np.linspace(-3, 3, 10001), []
    for sharpness in (1.0, 2.0, 4.0, 8.0, 8.0):
        assert quantizer.sharpness.item() == pytest.approx(sharpness, rel=1e-5)
        _, grad, _ = run(quantizer, x, np.ones_like(x))
        assert np.mean(grad) == pytest.approx(1, abs=2e-3)
        peaks.append(grad.max())
    assert peaks[:4] == sorted(peaks[:4]) and peaks[3] == pytest.approx(4 / np.tanh(4), rel=1e-4)


def n2uq(v, widths, low):
    """Levels, slopes and the gradient of each width, by walking through the segments one by one."""
    ends = low + np.concatenate([[0], np.cumsum(widths)])
    level = low + sum((v >= (a + b) / 2).astype(float) for a, b in pairwise(ends))
    slope, along = np.zeros_like(v), np.zeros((len(widths), *v.shape))
    for i, a in enumerate(widths):
        here = (v > ends[i]) & (v <= ends[i + 1])
        slope[here] = 1 / a
        along[i][here] = -(v[here] - ends[i]) / a**2
        along[:i, here] = -1 / a
    return level, slope, along


@pytest.mark.parametrize("signed", [False, True])
def test_n2uq_learns_thresholds(signed):
    spec = QuantSpec(bits=3, quantizer="n2uq", signed=signed, narrow=False)
    quantizer = quantizers.create(spec)
    quantizer.calibrate(torch.ones(4))
    rng = np.random.default_rng(0)
    widths = rng.uniform(0.4, 1.8, 7)
    with torch.no_grad():
        quantizer.scale.fill_(0.5)
        quantizer.widths.copy_(torch.tensor(widths))
    widths = quantizer.widths.detach().double().numpy()
    x, g = rng.uniform(-4, 5, SHAPE), rng.standard_normal(SHAPE)
    y, grad, learned = run(quantizer, x, g)
    level, slope, along = n2uq(x / 0.5, widths, quantizer.quant_min)
    np.testing.assert_array_equal(y, level * 0.5)
    np.testing.assert_allclose(grad, g * slope, rtol=1e-6)
    gs = (np.prod(SHAPE[1:]) * quantizer.quant_max) ** -0.5
    np.testing.assert_allclose(learned["scale"], [(g * (level - slope * x / 0.5)).sum() * gs], rtol=1e-5)
    np.testing.assert_allclose(learned["widths"], (g * 0.5 * along).sum((1, 2, 3)) * gs, rtol=1e-4, atol=1e-6)


def test_a_value_on_a_threshold_of_n2uq_belongs_to_the_level_above_it():
    quantizer = quantizers.create(QuantSpec(bits=3, quantizer="n2uq", signed=False, narrow=False))
    quantizer.calibrate(torch.ones(4))
    assert quantizer.levels(quantizer.scale * torch.tensor([0.5, 1.5, 2.5, 6.5])).tolist() == [1, 2, 3, 7]


def test_n2uq_is_lsq_at_the_start():
    x, g = np.random.default_rng(0).uniform(-4, 5, (2, *SHAPE))
    results = []
    for name in ("lsq", "n2uq"):
        quantizer = quantizers.create(QuantSpec(bits=3, quantizer=name, signed=False, narrow=False))
        quantizer.calibrate(torch.tensor(x))
        y, grad, learned = run(quantizer, x, g)
        results.append((y, grad, learned["scale"]))
    for mine, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5)


@pytest.mark.parametrize(
    ("format", "bits", "start"),
    [
        pytest.param("ternary", None, lambda w: 2 / 3 * abs(w).max(1), id="ternary"),
        pytest.param("midrise", 2, lambda w: abs(w).max(1) / 4, id="two-bits"),
        pytest.param("binary", None, lambda w: abs(w).mean(1), id="binary"),
    ],
)
def test_seq_starts_where_its_paper_says(format, bits, start):
    w = np.random.default_rng(0).normal(0, 1, (4, 96))
    spec = QuantSpec(bits=bits, format=format, quantizer="seq", granularity="channel", range="percentile")
    quantizer = quantizers.create(spec.resolved(nonnegative=False, weight=True), torch.Size(w.shape))
    quantizer.calibrate(torch.tensor(w))
    np.testing.assert_allclose(quantizer.scale.detach(), start(w), rtol=1e-6)
