"""Better starts: each does what its paper says, helps without training, and training begins with its result."""

import copy
import re
import warnings

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from small_models import Drawn, Shape, lived, quantized
from torch import nn
from torch.utils.data import DataLoader

from qat import QATCallback
from qat.errors import UserError
from qat.insert import named_quantizers
from qat.modes import evaluating
from qat.quantizers import find, names
from qat.starts import AdaRound, CorrectBias, Equalize
from qat.starts.adaround import SoftRounding
from qat.starts.base import in_float
from qat.starts.equalize import find_pairs

POLICY = {"weight": {"bits": 3, "granularity": "channel"}, "act": {"bits": 8}}


class Net(nn.Module):
    """conv-bn-relu-pool-depthwise-bn-relu-conv, a residual around it, and a head without a bias."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.deep, self.norm1 = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)
        self.mix = nn.Conv2d(8, 8, 1)
        self.last = nn.Conv2d(8, 4, 1)
        self.head = nn.Linear(4, 3, bias=False)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm0(self.stem(x))), 2)
        y = F.relu(self.norm1(self.deep(x)))
        y = F.relu(self.mix(y))
        y = F.gelu(self.last(x + y))
        return self.head(y.mean((2, 3)))


def _input(n=64, seed=0):
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def _uneven(net):
    """Channels of very different sizes, as trained networks have them."""
    with torch.no_grad():
        net.norm0.weight.mul_(torch.logspace(-1.5, 1.5, 8))
        net.mix.weight.mul_(torch.logspace(-1, 1, 8).view(-1, 1, 1, 1))
    return net


# -- equalization ------------------------------------------------------------------------------------------------------


def test_the_pairs_are_those_with_nothing_but_homogeneous_operations_between_them():
    net = lived(Net())
    pairs = find_pairs(net, lambda: net(_input(4)))
    names = {id(module): name for name, module in net.named_modules()}
    # stem is read by the residual as well, and a gelu is behind last
    assert [(names[id(p.first)], names[id(p.second)]) for p in pairs] == [("deep", "mix")]


@pytest.mark.parametrize("activation", ["relu", "relu6"])
def test_a_relu6_that_clips_is_in_the_way(activation):
    net = nn.Sequential(nn.Linear(6, 5), {"relu": nn.ReLU(), "relu6": nn.ReLU6()}[activation], nn.Linear(5, 2))
    with torch.no_grad():
        net[0].bias.fill_(4.0)
    x = torch.randn(16, 6)
    assert len(find_pairs(net.eval(), lambda: net(x))) == (activation == "relu")


@pytest.mark.parametrize("activation", [nn.ReLU6(), nn.Hardtanh(-10, 10)], ids=["relu6", "hardtanh"])
def test_channels_that_would_clip_once_they_are_scaled_are_left_alone(activation):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 12), activation, nn.Linear(12, 4)).eval()
    with torch.no_grad():
        net[2].weight.mul_(10 ** torch.linspace(-2, 2, 12))
    x = torch.randn(16, 6)
    assert activation(net[0](x)).abs().max() < 4, "nothing clips yet"
    with pytest.raises(UserError, match="what clips, such as ReLU6, is in the way"):
        Equalize().prepare(net, lambda: net(x))


def test_no_channel_is_scaled_further_than_pairs_are_tried():
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
    with torch.no_grad():
        net[2].weight.mul_(torch.tensor([1e-9, 1.0, 1e9]))
    before, x = net[0].weight.detach().clone(), torch.randn(16, 4)
    Equalize().prepare(net, lambda: net(x))
    moved = (before / net[0].weight.detach()).mean(1)
    assert moved[0] == pytest.approx(2**10) and moved[2] == pytest.approx(2**-10)


def test_a_pair_whose_scaling_changes_the_answer_after_all_is_left_as_it_was():
    class Band(nn.Module):
        """Nothing for the values of the batch and for those they are tried at, but something between."""

        def forward(self, x):
            return torch.where((x > 30) & (x < 300), x / 2, x)

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), Band(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    with torch.no_grad():
        net[0].bias.fill_(2)
        net[2].weight.mul_(1e4)
        net[4].weight.mul_(torch.logspace(-1, 1, 8))
    x, before = torch.randn(32, 4) * 0.1, copy.deepcopy(net)
    expected = net(x)
    assert len(find_pairs(net, lambda: net(x))) == 2
    with pytest.warns(UserWarning, match="Equalize: '0' and '2' stay as they are"):
        Equalize().prepare(net, lambda: net(x))
    assert torch.allclose(net(x), expected, rtol=1e-4)
    assert torch.equal(net[0].weight, before[0].weight) and not torch.equal(net[4].weight, before[4].weight)


def test_coarse_arithmetic_keeps_no_pair_from_being_scaled(monkeypatch):
    """Mantissas of ten bits, as GPUs multiply with."""

    def coarse(layer, x, weight, bias):
        x, weight = ((t.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32) for t in (x, weight))
        return F.conv2d(x, weight, bias)

    torch.manual_seed(0)
    layers = [nn.Conv2d(16, 16, 1, bias=False) for _ in range(8)]
    net = nn.Sequential(*[each for layer in layers for each in (layer, nn.ReLU())], nn.Conv2d(16, 4, 1)).eval()
    with torch.no_grad():
        for layer in layers:
            layer.weight.mul_(torch.logspace(-1, 1, 16).view(-1, 1, 1, 1))
    x = torch.randn(32, 16, 1, 1)
    monkeypatch.setattr(nn.Conv2d, "_conv_forward", coarse)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Equalize().prepare(net, lambda: net(x))


def test_float16_is_too_narrow_to_try_channels_in():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).half()
    with pytest.raises(UserError, match=r"'0\.weight' is float16"):
        Equalize().prepare(net, lambda: net(torch.randn(2, 4).half()))


def test_equalizing_keeps_the_function_and_makes_ranges_equal():
    net = lived(_uneven(Net()))
    x = _input(8)
    before = net(x)
    Equalize().prepare(net, lambda: net(x))
    assert torch.allclose(net(x), before, rtol=1e-4, atol=1e-5)
    for pair in find_pairs(net, lambda: net(x)):
        assert torch.allclose(pair.factors(), torch.ones(8), atol=1e-4)


def test_finding_pairs_leaves_every_weight_as_it_was_to_the_last_bit():
    net = lived(Net())
    before = copy.deepcopy(net.state_dict())
    find_pairs(net, lambda: net(_input(4)))
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name


@torch.no_grad()
def test_a_pair_that_was_divided_for_a_while_has_been_divided_by_nothing():
    net = lived(Net())
    pair = find_pairs(net, lambda: net(_input(4)))[0]
    with pair.divided(torch.full_like(pair.total, 2.0)):
        assert (pair.total == 2).all()
    assert (pair.total == 1).all()


def test_equalizing_helps_a_scale_per_tensor():
    def error(start):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
        with torch.no_grad():
            factor = torch.logspace(-1.5, 1.5, 16)
            net[0].weight.mul_(factor[:, None])
            net[2].weight.div_(factor)
        x = torch.randn(128, 12)
        expected = net(x)
        if start:
            Equalize().prepare(net, lambda: net(x))
        quantized(net, x, {"weight": {"bits": 4}, "act": {"bits": 8}})
        return F.mse_loss(net(x), expected).item()

    assert error(True) < 0.2 * error(False)


def test_a_model_without_pairs_cannot_be_equalized():
    net = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 2)).eval()
    with pytest.raises(UserError, match="has no two layers"):
        Equalize().prepare(net, lambda: net(torch.randn(8, 4)))


# -- bias correction ---------------------------------------------------------------------------------------------------


def test_after_bias_correction_every_layer_s_outputs_have_the_mean_they_have_in_float():
    net, x = lived(Net()), _input(128)
    means: dict = {}

    def note(into):
        hooks = [
            getattr(net, n).register_forward_hook(lambda m, a, y, n=n: into.update({n: y.clone()}))
            for n in ("norm0", "norm1", "mix", "last")
        ]
        net(x)
        for hook in hooks:
            hook.remove()
        into.update({n: y.mean((0, 2, 3)) for n, y in into.items()})

    note(means)
    plan = quantized(net, x, POLICY)
    off: dict = {}
    note(off)
    CorrectBias().refine(net, lambda: net(x), plan)
    fixed: dict = {}
    note(fixed)
    for name in means:
        before, after = (means[name] - off[name]).abs().max(), (means[name] - fixed[name]).abs().max()
        # biases are whole accumulator steps, so a little remains
        assert after < 0.02 * means[name].abs().max() and after < 0.3 * before, name


@pytest.mark.parametrize("length", [5, 8], ids=["other", "as-wide"])
def test_parts_of_attention_are_corrected_by_feature_however_long_sequences_are(length):
    torch.manual_seed(0)
    net = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).eval()
    x = torch.randn(64, length, 8) + torch.linspace(-2, 4, length)[:, None]
    weight, bias = net.self_attn.in_proj_weight.detach().clone(), net.self_attn.in_proj_bias.detach().clone()
    expected = (x @ weight.T + bias).mean((0, 1)).chunk(3)
    CorrectBias().refine(net, lambda: net(x), quantized(net, x, {"weight": {"bits": 2}, "act": {"bits": 8}}))
    for name, wanted in zip(("q_proj", "k_proj", "v_proj"), expected, strict=True):
        with torch.no_grad():
            got = getattr(net.self_attn, name)(x).mean((0, 1))
        assert (got - wanted).abs().max() < 0.02, name


def test_the_input_of_a_recurrent_layer_is_corrected():
    torch.manual_seed(0)
    net, x = nn.LSTM(4, 4, batch_first=True).eval(), torch.randn(32, 6, 4) + 1
    expected = (x @ net.weight_ih_l0.T + net.bias_ih_l0).mean((0, 1)).detach()
    CorrectBias().refine(net, lambda: net(x), quantized(net, x, {"weight": {"bits": 2}, "act": {"bits": 8}}))
    with torch.no_grad():
        assert (net.ih_l0(x).mean((0, 1)) - expected).abs().max() < 0.02


def test_without_a_bias_or_a_batchnorm_there_is_nothing_to_correct():
    net, x = nn.Sequential(nn.Linear(4, 4, bias=False)), torch.randn(8, 4)
    plan = quantized(net, x, POLICY)
    with pytest.raises(UserError, match="no quantized layer of Sequential has a bias"):
        CorrectBias().refine(net, lambda: net(x), plan)


def test_what_was_off_stays_off_behind_a_pass_in_float():
    net, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(8, 4)
    quantized(net, x, POLICY)
    net[0].weight_quantizer.enable(False)
    before = [quantizer.on for _, quantizer in named_quantizers(net)]
    with in_float(net):
        assert not any(quantizer.on for _, quantizer in named_quantizers(net))
    assert [quantizer.on for _, quantizer in named_quantizers(net)] == before


# -- AdaRound ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [[], ["?"]], ids=["layers", "block"])
def test_learned_rounding_beats_nearest_on_data_it_has_not_seen(blocks):
    torch.manual_seed(0)
    body = [nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU()) for _ in range(2)]
    net = nn.Sequential(*body).eval()
    mix = torch.randn(24, 24)  # correlated inputs: errors can cancel
    mix[:, 6:] *= 0.1
    x, unseen = (torch.randn(n, 24) @ mix.T for n in (256, 512))
    expected = net(unseen)
    plan = quantized(net, x, {"weight": {"bits": 3, "granularity": "channel"}})
    before = F.mse_loss(net(unseen), expected).item()
    codes = [m.weight_quantizer.quantize(m.weight) for m in net.modules() if isinstance(m, nn.Linear)]
    AdaRound(blocks, steps=300, lr=0.03).refine(net, lambda: net(x), plan)
    after = F.mse_loss(net(unseen), expected).item()
    assert after < 0.7 * before
    assert all(parameter.grad is None for parameter in net.parameters())
    layers = [m for m in net.modules() if isinstance(m, nn.Linear)]
    for old, layer in zip(codes, layers, strict=True):
        moved = (layer.weight_quantizer.quantize(layer.weight).int() - old.int()).abs()
        assert moved.max() <= 1 and moved.any(), "up or down, nothing else"


def test_what_it_writes_rounds_to_what_it_learned_and_is_no_further_from_the_float_weights_than_needed():
    net, x = nn.Sequential(nn.Linear(16, 8)), torch.randn(32, 16)
    quantized(net, x, POLICY)
    quantizer, weight = net[0].weight_quantizer, net[0].weight.detach().clone()
    soft = SoftRounding(quantizer, weight)
    inside = (weight / quantizer.step()[:, None]).abs() < quantizer.quant_max
    assert torch.allclose(soft(weight)[inside], weight[inside], atol=0.02), "it starts at the float weights"
    with torch.no_grad():
        soft.up.copy_(torch.randn_like(soft.up) * 8)
    hard = soft.hardened(weight)
    level = (soft.floor + (soft.h() >= 0.5)).clamp(quantizer.quant_min, quantizer.quant_max)
    assert torch.equal(quantizer.levels(hard), level)
    assert ((hard - weight).abs() <= (level * quantizer.step()[:, None] - weight).abs() + 1e-6).all()


@pytest.mark.parametrize(
    "grid", [{"granularity": "tensor"}, {"granularity": "channel"}, {"granularity": "group", "group_size": 8}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [3, 8])
def test_what_it_writes_rounds_to_what_it_learned_in_types_of_few_digits_too(bits, dtype, grid):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(64, 64)).to(dtype), torch.randn(32, 64, dtype=dtype)
    quantized(net, x, {"weight": {"bits": bits, **grid}})
    quantizer, weight = net[0].weight_quantizer, net[0].weight.detach()
    soft = SoftRounding(quantizer, weight)
    with torch.no_grad():
        soft.up.copy_(torch.randn_like(soft.up) * 8)
    level = (soft.floor + (soft.h() >= 0.5)).clamp(soft.low, soft.high).view_as(weight)
    assert torch.equal(quantizer.levels(soft.hardened(weight).to(dtype)), level)


def test_a_layer_whose_type_cannot_hold_what_was_learned_is_named():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(16, 8)).bfloat16(), torch.randn(32, 16, dtype=torch.bfloat16)
    plan = quantized(net, x, {"weight": {"bits": 12, "granularity": "channel"}})
    with pytest.warns(UserWarning, match=r"'0': \d+ of 128 weights have other levels than were learned, for which bfl"):
        AdaRound(steps=20, lr=1.0).refine(net, lambda: net(x), plan)


def test_what_stays_rounded_to_nearest_is_named_with_the_reason():
    def refined(rules):
        net, x = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))), torch.randn(16, 8)
        plan = quantized(net, x, POLICY | {"rules": {"r": rules}})
        AdaRound(steps=2).refine(net, lambda: net(x), plan)

    ternary = {"bits": None, "format": "ternary"}
    with pytest.warns(UserWarning, match="'0' is rounded to nearest and 1 more, too: format=ternary has no equal step"):
        refined({"match": ["0", "2"], "weight": ternary})
    with pytest.warns(UserWarning, match="'1' is rounded to nearest: quantizer=minmax finds its grid in the weight"):
        refined({"match": "1", "weight": {"quantizer": "minmax"}})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refined({"match": "1", "weight": "off"})


def test_wrong_blocks_and_grids_are_named():
    net, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(8, 4)
    plan = quantized(net, x, POLICY)
    with pytest.raises(UserError, match=re.escape("no module matches 'layer1'")):
        AdaRound("layer1").refine(net, lambda: net(x), plan)
    other = nn.Sequential(nn.Linear(4, 4))
    plan = quantized(other, x, {"weight": {"bits": None, "format": "binary", "quantizer": "seq"}})
    with pytest.raises(UserError, match="no weight of Sequential has a grid of equal steps"):
        AdaRound().refine(other, lambda: other(x), plan)
    with pytest.raises(UserError, match="steps=0: must be above 0"):
        AdaRound(steps=0)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x, y):
        return self.inner(x) + y, x


class Called(nn.Module):
    """Layers and a block that are called in every other way than with one tensor."""

    def __init__(self):
        super().__init__()
        self.named, self.block = nn.Linear(8, 8), Two()
        self.own = nn.Parameter(torch.randn(8, 8) * 0.3)

    def forward(self, x):
        x = F.relu_(self.named(input=x))
        y, x = self.block(x, y=x)
        return F.linear(y, self.own)


def _rounded_by(net, x, start, policy=POLICY):
    """Which weights a start rounds otherwise, by name; and the errors of what they make of it, before and after."""
    expected = net(x)
    plan = quantized(net, x, policy)
    layers = {n: dict(net.named_modules())[n] for n in plan.weights}
    codes = {n: m.weight_quantizer.quantize(m.weight) for n, m in layers.items()}
    before = F.mse_loss(_first(net(x)), _first(expected)).item()
    start.refine(net, lambda: net(x), plan)
    moved = {n for n, m in layers.items() if not torch.equal(codes[n], m.weight_quantizer.quantize(m.weight))}
    return moved, before, F.mse_loss(_first(net(x)), _first(expected)).item()


def _first(output):
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("blocks", [[], ["block"]], ids=["layers", "block"])
def test_rounding_is_learned_however_a_layer_or_a_block_is_called(blocks):
    torch.manual_seed(0)
    net, x = Called().eval(), torch.randn(256, 8) @ torch.randn(8, 8)
    moved, before, after = _rounded_by(net, x, AdaRound(blocks, steps=300, lr=0.03))
    assert moved == {"named", "block.inner", "linear_0"} and after < 0.9 * before


def test_a_block_may_hold_the_batch_norm_of_its_layer():
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
    moved, before, after = _rounded_by(
        lived(nn.Sequential(block)), torch.randn(64, 3, 6, 6), AdaRound(["0"], steps=200)
    )
    assert moved and after < before


@pytest.mark.parametrize("first", [True, False], ids=["batch-first", "time-first"])
@pytest.mark.parametrize("blocks", [["0"], ["0.self_attn"]], ids=["encoder", "attention"])
def test_a_block_may_mix_what_its_first_axis_holds(blocks, first):
    torch.manual_seed(0)
    net = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=first, dropout=0.0)).eval()
    x = torch.randn(32, 6, 8) if first else torch.randn(6, 32, 8)
    moved, before, after = _rounded_by(net, x, AdaRound(blocks, steps=150, lr=0.03))
    assert {f"0.self_attn.{n}_proj" for n in ("v", "out")} <= moved and after < before


def test_a_recurrent_block_learns_the_rounding_of_its_steps_and_alone_says_that_it_does_not():
    torch.manual_seed(0)
    x = torch.randn(32, 6, 8)
    policy = POLICY | {"act": "off"}
    moved, before, after = _rounded_by(
        nn.Sequential(nn.LSTM(8, 8)).eval(), x, AdaRound("0", steps=150, lr=0.03), policy
    )
    assert moved == {"0.ih_l0", "0.hh_l0"} and after < before
    net = nn.Sequential(nn.LSTM(8, 8), Head()).eval()
    with pytest.warns(UserWarning, match="'0.hh_l0' is rounded to nearest: it never runs by itself"):
        moved, *_ = _rounded_by(net, x, AdaRound(steps=50, lr=0.03), policy)
    assert "0.hh_l0" not in moved and "1.linear" in moved


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(x[0])


def test_batches_may_be_of_several_lengths():
    net, x = nn.Sequential(nn.Linear(8, 4)).eval(), torch.randn(16, 5, 8)
    plan = quantized(net, x, POLICY)
    AdaRound(steps=5).refine(net, lambda: [net(x[:, :length]) for length in (3, 5, 4)], plan)


def test_a_linear_layer_of_sequences_learns_what_it_would_of_their_rows():
    def learned(x):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(16, 4)).eval()
        plan = quantized(net, x, {"weight": POLICY["weight"]})
        AdaRound(steps=200, lr=0.03, batch_size=len(x)).refine(net, lambda: net(x), plan)
        return net[0].weight_quantizer.quantize(net[0].weight)

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 16, generator=generator) @ torch.randn(16, 16, generator=generator)
    twice = x.repeat(2, 1, 1)  # whichever samples are drawn, the step is the same
    assert (learned(twice) != learned(twice.flatten(0, 1))).float().mean() < 0.04


def test_a_weight_that_is_computed_keeps_its_rounding_and_is_named():
    def net():
        return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 4)).eval()

    with pytest.warns(UserWarning, match="'0' is rounded to nearest: its weight is computed"):
        moved, *_ = _rounded_by(net(), torch.randn(64, 8), AdaRound(steps=100, lr=0.03))
    assert moved == {"2"}


def test_a_block_without_anything_to_round_is_an_error():
    net, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(8, 4)
    plan = quantized(net, x, POLICY)
    with pytest.raises(UserError, match="blocks: '1' matches nothing with a weight to round"):
        AdaRound("1").refine(net, lambda: net(x), plan)


# -- handover ----------------------------------------------------------------------------------------------------------


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = lived(_uneven(Net()))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self(batch[0])

    def test_step(self, batch, batch_idx):
        self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def _data():
    x = _input(64)
    return DataLoader(list(zip(x, torch.arange(64) % 3, strict=True)), batch_size=16, shuffle=True)


class Look(pl.Callback):
    def on_train_start(self, trainer, pl_module):
        with evaluating(pl_module), torch.no_grad():
            self.output = pl_module(_input(16, seed=9))


STARTS = {
    "equalize": [Equalize()],
    "correct-bias": [CorrectBias()],
    "adaround": [AdaRound(steps=20)],
    "all": [Equalize(), AdaRound(steps=20), CorrectBias()],
}


@pytest.mark.parametrize("starts", STARTS.values(), ids=STARTS)
def test_training_begins_with_exactly_what_was_measured_and_resumes_without_doing_it_again(starts, tmp_path):
    quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False}
    module = Module()
    plain, x = copy.deepcopy(module), _input(16, seed=9)

    class Data(pl.LightningDataModule):
        train_dataloader = test_dataloader = lambda self: _data()

    callback = QATCallback(POLICY, calibration_samples=64, starts=starts)
    pl.Trainer(callbacks=[callback], **quiet).test(module, datamodule=Data(), verbose=False)
    with evaluating(module), torch.no_grad():
        measured = module(x)
    bare = QATCallback(POLICY, calibration_samples=64)
    pl.Trainer(callbacks=[bare], **quiet).test(plain, datamodule=Data(), verbose=False)
    with evaluating(plain), torch.no_grad():
        assert not torch.equal(measured, plain(x)), "the start has done something"
    look = Look()
    fit = pl.Trainer(callbacks=[callback, look], max_epochs=1, **quiet)
    fit.fit(module, datamodule=Data())
    assert torch.equal(look.output, measured)
    fit.save_checkpoint(tmp_path / "one.ckpt")
    with evaluating(module), torch.no_grad():
        trained = module(x)
    again, look = Module(), Look()
    callback = QATCallback(POLICY, calibration_samples=64, starts=starts)
    resumed = pl.Trainer(callbacks=[callback, look], max_epochs=2, **quiet)
    resumed.fit(again, datamodule=Data(), ckpt_path=tmp_path / "one.ckpt", weights_only=True)
    assert torch.equal(look.output, trained)
    assert all(q.initialised for _, q in named_quantizers(again))


GRANULARITIES = [{"granularity": "tensor"}, {"granularity": "channel"}, {"granularity": "group", "group_size": 4}]
OWN = {"dorefa": {"format": "midrise"}, "seq": {"format": "midrise", "bits": 2}}
WEIGHTED = [
    (name, range_)
    for name in names()
    if name not in ("n2uq", "pact")
    for range_ in ("mse", "percentile", "even")
    if range_ in ("mse", *find(name).heeds(weight=True))
]


@pytest.mark.parametrize("grid", GRANULARITIES, ids=lambda grid: grid["granularity"])
@pytest.mark.parametrize(("quantizer", "range_"), WEIGHTED)
def test_the_first_training_forward_rounds_weights_as_they_were_measured(quantizer, grid, range_):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(8, 8)).bfloat16(), torch.randn(32, 8).bfloat16()
    weight = {"bits": 4, **grid, "quantizer": quantizer, "range": range_, **OWN.get(quantizer, {})}
    if range_ == "even" and grid["granularity"] == "group":
        weight["scale"] = "e8m0"
    quantized(net, x, {"weight": weight, "act": {"bits": 8}})
    measured = net.eval()[0].quantized_weight()
    net.train()(x)
    assert torch.equal(net[0].quantized_weight(), measured)
    assert torch.equal(net.eval()[0].quantized_weight(), measured)


@pytest.mark.parametrize("starts", STARTS.values(), ids=STARTS)
def test_a_module_that_was_compiled_trains_compiled_after_its_start(starts):
    runs = []

    def backend(graph, inputs):
        return lambda *args: (runs.append(torch.is_grad_enabled()), graph(*args))[1]

    class Count(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            runs.clear()

    torch._dynamo.reset()
    module = Module()
    module.compile(backend=backend)
    quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    callbacks = [QATCallback(POLICY, calibration_samples=64, starts=starts), Count()]
    pl.Trainer(callbacks=callbacks, max_epochs=1, enable_model_summary=False, **quiet).fit(module, _data())
    assert len(runs) >= 4, "at least a graph a step"


def test_drawn_networks_keep_their_function_when_equalized():
    for kind in ("conv", "depthwise", "linear"):
        net = lived(Drawn(Shape(kind=kind, residual=False)))
        x = net.example(8)
        before = net(x)
        Equalize(rounds=3).prepare(net, lambda net=net, x=x: net(x))
        assert torch.allclose(net(x), before, rtol=1e-4, atol=1e-5), kind


def test_what_decides_joins_after_a_fifth_of_the_steps_and_sharpens_from_then_on(monkeypatch):
    net, x, seen = nn.Sequential(nn.Linear(4, 4)), torch.randn(8, 4), []
    plan = quantized(net, x, POLICY)
    undecided = SoftRounding.undecided
    monkeypatch.setattr(SoftRounding, "undecided", lambda soft, b: seen.append(b) or undecided(soft, b))
    AdaRound(steps=10).refine(net, lambda: net(x), plan)
    assert seen == pytest.approx([20 - 18 * step / 8 for step in range(8)])


def test_while_a_layer_learns_its_rounding_all_others_are_in_evaluation(monkeypatch):
    net, x, seen = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), torch.randn(8, 4), []
    plan = quantized(net, x, POLICY)
    undecided = SoftRounding.undecided
    monkeypatch.setattr(
        SoftRounding, "undecided", lambda soft, b: seen.append([m.training for m in net]) or undecided(soft, b)
    )
    AdaRound(steps=2).refine(net, lambda: net(x), plan)
    assert seen == [[True, False, False], [False, False, True]]
