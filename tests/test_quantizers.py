"""The contract of a quantizer, for every file in `qat/quantizers` and every grid that suits it: a new file is tested
without touching this one.
"""

import copy
import io
import pickle
import warnings

import pytest
import torch

from qat import kernels, quantizers
from qat.errors import UserError
from qat.grid.spec import QuantSpec
from qat.kernels import dispatch
from qat.quantizers.lsq import LSQ

SHAPE = torch.Size((4, 8, 8))
GRIDS = {  # id: (role, axis, spec)
    "act-u8": ("act", 0, {"bits": 8, "signed": False}),
    "act-u2": ("act", 0, {"bits": 2, "signed": False}),
    "act-s4-pow2": ("act", 0, {"bits": 4, "scale": "pow2"}),
    "act-u4-affine": ("act", 0, {"bits": 4, "symmetric": False}),
    "act-s8-affine": ("act", 0, {"bits": 8, "signed": True, "symmetric": False}),
    "act-e4m3": ("act", 0, {"bits": None, "format": "e4m3"}),
    "act-s8-token": ("act", 0, {"bits": 8, "granularity": "token"}),
    "act-e2m1-group": ("act", 0, {"bits": None, "format": "e2m1", "granularity": "group", "group_size": 4}),
    "w8-tensor": ("weight", 0, {"bits": 8}),
    "w4-channel": ("weight", 0, {"bits": 4, "granularity": "channel"}),
    "w4-channel-affine": ("weight", 0, {"bits": 4, "granularity": "channel", "symmetric": False}),
    "w3-axis1-pow2": ("weight", 1, {"bits": 3, "granularity": "channel", "scale": "pow2"}),
    "w2-group": ("weight", 0, {"bits": 2, "granularity": "group", "group_size": 4}),
    "binary-channel": ("weight", 0, {"bits": None, "format": "binary", "granularity": "channel"}),
    "ternary-tensor": ("weight", 0, {"bits": None, "format": "ternary"}),
    "midrise2-group": ("weight", 1, {"bits": 2, "format": "midrise", "granularity": "group", "group_size": 2}),
    "midrise3-channel": ("weight", 0, {"bits": 3, "format": "midrise", "granularity": "channel"}),
    "e2m1-e8m0": (
        "weight",
        0,
        {"bits": None, "format": "e2m1", "granularity": "group", "group_size": 4, "scale": "e8m0"},
    ),
}


def make(name, grid, **changes):
    """A quantizer that has not seen anything yet."""
    role, axis, settings = GRIDS[grid]
    spec = QuantSpec.from_dict({"range": "lsq", **settings, "quantizer": name, **changes})
    spec = spec.resolved(nonnegative=False, weight=role == "weight")
    return quantizers.create(spec, SHAPE if role == "weight" else None, axis)


def _suits(name, grid):
    try:
        make(name, grid)
    except UserError:
        return False
    return True


CASES = [(n, g) for n in quantizers.names() for g in GRIDS if _suits(n, g)]
ACTS = [case for case in CASES if GRIDS[case[1]][0] == "act"]
STATIC = [case for case in CASES if quantizers.find(case[0]).static]  # whose range is not that of the input itself
WEIGHTS = [case for case in CASES if GRIDS[case[1]][0] == "weight"]
ONE, SEVERAL = ([c for c in CASES if ("granularity" in GRIDS[c[1]][2]) == several] for several in (False, True))
COMPILED = [  # of each quantizer one with one scale and one with several: others run in the same programs, or nearly
    *[next(c for c in cases if c[0] == n) for cases in (ONE, SEVERAL) for n in dict(cases)],
    ("lsq", "w3-axis1-pow2"),  # scales that lie across memory
    ("lsq", "w2-group"),
    ("lsq", "act-e4m3"),
    ("lsq", "w4-channel-affine"),
]
FEW = [cases[i] for n in quantizers.names() for cases in [[c for c in CASES if c[0] == n]] for i in (0, -1)]


def each(cases):
    return pytest.mark.parametrize(("name", "grid"), [pytest.param(*case, id="-".join(case)) for case in cases])


def numbers(shape=SHAPE, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ready(name, grid, x=None, **changes):
    """A calibrated quantizer and what calibrated it."""
    quantizer, x = make(name, grid, **changes), numbers() if x is None else x
    quantizer.calibrate(x)
    return quantizer, x


def decoded(quantizer, x):
    return quantizer.dequantize(quantizer.quantize(x), quantizer.grid(x))


def train_a_little(quantizer, x, steps=3):
    """Takes steps far too large for comfort."""
    x = x.clone().requires_grad_()
    optimizer = torch.optim.SGD([x, *quantizer.parameters()], lr=0.05)
    for seed in range(steps):
        optimizer.zero_grad()
        (quantizer(x) * numbers(x.shape, seed)).sum().backward()
        optimizer.step()
    return x.detach()


def gradients(quantizer, x, weights, run=None):
    x = x.clone().requires_grad_()
    y = (quantizer if run is None else run)(x)
    (y * weights).sum().backward()
    return y.detach(), x.grad, {n: p.grad for n, p in quantizer.named_parameters()}


@pytest.mark.parametrize("name", quantizers.names())
def test_a_quantizer_suits_two_grids_at_least(name):
    assert sum(n == name for n, _ in CASES) >= 2


@each(CASES)
def test_in_float64_forward_is_dequantize_of_quantize_before_it_is_rounded_to_float32(name, grid):
    quantizer, x = ready(name, grid, numbers().double())
    y = quantizer(x)
    assert y.dtype == torch.float64 and torch.equal(y.float(), decoded(quantizer, x))


@each(CASES)
def test_keys_and_shapes_are_final_from_the_start(name, grid):
    quantizer = make(name, grid)

    def tensors():
        named = (*quantizer.named_parameters(), *quantizer.named_buffers())
        return {k: (v.shape, v.dtype, v.requires_grad) for k, v in named}, list(quantizer.state_dict())

    before = tensors()
    quantizer.observe()
    quantizer(numbers())
    quantizer.calibrate(numbers())
    train_a_little(quantizer, numbers())
    quantizer.eval().quantize(numbers())
    assert tensors() == before
    assert all(t.ndim >= 1 for t in (*quantizer.parameters(), *quantizer.buffers()))


@pytest.mark.parametrize("steps", [pytest.param(0, id="calibrated"), pytest.param(3, id="trained")])
@each(CASES)
def test_forward_is_dequantize_of_quantize_bit_for_bit(name, grid, steps):
    quantizer, x = ready(name, grid)
    x = train_a_little(quantizer, x, steps)
    assert torch.equal(quantizer(x), decoded(quantizer, x))
    quantizer.eval()
    assert torch.equal(quantizer(x), decoded(quantizer, x))
    assert torch.equal(quantizer(2 * x), decoded(quantizer, 2 * x))


@each(CASES)
def test_a_bfloat16_input_gets_the_codes_of_float32(name, grid):
    quantizer, x = ready(name, grid)
    x = x.bfloat16()
    for training in (False, True):
        quantizer.train(training)
        twin = copy.deepcopy(quantizer)
        y = quantizer(x)
        assert y.dtype == torch.bfloat16 and torch.equal(y, twin(x.float()).bfloat16())
    y, grad, _ = gradients(quantizer, x, torch.ones(()))
    assert y.isfinite().all() and grad.dtype == torch.bfloat16


@each(CASES)
def test_float64_agrees_with_float32(name, grid):
    quantizer, x = ready(name, grid)
    twin, weights = copy.deepcopy(quantizer), numbers(seed=1)
    y, grad, learned = gradients(quantizer, x, weights)
    wide_y, wide_grad, wide_learned = gradients(twin, x.double(), weights.double())
    assert wide_y.dtype == wide_grad.dtype == torch.float64
    torch.testing.assert_close(wide_y.float(), y)
    torch.testing.assert_close(wide_grad.float(), grad)
    torch.testing.assert_close(wide_learned, learned, rtol=1e-5, atol=1e-5)


@each(CASES)
def test_codes_stay_within_the_grid(name, grid):
    quantizer, x = ready(name, grid)
    codes = quantizer.quantize(10 * x)
    assert codes.shape == x.shape
    if quantizer.spec.integer:
        assert codes.dtype == quantizer.code_dtype
        assert quantizer.quant_min <= codes.min() and codes.max() <= quantizer.quant_max
    else:
        assert codes.dtype == torch.uint8 and int(codes.max()) < 2**quantizer.spec.width


@each(CASES)
def test_a_state_dict_carries_everything(name, grid):
    quantizer, x = ready(name, grid)
    train_a_little(quantizer, x)
    file = io.BytesIO()
    torch.save(quantizer.state_dict(), file)
    fresh = make(name, grid)
    fresh.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert fresh.on
    assert torch.equal(fresh.eval()(x), quantizer.eval()(x))


@pytest.mark.parametrize(
    "copied",
    [
        pytest.param(copy.deepcopy, id="deepcopy"),
        pytest.param(lambda q: pickle.loads(pickle.dumps(q)), id="pickle"),
    ],
)
@each(CASES)
def test_a_copy_quantizes_and_learns_alike(name, grid, copied):
    quantizer, x = ready(name, grid)
    twin = copied(quantizer)
    weights = numbers(seed=1)
    torch.testing.assert_close(gradients(twin, x, weights), gradients(quantizer, x, weights), rtol=0, atol=0)


@pytest.mark.parametrize("dynamic", [None, True], ids=["", "all-shapes"])
@each(FEW)
def test_it_compiles_into_one_graph(name, grid, dynamic):
    torch._dynamo.reset()
    quantizer, x = ready(name, grid)
    twin, weights = copy.deepcopy(quantizer), numbers(seed=1)
    compiled = torch.compile(twin, fullgraph=True, backend="eager", dynamic=dynamic)
    torch.testing.assert_close(gradients(twin, x, weights, compiled), gradients(quantizer, x, weights), rtol=0, atol=0)
    assert torch.equal(decoded(twin, x), decoded(quantizer, x))  # what it tracks moved alike


@pytest.mark.slow
@each(COMPILED)
def test_compiled_kernels_do_what_plain_torch_does(name, grid, monkeypatch, kernel_settings):
    monkeypatch.setattr(dispatch, "SMALL", 0)
    quantizer, x = ready(name, grid)
    parts = quantizer.gradient.forward, quantizer.gradient.backward
    for part in parts:
        monkeypatch.setattr(part, "_launches", {})
    on_grid = decoded(quantizer, x)
    x[..., 1::4] = on_grid[..., 1::4]
    x[..., 2::4] = ((on_grid + on_grid.roll(1, -1)) / 2)[..., 2::4]  # ties among them
    special = x.clone()
    special.view(-1)[[0, 20, 40]] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    found = {}
    for mode in ("never", "always"):
        kernels.configure(mode)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="quantizers run uncompiled")
            found[mode] = [gradients(copy.deepcopy(quantizer), t, numbers(seed=1)) for t in (x, special)]
    assert all(part._launches and all(part._launches.values()) for part in parts), "it ran in plain torch"
    for plain, fused in zip(found["never"], found["always"], strict=True):
        torch.testing.assert_close(fused[0], plain[0], rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(fused[1:], plain[1:], rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.slow
def test_inductor_gives_the_same_codes_and_gradients():
    torch._dynamo.reset()
    quantizer, x = ready("lsq", "w4-channel")
    twin, weights = copy.deepcopy(quantizer), numbers(seed=1)
    y, grad, learned = gradients(quantizer, x, weights)
    fused_y, fused_grad, fused_learned = gradients(twin, x, weights, torch.compile(twin, fullgraph=True))
    assert torch.equal(fused_y, y) and torch.equal(fused_grad, grad)
    torch.testing.assert_close(fused_learned, learned, rtol=1e-5, atol=1e-6)


@each(CASES)
def test_off_and_observing_pass_the_input_on(name, grid):
    quantizer, x = ready(name, grid)
    quantizer.enable(False)
    assert quantizer(x) is x and not quantizer.on
    quantizer.enable()
    quantizer.observe()
    assert quantizer(x) is x and not quantizer.on
    quantizer.observe(False)
    assert quantizer.on and quantizer(x) is not x


@each(CASES)
def test_evaluation_changes_nothing(name, grid):
    quantizer, x = ready(name, grid)
    before = copy.deepcopy(quantizer.state_dict())
    quantizer.eval()
    quantizer(5 * x)
    quantizer.quantize(5 * x)
    torch.testing.assert_close(quantizer.state_dict(), before, rtol=0, atol=0)


@each([case for case in ACTS if dict(make(*case).named_parameters())])
def test_gradients_do_not_depend_on_how_a_batch_is_split(name, grid):
    quantizer, x = ready(name, grid)
    weights = numbers(seed=1)
    parts = [gradients(copy.deepcopy(quantizer), *halves) for halves in zip(x.split(2), weights.split(2), strict=True)]
    y, grad, learned = gradients(quantizer, x, weights)
    assert torch.equal(torch.cat([p[0] for p in parts]), y)
    assert torch.equal(torch.cat([p[1] for p in parts]), grad)
    for key, whole in learned.items():
        torch.testing.assert_close(parts[0][2][key] + parts[1][2][key], whole, rtol=1e-4, atol=1e-5)


@each(ACTS)
@pytest.mark.parametrize("shape", [pytest.param((0, 8), id="empty"), pytest.param((1, 8), id="one-row")])
def test_an_unusual_batch_passes(name, grid, shape):
    quantizer, _ = ready(name, grid)
    y, grad, _ = gradients(quantizer, torch.ones(shape), torch.ones(()))
    assert y.shape == grad.shape == shape and y.isfinite().all()
    assert quantizer.quantize(torch.ones(shape)).shape == shape


@each([case for case in ACTS if make(*case).spec.granularity == "tensor"])
def test_a_scalar_is_a_tensor_too(name, grid):
    quantizer, _ = ready(name, grid)
    y, grad, _ = gradients(quantizer, torch.tensor(0.5), torch.ones(()))
    assert y.shape == grad.shape == ()
    assert torch.equal(y, decoded(quantizer, torch.tensor(0.5)))


@each(CASES)
def test_a_module_in_bfloat16_keeps_its_grid(name, grid):
    quantizer, x = ready(name, grid)
    halved = copy.deepcopy(quantizer).to(torch.bfloat16)
    assert all(t.dtype != torch.bfloat16 for t in (*halved.parameters(), *halved.buffers()))
    assert torch.equal(halved(x.bfloat16()), quantizer(x.bfloat16().float()).bfloat16())


@each(CASES)
def test_memory_layout_does_not_matter(name, grid):
    quantizer, x = ready(name, grid)
    weights = numbers(seed=1)
    y, grad, learned = gradients(copy.deepcopy(quantizer), x, weights)
    strided = x.transpose(0, 2).contiguous().transpose(0, 2)
    assert not strided.is_contiguous()
    again_y, again_grad, again_learned = gradients(quantizer, strided, weights)
    assert torch.equal(again_y, y) and torch.equal(again_grad, grad)
    torch.testing.assert_close(again_learned, learned, rtol=1e-5, atol=1e-5)


@each([case for case in CASES if GRIDS[case[1]][2].get("granularity", "tensor") in ("tensor", "channel")])
def test_channels_last_stays_channels_last(name, grid):
    role, axis, _ = GRIDS[grid]
    x = numbers((4, 8, 3, 5)).contiguous(memory_format=torch.channels_last)
    spec = make(name, grid).spec
    quantizer = quantizers.create(spec, x.shape if role == "weight" else None, axis)
    quantizer.calibrate(x)
    y, grad, learned = gradients(copy.deepcopy(quantizer), x, numbers(x.shape, 1))
    assert y.is_contiguous(memory_format=torch.channels_last)
    plain_y, plain_grad, plain_learned = gradients(quantizer, x.contiguous(), numbers(x.shape, 1))
    assert torch.equal(plain_y, y) and torch.equal(plain_grad, grad)
    torch.testing.assert_close(plain_learned, learned, rtol=1e-5, atol=1e-5)


@each(WEIGHTS)
def test_an_all_zero_channel_has_a_scale_and_stays_harmless(name, grid):
    x = numbers()
    x[1] = 0
    x[:, 1] = 0
    quantizer, _ = ready(name, grid, x)
    y, grad, learned = gradients(quantizer, x, numbers(seed=1))
    assert (quantizer.step() > 1e-4).all()
    assert all(t.isfinite().all() for t in (y, grad, *learned.values()))
    if quantizer.spec.format not in ("binary", "midrise"):
        assert not y[1].any()


@each(STATIC)
def test_the_start_depends_on_the_ranges_that_the_quantizer_heeds_alone(name, grid):
    scale = {each: ready(name, grid, range=each)[0].scale for each in ("minmax", "lsq", "percentile")}
    heeded = quantizers.find(name).heeds(GRIDS[grid][0] == "weight")
    assert torch.equal(scale["lsq"], scale["percentile"]) == ("percentile" not in heeded)
    assert torch.equal(scale["lsq"], scale["minmax"]) == ("lsq" not in heeded)


@each(CASES)
def test_nothing_but_zeros_calibrates(name, grid):
    quantizer, x = ready(name, grid, torch.zeros(SHAPE))
    assert (quantizer.step() > 0).all() and quantizer(x).isfinite().all()


@each([case for case in WEIGHTS if GRIDS[case[1]][2].get("granularity") == "channel"])
def test_a_channel_of_one_element(name, grid):
    x = numbers((8, 1) if GRIDS[grid][1] == 0 else (1, 8))
    quantizer = quantizers.create(make(name, grid).spec, x.shape, GRIDS[grid][1])
    quantizer.calibrate(x)
    assert (quantizer.step() > 0).all()
    y, grad, learned = gradients(quantizer, x, torch.ones(()))
    assert all(t.isfinite().all() for t in (y, grad, *learned.values()))


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_a_weight_without_elements_keeps_a_scale(granularity):
    x = torch.zeros(4, 0)
    quantizer = quantizers.create(QuantSpec(4, signed=True, narrow=True, granularity=granularity), x.shape)
    quantizer.calibrate(x)
    assert (quantizer.step() > 0).all() and quantizer(x).shape == x.shape


@each([case for case in CASES if make(*case).follows])
def test_a_tensor_may_be_read_twice_before_backward_though_its_range_moves(name, grid):
    quantizer, x = ready(name, grid)
    x = x.requires_grad_()
    (quantizer(x) + quantizer(x)).sum().backward()
    assert x.grad.any()


@each(CASES)
def test_nan_shows_in_training_and_has_no_code(name, grid):
    quantizer, x = ready(name, grid)
    x[0, 0, 0] = torch.nan
    assert quantizer(x)[0, 0, 0].isnan()
    with pytest.raises(ValueError, match="NaN"):
        quantizer.quantize(x)


@each(STATIC)
def test_nan_has_no_range(name, grid):
    x = numbers()
    x[0, 0, 0] = torch.nan
    with pytest.raises(UserError, match="NaN or infinity"):
        make(name, grid).calibrate(x)


@each(STATIC)
def test_infinity_saturates(name, grid):
    quantizer, x = ready(name, grid)
    x[0, 0, :2] = torch.tensor([torch.inf, -torch.inf])
    y = quantizer.eval()(x)
    huge = x.nan_to_num(posinf=1e30, neginf=-1e30)
    assert torch.equal(y, quantizer(huge)) and y.isfinite().all()


@each(CASES)
def test_a_scale_that_is_not_learned_gets_no_gradient(name, grid):
    quantizer, x = ready(name, grid)
    quantizer.requires_grad_(False)
    _, grad, learned = gradients(quantizer, x, numbers(seed=1))
    assert not quantizer.scale.requires_grad and quantizer.scale.grad is None
    assert grad is not None and grad.any()
    assert not any(g is not None for g in learned.values())


@each([case for case in CASES if "scale" in dict(make(*case).named_parameters())])
def test_a_scale_below_zero_still_acts_as_one_above(name, grid):
    quantizer, x = ready(name, grid)
    with torch.no_grad():
        quantizer.scale.fill_(-0.1)
    assert (quantizer.step() > 0).all()
    assert quantizer(x).isfinite().all() and torch.equal(quantizer(x), decoded(quantizer, x))


def stochastic(x, bits=4):
    quantizer, _ = ready("lsq", "w8-tensor", x, bits=bits, rounding_mode="stochastic", range="minmax")
    with torch.no_grad():
        quantizer.scale.fill_(0.5)
    return quantizer


def test_stochastic_rounding_is_right_on_average():
    x = torch.tensor([-3.1, -0.05, 0.0, 0.35, 1.0, 3.4]).repeat(4000, 1)
    y = stochastic(x)(x).detach()
    assert torch.equal((y / 0.5).round(), y / 0.5) and ((y - x).abs() < 0.5).all()
    torch.testing.assert_close(y.mean(0), x[0], rtol=0, atol=0.02)  # five standard errors of 0.25 / sqrt(4000)


def test_stochastic_rounding_is_for_training_alone():
    x = numbers()
    quantizer = stochastic(x)
    assert not torch.equal(quantizer(x), quantizer(x))
    nearest = decoded(quantizer, x)
    assert torch.equal(quantizer.eval()(x), nearest)


def test_stochastic_rounding_clips_what_nearest_rounding_clips():
    x = torch.linspace(-5, 5, 10001)
    quantizer = stochastic(x, bits=4)
    y, grad, _ = gradients(quantizer, x, torch.ones(()))
    assert torch.equal(grad, ((x >= -3.5) & (x <= 3.5)).float())
    assert (y[x < -3.5] == -3.5).all() and (y[x > 3.5] == 3.5).all()


@pytest.mark.parametrize(
    ("name", "grid", "changes", "message"),
    [
        pytest.param("lsq_plus", "act-u8", {}, "symmetric: false", id="lsq_plus-symmetric-activation"),
        pytest.param("lsq_plus", "w4-channel-affine", {}, "symmetric: true", id="lsq_plus-affine-weight"),
        pytest.param("pact", "w8-tensor", {}, "quantizer: dorefa", id="pact-weight"),
        pytest.param("pact", "act-u4-affine", {}, "symmetric: true", id="pact-affine"),
        pytest.param("pact", "act-u8", {"options": {"decay": -1.0}}, "options.decay", id="pact-decay"),
        pytest.param("dorefa", "w4-channel", {}, "format: midrise", id="dorefa-weight-with-zero"),
        pytest.param("dorefa", "act-u4-affine", {}, "symmetric: true", id="dorefa-affine"),
        pytest.param("ewgs", "w8-tensor", {"options": {"delta": -1.0}}, "options.delta", id="ewgs-delta"),
        pytest.param("ewgs", "w8-tensor", {"options": {"dleta": 1.0}}, "did you mean 'delta'", id="misspelt-option"),
        pytest.param("dsq", "midrise3-channel", {}, "format: int", id="dsq-midrise"),
        pytest.param("dsq", "w8-tensor", {"options": {"end": 0.5}}, "options.start=1", id="dsq-softens"),
        pytest.param("dsq", "w8-tensor", {"options": {"steps": 0}}, "options.steps", id="dsq-steps"),
        pytest.param("n2uq", "w8-tensor", {}, "quantizer: lsq", id="n2uq-weight"),
        pytest.param("n2uq", "act-u8", {"bits": 9}, "at most 8 bits", id="n2uq-bits"),
        pytest.param("n2uq", "act-u8", {"rounding_mode": "stochastic"}, "nearest", id="n2uq-stochastic"),
        pytest.param("seq", "w4-channel", {}, "quantizer: lsq", id="seq-int"),
        pytest.param("seq", "midrise3-channel", {}, "bits: 2", id="seq-three-bits"),
        pytest.param("lsq", "ternary-tensor", {"rounding_mode": "stochastic"}, "format=int", id="stochastic-ternary"),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_way_out(name, grid, changes, message):
    with pytest.raises(UserError, match=message):
        make(name, grid, **changes)


def test_a_subclass_of_lsq_chooses_the_scale_of_its_gradient():
    class Unscaled(LSQ):
        def gradient_scale(self, x: torch.Tensor) -> float:
            return 1.0

    found = []
    for kind in (LSQ, Unscaled):
        quantizer, x = kind(QuantSpec(bits=4).resolved(nonnegative=False, weight=False)), numbers(seed=0)
        quantizer.calibrate(x)
        quantizer(x).sum().backward()
        found.append(quantizer.scale.grad / quantizer.gradient_scale(x))
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("shape", "share"), [pytest.param((4, 8), 1.0, id="weight"), pytest.param(None, 0.25, id="activation")]
)
def test_a_range_follows_weights_at_once_and_activations_by_a_moving_average(shape, share):
    spec = QuantSpec(8, signed=True, narrow=True, quantizer="minmax", options={"momentum": 0.25})
    quantizer, x = quantizers.create(spec, shape and torch.Size(shape)), numbers((4, 8))
    quantizer.calibrate(x)
    before = quantizer.scale.clone()
    quantizer(3 * x)
    torch.testing.assert_close(quantizer.scale, torch.lerp(before, 3 * before, share))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("symmetric", [False, True], ids=["affine", "symmetric"])
def test_a_range_that_follows_the_data_passes_by_a_batch_that_is_not_finite(symmetric, value):
    quantizer, x = ready("minmax", "act-u4-affine", symmetric=symmetric)
    before = copy.deepcopy(quantizer.state_dict())
    x[0, 0, 0] = value
    quantizer(x)
    torch.testing.assert_close(quantizer.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "affine"])
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_stochastic_rounding_takes_no_gradient_from_what_is_within_the_limits(signed, symmetric):
    for factor in torch.linspace(0.5, 2, 50):  # whether a sum is rounded out of the limits is the scale's chance
        x = torch.linspace(-1, 3, 2_001) * factor
        quantizer, _ = ready("lsq", "act-u8", x, bits=4, signed=signed, symmetric=symmetric, rounding_mode="stochastic")
        scale, low, high = (t.detach() for t in quantizer.grid(x))
        _, grad, _ = gradients(quantizer, x, torch.ones(()))
        assert torch.equal(grad, ((x / scale >= low) & (x / scale <= high)).float())


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float64], ids=str)
def default_dtype(request):
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


@each(FEW)
def test_grids_are_float32_under_any_default_dtype(name, grid, default_dtype):
    quantizer = make(name, grid)
    tensors = *quantizer.parameters(), *quantizer.buffers()
    assert {t.dtype for t in tensors if t.is_floating_point()} == {torch.float32}
    x = numbers().to(default_dtype)
    quantizer.calibrate(x)
    train_a_little(quantizer, x)
    assert decoded(quantizer.eval(), x).dtype == torch.float32


@each([case for case in FEW if "binary" not in case[1]])
def test_a_quantizer_trains_in_a_float64_model_and_its_stored_scale_is_the_one_that_acts(name, grid):
    quantizer, x = ready(name, grid)
    quantizer.double()
    x = train_a_little(quantizer, x.double())
    scale = quantizer.grid(x)[0]
    assert torch.equal(scale, scale.float())


def test_a_look_in_inference_mode_does_not_anneal_and_leaves_what_trains():
    quantizer, x = ready("dsq", "w8-tensor")
    with torch.inference_mode():
        quantizer.train()(x)
    assert quantizer.sharpness.item() == 1.0
    quantizer(x.clone().requires_grad_()).sum().backward()
    assert quantizer.scale.grad is not None and quantizer.sharpness.item() > 1.0


def test_sharpness_is_annealed_in_a_half_precision_model(default_dtype):
    quantizer, x = make("dsq", "w8-tensor"), numbers()
    quantizer.calibrate(x)
    quantizer.to(default_dtype)
    for _ in range(3):
        quantizer(x)
    assert quantizer.sharpness.item() == pytest.approx(quantizer.growth**3, rel=1e-6)


def test_a_range_that_was_frozen_when_it_was_saved_moves_in_who_loads_it():
    spec = QuantSpec(quantizer="minmax").resolved(nonnegative=False, weight=False)
    frozen, loaded = quantizers.create(spec), quantizers.create(spec)
    frozen.calibrate(torch.randn(8))
    frozen.tracking.fill_(False)
    state = frozen.state_dict()
    loaded.load_state_dict(state, assign=True)
    low = loaded.running_low.clone()
    loaded.train()(torch.full((8,), -9.0))
    assert loaded.running_low < low and not state["tracking"] and not frozen.tracking


@pytest.mark.parametrize("assign", [False, True], ids=["to_empty", "assign"])
@each(FEW)
def test_a_quantizer_of_the_meta_device_is_what_was_loaded_into_it(name, grid, assign):
    quantizer, x = ready(name, grid)
    with torch.device("meta"):
        twin = make(name, grid)
    if not assign:
        twin.to_empty(device="cpu")
        for tensor in (*twin.parameters(), *twin.buffers()):
            tensor.data.fill_(3)
    twin.load_state_dict(copy.deepcopy(quantizer.state_dict()), assign=assign)
    weights = numbers(seed=1)
    torch.testing.assert_close(gradients(twin, x, weights), gradients(quantizer, x, weights), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["fixed", "lsq"])
def test_a_large_inference_tensor_is_quantized_where_gradients_are_on(name):
    quantizer, x = ready(name, "act-u8", numbers((1 << 17,)))
    quantizer.requires_grad_(False)
    with torch.inference_mode():
        other = x.clone()
    assert torch.equal(quantizer(other), quantizer(x))


@pytest.mark.parametrize("name", ["ewgs", "dsq"])
def test_the_scales_gradient_is_as_exact_at_many_bits_as_at_few(name):
    quantizer, x = ready(name, "w4-channel", bits=16)
    wide, weights = copy.deepcopy(quantizer).double(), numbers(seed=1)
    found = gradients(quantizer, x, weights)[2]["scale"].double()
    expected = gradients(wide, x.double(), weights.double())[2]["scale"]
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=0)


def test_a_grid_beyond_float16_saturates():
    x = torch.tensor([-65504.0, 65504.0, 1.0]).half()
    quantizer, _ = ready("lsq", "w8-tensor", x, scale="pow2", narrow=False, range="minmax")
    with torch.no_grad():
        quantizer.scale.fill_(512.0)
    assert quantizer(x).tolist() == quantizer.eval()(x).tolist() == [-65504.0, 65024.0, 0.0]


@pytest.mark.parametrize(
    ("axis", "granularity", "shape", "message"),
    [
        pytest.param(0, "channel", (8,), "granularity: tensor", id="channels-of-a-vector"),
        pytest.param(0, "group", (8,), "granularity: tensor", id="groups-of-a-vector"),
        pytest.param(3, "channel", (4, 8, 8), "from 0 to 2", id="no-such-axis"),
        pytest.param(-1, "group", (4, 8, 8), "from 0 to 1", id="groups-of-a-later-axis"),
    ],
)
def test_an_axis_that_a_weight_lacks_is_refused(axis, granularity, shape, message):
    size = 4 if granularity == "group" else None
    spec = QuantSpec(bits=4, granularity=granularity, group_size=size).resolved(nonnegative=False, weight=True)
    with pytest.raises(UserError, match=message):
        quantizers.create(spec, torch.Size(shape), axis)


@pytest.mark.parametrize("granularity", ["channel", "group"])
def test_an_axis_below_zero_counts_from_the_last(granularity):
    spec = QuantSpec(bits=4, granularity=granularity, group_size=4 if granularity == "group" else None)
    x, found = numbers((4, 8)), []
    for axis in (1, -1):
        quantizer = quantizers.create(spec.resolved(nonnegative=False, weight=True), x.shape, axis)
        quantizer.calibrate(x)
        found.append(quantizer(x))
    assert torch.equal(*found)


def test_learned_widths_stay_as_many_as_they_are():
    quantizer, _ = ready("n2uq", "act-u8", bits=3)
    with pytest.raises(UserError, match="anneal with quantizer: lsq"):
        quantizer.change_bits(2)
