"""Convolutions of every kind and the BatchNorm behind them: with fine grids the twin is the float layer, and the
converted model, BatchNorms folded or kept, is the model in evaluation.
"""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from small_models import POLICY, both, quantized
from torch import Tensor, nn

from qat import quantizers
from qat.convert import EVERYTHING, convert
from qat.errors import UserError
from qat.export.packed import load_packed, save_packed
from qat.insert import apply_plan, named_quantizers
from qat.planning.audit import audit
from qat.planning.plan import PlannedLayer
from qat.planning.planner import make_plan
from qat.policies.policy import QuantPolicy

FINE = {"weight": {"bits": 16, "granularity": "channel"}, "act": {"bits": 16}}
TENSOR = {"weight": {"bits": 4}, "act": {"bits": 8}}
AFFINE = {"weight": {"bits": 4, "symmetric": False, "granularity": "channel"}, "act": {"bits": 8}}
GROUPS = {"weight": {"bits": 4, "granularity": "group", "group_size": 2}, "act": {"bits": 8}}


def image(dimensions: int, channels: int = 4, size: int = 5) -> Tensor:
    return torch.randn(4, channels, *[size] * dimensions)


class Mine(nn.ConvTranspose2d):
    """A subclass without a forward of its own."""


LAYERS = [
    pytest.param(lambda: nn.Conv3d(4, 6, 3, padding="same"), 3, id="conv3d"),
    pytest.param(lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), 1, id="transposed1d"),
    pytest.param(lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, bias=False), 2, id="transposed2d"),
    pytest.param(lambda: nn.ConvTranspose2d(4, 6, 2, groups=2), 2, id="transposed2d-grouped"),
    pytest.param(lambda: nn.ConvTranspose2d(4, 4, 2, groups=4), 2, id="transposed2d-depthwise"),
    pytest.param(lambda: Mine(4, 6, 3, dilation=2), 2, id="subclass"),
    pytest.param(lambda: nn.ConvTranspose3d(4, 6, 2), 3, id="transposed3d"),
]


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(x, self.weight)


BLOCKED = [
    pytest.param(lambda: nn.Conv1d(4, 6, 3), 1, id="conv1d"),
    pytest.param(lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), 2, id="conv2d-grouped"),
    pytest.param(Functional, 1, id="functional"),
    *(param for param in LAYERS if param.id != "transposed2d-depthwise"),
]
BLOCKS = {"format": "e2m1", "bits": None, "granularity": "group", "group_size": 2, "scale": "e8m0", "range": "minmax"}
MX = {"weight": BLOCKS | {"quantizer": "minmax"}, "act": BLOCKS | {"quantizer": "dynamic"}, "sites": "off"}


@pytest.mark.parametrize(("make", "dimensions"), BLOCKED)
def test_blocks_of_the_input_run_along_the_channels_that_are_summed(make, dimensions, tmp_path):
    torch.manual_seed(0)
    layer, x = make(), image(dimensions)
    plan = quantized(layer, x, MX)
    (spec,) = plan.activations.values()
    along_the_last = quantizers.create(dataclasses.replace(spec, group_axis=-1))
    (quantizer,) = (q for _, q in named_quantizers(layer) if not q.is_weight)
    rounded = quantizer(x)
    assert torch.equal(rounded, along_the_last(x.movedim(1, -1)).movedim(-1, 1))
    assert torch.equal(quantizer(x[0]), rounded[0]), "without a batch, too"
    converted = convert(layer, plan, EVERYTHING)
    save_packed(converted, plan, tmp_path)
    with torch.no_grad():
        expected = layer(x)
        assert torch.equal(layer.train()(x), expected)
        assert torch.equal(converted(x), expected)
        assert torch.equal(load_packed(make(), tmp_path)(x), expected)


def test_layers_that_read_one_tensor_along_other_axes_have_blocks_of_their_own():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = nn.Conv1d(4, 4, 1), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) + self.linear(x)

    model, x = Both(), image(1, size=4)
    plan, _ = make_plan(model, QuantPolicy.from_dict(MX), lambda: model(x))
    assert {name: spec.group_axis for name, spec in plan.activations.items()} == {"conv.input": -2, "linear.input": -1}


def test_ragged_blocks_name_the_layers_and_the_rule_before_anything_is_inserted():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1), nn.Conv2d(5, 4, 1)), image(2, channels=3)
    message = (
        r"'0': group_size=2 does not divide axis -3 of its input \[4, 3, 5, 5\], so the last group would be ragged; "
        r"leave it float with a rule such as \{match: \['0', '2'\], weight: off, act: off\}"
    )
    with pytest.raises(UserError, match=message) as refused:
        make_plan(model, QuantPolicy.from_dict(MX), lambda: model(x))
    rule = OmegaConf.to_container(OmegaConf.create(str(refused.value).partition("such as ")[2]))
    plan, _ = make_plan(model, QuantPolicy.from_dict(MX | {"rules": {"r": rule}}), lambda: model(x))
    assert list(plan.activations) == ["1.input"]


@pytest.mark.parametrize("widths", [(4, 3), (3, 4)], ids=["second-operand", "first-operand"])
def test_ragged_blocks_of_any_operand_of_a_site_are_found_before_anything_is_inserted(widths):
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (nn.Linear(4, width) for width in widths)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.first(x), self.second(x)], 1)

    model, x = Joined(), torch.randn(2, 4)
    with pytest.raises(UserError, match=r"'cat_0': group_size=2 does not divide axis -1 of its input \[2, 3\]"):
        make_plan(model, QuantPolicy.from_dict({"weight": MX["weight"], "act": MX["act"]}), lambda: model(x))


def test_a_number_among_the_operands_has_no_blocks_either():
    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x).sum() + self.first(x).mean()

    model, x = Summed(), torch.randn(2, 4)
    with pytest.raises(UserError, match=r"'add_0': group_size=2 does not divide axis -1 of its input \[\]"):
        make_plan(model, QuantPolicy.from_dict({"weight": MX["weight"], "act": MX["act"]}), lambda: model(x))


@pytest.mark.parametrize(("make", "dimensions"), LAYERS)
def test_on_fine_grids_the_twin_is_the_float_layer(make, dimensions):
    torch.manual_seed(0)
    layer, x = make().eval(), image(dimensions)
    expected = layer(x)
    quantized(layer, x, FINE)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("policy", [pytest.param(POLICY, id="channel"), pytest.param(TENSOR, id="tensor")])
@pytest.mark.parametrize(("make", "dimensions"), LAYERS)
def test_the_converted_layer_computes_what_evaluation_did_and_packs(make, dimensions, policy, tmp_path):
    torch.manual_seed(0)
    layer, x = make(), image(dimensions)
    bias = layer.bias is not None
    plan = quantized(layer, x, policy)
    converted = convert(layer, plan)
    with torch.no_grad():
        torch.testing.assert_close(converted(x), layer(x), rtol=0, atol=1e-5)
        save_packed(converted, plan, tmp_path)
        assert torch.equal(load_packed(make(), tmp_path)(x), converted(x))
    assert (converted.integer_bias is not None) is bias
    assert not list(converted.parameters())


def test_the_scales_of_a_transposed_convolution_go_along_its_output_channels():
    layer = nn.ConvTranspose2d(4, 6, 3)
    with torch.no_grad():
        layer.weight *= torch.arange(1.0, 7).view(1, -1, 1, 1)
    quantized(layer, image(2))
    assert layer.weight_quantizer.scale.shape == (6,)
    used = layer.weight_quantizer.levels(layer.weight).abs().amax((0, 2, 3))
    assert torch.equal(used, torch.full((6,), used.max()))


def test_groups_of_a_transposed_convolution_share_grids():
    layer = nn.ConvTranspose2d(4, 6, 3, groups=2)
    _, converted = both(layer, image(2), POLICY)
    assert layer.weight_quantizer.scale.shape == (3,)
    of_outputs = converted.integer_weight.scale[[0, 1, 2, 0, 1, 2]]
    torch.testing.assert_close(converted.integer_bias.scale, converted.input_quantizer.scale * of_outputs)


def test_an_output_size_given_by_the_caller_is_kept():
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(4, 4, 3, stride=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x, output_size=[12, 12])

    model, x = Sized(), image(2)
    quantized(model, x)
    assert model(x).shape == (4, 4, 12, 12)


def rows_of(model: nn.Module, x: Tensor, policy=POLICY):
    plan, recording = make_plan(model.eval(), QuantPolicy.from_dict(policy), lambda: model(x))
    apply_plan(model, plan)
    return plan, {row.name: row for row in audit(model, plan, recording)}


@pytest.mark.parametrize(
    ("layer", "dimensions", "macs"),
    [
        pytest.param(nn.Conv3d(4, 6, 3, padding=1), 3, 6 * 125 * 4 * 27, id="conv3d"),
        pytest.param(nn.ConvTranspose2d(4, 6, 3, stride=2), 2, 4 * 25 * 6 * 9, id="transposed"),
        pytest.param(nn.ConvTranspose2d(4, 6, 3, groups=2), 2, 4 * 25 * 3 * 9, id="transposed-grouped"),
    ],
)
def test_multiplications_are_counted_where_they_happen(layer, dimensions, macs):
    _, rows = rows_of(layer, image(dimensions))
    assert rows[""].macs == macs


# -- bags, and products of two inputs ----------------------------------------------------------------------------------


class Bags(nn.Module):
    """Weighted sums of rows."""

    def __init__(self, mode: str = "sum") -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(11, 8, mode=mode)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        weights = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0))
        return self.head(self.bag(tokens, per_sample_weights=weights if self.bag.mode == "sum" else None))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_a_bag_sums_rows_of_the_quantized_table(mode, tmp_path):
    torch.manual_seed(0)
    tokens, model = torch.randint(11, (4, 5)), Bags(mode)
    fake, converted = both(model, tokens)
    assert fake.bag.input_quantizer is None  # indices and weights of samples need no grid
    with torch.no_grad():
        torch.testing.assert_close(converted(tokens), fake(tokens), rtol=0, atol=1e-5)
    assert converted.bag.integer_weight.bits == 4 and not list(converted.parameters())


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair = nn.Bilinear(6, 8, 5)

    def forward(self, x: tuple[Tensor, Tensor]) -> Tensor:
        return self.pair(*x)


def test_both_inputs_of_a_bilinear_layer_are_on_grids(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(7, 6), 5 * torch.randn(7, 8)
    model = Pair().eval()
    expected = model(x)
    plan = quantized(model, x, FINE)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=5e-3)
    assert plan.layers["pair"] == PlannedLayer("pair", ["pair.input"], ["pair.input_1"])
    fresh = Pair()
    plan = quantized(fresh, x)
    converted = convert(fresh, plan)
    save_packed(converted, plan, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(converted(x), fresh(x), rtol=0, atol=1e-5)
        assert torch.equal(load_packed(Pair(), tmp_path)(x), converted(x))
    assert converted.pair.integer_weight.codes.shape == (5, 6, 8)


NO_KERNEL = "ONNX Runtime has no integer kernel for Bilinear"


def test_a_bilinear_layer_counts_its_macs_and_both_grids():
    _, rows = rows_of(Pair(), (torch.randn(7, 6), torch.randn(7, 8)))  # type: ignore[arg-type]
    assert (rows["pair"].macs, rows["pair"].act, rows["pair"].reason) == (5 * 6 * 8, "int8", NO_KERNEL)


# -- BatchNorm ---------------------------------------------------------------------------------------------------------


NORMS = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


@torch.no_grad()
def lively(model: nn.Module) -> nn.Module:
    """Statistics and parameters as training may leave them: gammas of both signs, and one that is zero."""
    for norm in model.modules():
        if isinstance(norm, tuple(NORMS.values())):
            norm.running_mean.normal_(0, 0.3)
            norm.running_var.uniform_(0.3, 1.3)
            norm.weight.normal_()
            norm.weight[0] = 0
            norm.bias.normal_(0, 0.3)
    return model.eval()


PAIRS = [
    pytest.param(lambda: nn.Linear(4, 6), 0, id="linear"),
    pytest.param(lambda: nn.Conv1d(4, 6, 3), 1, id="conv1d"),
    pytest.param(lambda: nn.Conv2d(4, 6, 3, groups=2), 2, id="conv2d-grouped"),
    pytest.param(lambda: nn.Conv3d(4, 6, 3), 3, id="conv3d"),
    *[p for p in LAYERS[1:]],
]


POLICIES = [
    pytest.param(POLICY, id="channel"),
    pytest.param(TENSOR, id="tensor"),
    pytest.param(AFFINE, id="affine"),
    pytest.param(GROUPS, id="groups"),
]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("make", "dimensions"), PAIRS)
def test_a_batch_norm_behind_a_layer_folds_exactly(make, dimensions, policy, tmp_path):
    torch.manual_seed(0)
    layer = make()
    if policy is GROUPS and layer.weight.shape[1 - getattr(layer, "transposed", 0)] % 2:
        pytest.skip("the groups would be ragged")
    outputs = layer.out_features if dimensions == 0 else layer.out_channels
    model = lively(nn.Sequential(layer, NORMS[dimensions](outputs)))
    x = image(dimensions)
    if policy is GROUPS and getattr(layer, "transposed", False) and layer.in_channels // layer.groups % 2:
        plan = quantized(model, x, policy)
        with pytest.raises(UserError, match=r"'0': its 4 groups of channels do not consist of whole groups of 2"):
            convert(model, plan)
        return
    plan = quantized(model, x, policy)
    assert plan.batch_norms == {"0": "1"}
    converted = convert(model, plan)
    assert type(converted[1]) is nn.Identity and not converted[1].state_dict()
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(converted(x), expected, rtol=1e-5, atol=1e-5)
        save_packed(converted, plan, tmp_path)
        other = nn.Sequential(make(), NORMS[dimensions](outputs))
        assert torch.equal(load_packed(other, tmp_path)(x), converted(x))


class Chain(nn.Module):
    """A named forward over named parts."""

    def __init__(self, forward, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.body = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def conv() -> nn.Conv2d:
    return nn.Conv2d(4, 4, 3, padding=1)


def shared(m: Chain, x: Tensor) -> Tensor:
    return m.bn2(m.conv(F.relu(m.bn1(m.conv(x)))))


FOLDS = "folds into conv"
CHAINS = [
    *[
        pytest.param(
            lambda m, x, act=act: m.bn2(m.conv2(act(m.bn(m.conv(x))))),
            lambda: {"conv": conv(), "bn": nn.BatchNorm2d(4), "conv2": conv(), "bn2": nn.BatchNorm2d(4)},
            {"bn": FOLDS, "bn2": "folds into conv2"},
            id=f"conv-bn-{name}-conv-bn",
        )
        for name, act in (("relu", F.relu), ("relu6", F.relu6), ("hardswish", F.hardswish))
    ],
    pytest.param(
        lambda m, x: m.conv(m.bn(x)), lambda: {"bn": nn.BatchNorm2d(4), "conv": conv()},
        {"bn": "kept in float: follows no layer it can fold into"}, id="bn-before-conv",
    ),
    pytest.param(
        lambda m, x: m.bn(F.relu(m.conv(x))), lambda: {"conv": conv(), "bn": nn.BatchNorm2d(4)},
        {"bn": "kept in float: follows no layer it can fold into"}, id="bn-without-a-partner",
    ),
    pytest.param(
        shared, lambda: {"conv": conv(), "bn1": nn.BatchNorm2d(4), "bn2": nn.BatchNorm2d(4)},
        {n: "kept in float: 'conv' before it runs 2 times, and one bias cannot hold all that follows"
         for n in ("bn1", "bn2")},
        id="shared-conv-with-two-bns",
    ),
    pytest.param(
        lambda m, x: m.bn(y := m.conv(x)) + y, lambda: {"conv": conv(), "bn": nn.BatchNorm2d(4)},
        {"bn": "kept in float: others read the output of 'conv', too"}, id="bn-beside-another-reader",
    ),
    pytest.param(
        lambda m, x: m.bn(m.conv(m.bn(m.conv2(x)))),
        lambda: {"conv2": conv(), "conv": conv(), "bn": nn.BatchNorm2d(4)},
        {"bn": "kept in float: it runs 2 times"}, id="shared-bn",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("forward", "parts", "reasons"), CHAINS)
def test_the_converted_chain_is_the_model_in_evaluation(forward, parts, reasons):
    torch.manual_seed(0)
    x = image(2)
    model = lively(Chain(forward, **parts()))
    fake, converted = both(model, x, POLICY | {"sites": False})
    with torch.no_grad():
        torch.testing.assert_close(converted(x), fake(x), rtol=1e-5, atol=1e-5)
    _, rows = rows_of(Chain(forward, **parts()), x)
    assert {name: rows[name].reason for name in reasons} == reasons


def test_a_batch_norm_that_has_a_second_name_folds_under_both():
    torch.manual_seed(0)
    model = Chain(lambda m, x: m.other(m.conv(x)), conv=conv(), bn=nn.BatchNorm2d(4))
    model.other = model.bn
    model.held = [model.bn]  # and in a list, which is no module
    x = image(2)
    fake, converted = both(lively(model), x)
    assert type(converted.other) is type(converted.held[0]) is nn.Identity
    with torch.no_grad():
        torch.testing.assert_close(converted(x), fake(x), rtol=1e-5, atol=1e-5)
