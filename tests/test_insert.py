"""Which tensors get which grids, and that the float model is still there: the same keys, the same values, and all of it
back on removal.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import qat
from qat.calibrate import calibrate
from qat.errors import UserError
from qat.insert import apply_plan, named_quantizers, remove
from qat.models.resnet import BasicBlock
from qat.planning.audit import audit
from qat.planning.plan import Plan
from qat.planning.planner import make_plan
from qat.policies.policy import QuantPolicy

W4A4 = {"weight": {"bits": 4, "granularity": "channel"}, "act": {"bits": 4}}
IMAGE = (4, 3, 8, 8)


class Model(nn.Module):
    """Named parts, and a forward that uses them."""

    def __init__(self, forward, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.body = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def conv(channels_in: int = 3, channels_out: int = 3) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, padding=1)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x)) + x


def planned(model: nn.Module, x: Tensor | None = None, **policy) -> Plan:
    x = torch.randn(IMAGE) if x is None else x
    return make_plan(model, QuantPolicy.from_dict({**W4A4, **policy}), lambda: model(x))[0]


def inserted(model: nn.Module, x: Tensor | None = None, **policy) -> nn.Module:
    x = torch.randn(IMAGE) if x is None else x
    apply_plan(model, planned(model, x, **policy))
    calibrate(model, lambda: model(x))
    return model.eval()


def signed(plan: Plan, label: str) -> bool | None:
    return plan.activations[label].signed


# -- one tensor, one grid ----------------------------------------------------------------------------------------------


SAME_TENSOR = [
    pytest.param(lambda x: x, id="as-it-is"),
    pytest.param(lambda x: F.max_pool2d(x, 2), id="max-pool"),
    pytest.param(lambda x: F.adaptive_max_pool2d(x, 4), id="adaptive-max-pool"),
    pytest.param(lambda x: F.dropout(x, 0.5, training=False), id="dropout"),
    pytest.param(lambda x: x[:, :, ::2, ::2], id="slice"),
    pytest.param(lambda x: F.pad(x, (1, 1, 1, 1)), id="zero-padding"),
    pytest.param(lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, 0)), id="slice-and-pad"),
    pytest.param(lambda x: x.transpose(2, 3).contiguous(), id="transpose"),
    pytest.param(lambda x: x.flatten(1).view(x.shape), id="flatten-and-back"),
    pytest.param(lambda x: torch.roll(x, 1, 2), id="roll"),
]
OTHER_TENSOR = [
    pytest.param(lambda x: x * 2, id="scaled"),
    pytest.param(lambda x: F.pad(x, (1, 1, 1, 1), value=1.0), id="padding-with-ones"),
    pytest.param(lambda x: F.gelu(x), id="gelu"),
]


@pytest.mark.parametrize("between", SAME_TENSOR)
def test_readers_of_the_same_values_share_a_grid(between):
    plan = planned(Model(lambda m, x: (m.a(x), m.b(between(x))), a=conv(), b=conv()))
    assert plan.layers["b"].input == plan.layers["a"].input == ["a.input"]


@pytest.mark.parametrize("between", OTHER_TENSOR)
def test_readers_of_other_values_have_their_own(between):
    plan = planned(Model(lambda m, x: (m.a(x), m.b(between(x))), a=conv(), b=conv()))
    assert plan.layers["b"].input == ["b.input"]


def test_an_option_a_shortcut_shares_the_grid_of_the_block_it_bypasses():
    model = nn.Sequential(conv(3, 16), nn.ReLU(), BasicBlock(16, 32, stride=2))
    plan = planned(model)
    assert plan.sites["2.add_0"] == [["2.add_0.input_0"], ["2.conv1.input"]]
    assert signed(plan, "2.conv1.input") is False


@pytest.mark.parametrize(
    ("residual_first", "chains"),
    [
        pytest.param(False, (["add_0.input_1", "b.input"], ["add_0.input_1"]), id="conv-reads-first"),
        pytest.param(True, (["add_0.input_1", "b.input"], ["add_0.input_1"]), id="add-reads-first"),
    ],
)
def test_the_coarser_reader_reads_what_the_finer_grid_left(residual_first, chains):
    def forward(m, x):
        x = m.a(x)
        if residual_first:
            y = torch.zeros_like(x) + x
            return y, m.b(x)
        return m.b(x) + x

    plan = planned(Model(forward, a=conv(), b=conv()), sites={"bits": 8})
    assert (plan.layers["b"].input, plan.sites["add_0"][1]) == chains


def test_two_convolutions_of_different_widths_cascade_whichever_comes_first():
    model = Model(lambda m, x: (m.coarse(x), m.fine(x)), coarse=conv(), fine=conv())
    x = torch.randn(IMAGE)
    inserted(model, x, rules={"fine": {"match": "fine", "act": {"bits": 8}}})
    fine, coarse = model.fine.input_quantizer, model.coarse.input_quantizer
    assert [q.spec.bits for q in coarse] == [8, 4] and coarse[0] is fine
    assert torch.equal(model.coarse.quantized_input(x), coarse[1](fine(x)))


# -- signs -------------------------------------------------------------------------------------------------------------


UNSIGNED = [
    pytest.param(F.relu, id="relu"),
    pytest.param(nn.ReLU(inplace=True), id="inplace-relu"),
    pytest.param(nn.ReLU6(), id="relu6"),
    pytest.param(nn.Hardtanh(0, 4), id="hardtanh-from-zero"),
    pytest.param(lambda x: x.clamp(min=0), id="clamp"),
    pytest.param(torch.sigmoid, id="sigmoid"),
    pytest.param(lambda x: F.max_pool2d(F.relu(x), 2), id="max-pool-of-relu"),
    pytest.param(lambda x: F.dropout(F.relu(x), 0.1).flatten(1).view(x.shape), id="dropout-and-flatten-of-relu"),
    pytest.param(lambda x: F.relu(x) + F.relu(-x), id="sum-of-relus"),
    pytest.param(lambda x: F.relu(x).add_(F.relu(-x)), id="inplace-sum-of-relus"),
    pytest.param(lambda x: torch.multiply(F.relu(x), F.relu(x)), id="product-of-relus"),
    pytest.param(lambda x: F.relu(x).multiply(F.relu(x)), id="product-of-relus-by-a-method"),
    pytest.param(lambda x: torch.cat([F.relu(x), F.relu(-x)], 2), id="concatenation-of-relus"),
    pytest.param(lambda x: 2 * F.relu(x) + 1, id="positive-constants"),
    pytest.param(lambda x: F.interpolate(F.relu(x), scale_factor=2), id="nearest-interpolation"),
]
SIGNED = [
    pytest.param(F.gelu, id="gelu"),
    pytest.param(lambda x: x.clamp(min=-1), id="clamp-below-zero"),
    pytest.param(lambda x: F.relu(x) + x, id="sum-with-one-relu"),
    pytest.param(lambda x: F.relu(x) * -1, id="negated"),
    pytest.param(lambda x: F.relu(x) + -1.0, id="shifted-down"),
    pytest.param(lambda x: F.relu(x).add(F.relu(-x), alpha=-1), id="difference"),
    pytest.param(lambda x: torch.cat([F.relu(x), x], 2), id="concatenation-with-one-relu"),
    pytest.param(lambda x: F.interpolate(F.relu(x), scale_factor=2, mode="bicubic"), id="bicubic-overshoots"),
    pytest.param(lambda x: F.relu(x).sub_(1), id="inplace-shift-of-a-relu"),
]


@pytest.mark.parametrize(
    ("between", "sign"),
    [pytest.param(*p.values, False, id=p.id) for p in UNSIGNED]
    + [pytest.param(*p.values, True, id=p.id) for p in SIGNED],
)
def test_a_tensor_that_is_known_to_be_nonnegative_gets_an_unsigned_grid(between, sign):
    plan = planned(Model(lambda m, x: m.b(between(m.a(x))), a=conv(), b=conv()))
    assert signed(plan, "b.input") is sign


def test_max_pool_and_flatten_keep_the_grid_unsigned_up_to_the_head():
    model = nn.Sequential(conv(), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(), nn.Flatten(), nn.Linear(48, 10))
    assert signed(planned(model), "5.input") is False


def test_a_block_that_once_reads_negative_values_is_signed():
    plan = planned(Model(lambda m, x: m.b(m.b(F.relu(x))), b=conv()))
    assert signed(plan, "b.input") is True


# -- sites -------------------------------------------------------------------------------------------------------------


def shortcut_inplace(m, x):
    y = m.a(x)
    y += x
    return y


SITES = [
    pytest.param(lambda m, x: m.a(x) + x, {"add_0": 2}, id="plus"),
    pytest.param(shortcut_inplace, {"add_0": 2}, id="plus-equals"),
    pytest.param(lambda m, x: torch.add(m.a(x), other=x), {"add_0": 2}, id="operand-by-name"),
    pytest.param(lambda m, x: F.avg_pool2d(input=m.a(x), kernel_size=2), {"avg_pool_0": 1}, id="pool-by-name"),
    pytest.param(lambda m, x: m.a(x).mean((2, 3)), {"avg_pool_0": 1}, id="mean-over-pixels"),
    pytest.param(lambda m, x: m.a(x).mean(1), {}, id="mean-over-channels"),
    pytest.param(lambda m, x: m.a(x) + 1, {}, id="plus-a-number"),
    pytest.param(lambda m, x: m.a(x) + m.a.weight.sum(), {"add_0": 2}, id="plus-a-computed-scalar"),
    pytest.param(lambda m, x: m.a(x) + m.a.bias.view(-1, 1, 1), {"add_0": 2}, id="plus-a-view-of-a-parameter"),
    pytest.param(lambda m, x: (m.a(x) + x) + x, {"add_0": 2, "add_1": 2}, id="two-sums"),
]


@pytest.mark.parametrize(("forward", "sites"), SITES)
def test_functional_sites_are_found_and_run(forward, sites):
    x = torch.randn(IMAGE)
    model = Model(forward, a=conv())
    assert {name: len(inputs) for name, inputs in planned(model, x).sites.items()} == sites
    inserted(model, x)
    seen = [name for name, q in named_quantizers(model) if not q.is_weight]
    assert len(seen) == len({label for label in planned(copy.deepcopy(remove_(model)), x).activations})


def remove_(model: nn.Module) -> nn.Module:
    remove(model)
    return model


class Loss(nn.Module):
    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return (x - target).square().mean() + x.abs().mean()


def test_losses_outside_the_forward_are_no_sites():
    class WithLoss(Model):
        def step(self, x: Tensor) -> Tensor:
            return self.loss(self(x), x) + self(x).view(1, -1).abs().sum()

    model = WithLoss(lambda m, x: m.a(x) + x, a=conv(), loss=Loss())
    x = torch.randn(IMAGE)
    plan, _ = make_plan(model, QuantPolicy.from_dict(W4A4), lambda: model.step(x))
    assert list(plan.sites) == ["add_0"] and list(plan.owners) == [""]
    apply_plan(model, plan)
    calibrate(model, lambda: model.step(x))
    assert model.step(x).isfinite()


def test_a_model_whose_step_never_calls_its_forward_is_quantized_by_its_parts():
    model = Model(None, encoder=Block(), decoder=conv())
    x = torch.randn(IMAGE)
    step = lambda: model.decoder(model.encoder(x))  # noqa: E731
    plan, _ = make_plan(model, QuantPolicy.from_dict(W4A4), step)
    assert set(plan.weights) == {"encoder.conv", "decoder"} and set(plan.sites) == {"encoder.add_0"}
    before = step()
    apply_plan(model, plan)
    calibrate(model, step)
    assert not torch.equal(step(), before)


def test_a_block_called_twice_has_one_set_of_quantizers():
    x = torch.randn(IMAGE)
    model = inserted(Model(lambda m, x: m.block(m.block(x)), block=Block()), x)
    names = [name for name, _ in named_quantizers(model)]
    assert names == ["block.conv.input_quantizer", "block.conv.weight_quantizer", "block.add_0.input_quantizer_0"]
    block = model.block
    assert torch.equal(model(x), block(block(x)))


def test_nested_owners_count_their_own_sites_only():
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Block()
            self.pool = nn.AvgPool2d(2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.inner(x) + x
            return self.pool(self.inner(y) + y)

    plan = planned(Outer())
    assert plan.owners == {"": ["add", "add"], "inner": ["add"]}
    assert set(plan.sites) == {"add_0", "add_1", "inner.add_0"}
    assert inserted(Outer()).pool.input_quantizer is not None


class Flaky(nn.Module):
    """Runs `extra` further sums in training."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x) + x
        return x + x if self.training else x


def test_sites_that_change_between_passes_say_so():
    model = inserted(Model(lambda m, x: m.part(x), part=Flaky())).train()
    message = r"forward of 'part' \(Flaky\) ran 2 add sites, but 1 add site before; .*match: 'part.add_\*', act: off"
    with pytest.raises(UserError, match=message):
        model(torch.randn(IMAGE))


def test_the_rule_that_the_message_offers_helps():
    model = inserted(Model(lambda m, x: m.part(x), part=Flaky()), rules={"r": {"match": "part.add_*", "act": False}})
    assert model.train()(torch.randn(IMAGE)).isfinite().all()


def test_two_forwards_of_a_module_that_differ_are_an_error_at_insertion():
    class Switched(nn.Module):
        def forward(self, x: Tensor, twice: bool) -> Tensor:
            return x + x + x if twice else x + x

    with pytest.raises(UserError, match=r"forward of 'part' \(Switched\) ran 2 add sites, but 1 add site before"):
        planned(Model(lambda m, x: m.part(m.part(m.a(x), False), True), a=conv(), part=Switched()))


def test_a_child_that_has_the_name_of_a_site_is_an_error_and_nothing_is_changed():
    model = Model(lambda m, x: m.add_0(x) + x, add_0=conv())
    with pytest.raises(UserError, match="'add_0' names a functional site"):
        apply_plan(model, planned(model))
    assert type(model.add_0) is nn.Conv2d and type(model) is Model


# -- weights -----------------------------------------------------------------------------------------------------------


def language_model() -> Model:
    model = Model(
        lambda m, x: m.head(m.mix(m.embed(x))), embed=nn.Embedding(11, 8), mix=nn.Linear(8, 8), head=nn.Linear(8, 11)
    )
    model.head.weight = model.embed.weight
    return model


def test_tied_weights_share_one_quantizer_and_stay_tied():
    tokens = torch.randint(11, (4, 5))
    model = inserted(language_model(), tokens)
    assert model.head.weight_quantizer is model.embed.weight_quantizer
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.head.quantized_weight(), model.embed.quantized_weight())


def test_tied_weights_with_two_grids_are_an_error():
    with pytest.raises(UserError, match="'head' and 'embed' are one weight, but the policy gives them different grids"):
        planned(language_model(), torch.randint(11, (4, 5)), rules={"r": {"match": "head", "weight": {"bits": 8}}})


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, 2 * self.weight, self.bias)


def pruned(name: str) -> nn.Linear:
    return prune.l1_unstructured(nn.Linear(8, 8), name, 0.5)


def hooked() -> nn.Linear:
    return nn.utils.spectral_norm(nn.Linear(8, 8))  # type: ignore[return-value]


def with_forward_of_its_own() -> nn.Linear:
    layer = nn.Linear(8, 8)
    layer.forward = lambda x: F.linear(x, 2 * layer.weight)  # type: ignore[method-assign]
    return layer


LEFT_FLOAT = [
    pytest.param(lambda: Scaled(8, 8), "subclass of Linear with a forward of its own", id="subclass-with-own-forward"),
    pytest.param(
        with_forward_of_its_own, "subclass of Linear with a forward of its own", id="instance-with-own-forward"
    ),
    pytest.param(hooked, "weight is computed", id="weight-norm-by-a-hook"),
    pytest.param(lambda: pruned("weight"), "weight is computed", id="pruned"),
    pytest.param(lambda: pruned("bias"), "bias is computed", id="pruned-bias"),
    pytest.param(lambda: nn.PReLU(8), "no quantized version of PReLU", id="unknown-layer"),
]


@pytest.mark.parametrize(("layer", "reason"), LEFT_FLOAT)
def test_what_cannot_be_quantized_stays_float_and_is_audited(layer, reason):
    x = torch.randn(4, 8)
    part = layer()
    kind = type(part)
    model = Model(lambda m, x: m.odd(m.a(x)), a=nn.Linear(8, 8), odd=part)
    plan, recording = make_plan(model, QuantPolicy.from_dict(W4A4), lambda: model(x))
    apply_plan(model, plan)
    calibrate(model, lambda: model(x))
    assert type(model.odd) is kind and model(x).isfinite().all()
    (row,) = [r for r in audit(model, plan, recording) if r.name == "odd"]
    assert row.weight is None and row.reason is not None and reason in row.reason


@pytest.mark.parametrize(
    ("forward", "folds"),
    [
        pytest.param(lambda m, x: m.bn(m.conv(x)), True, id="directly-behind"),
        pytest.param(lambda m, x: m.bn(F.relu(m.conv(x))), False, id="behind-a-relu"),
        pytest.param(lambda m, x: (m.bn(y := m.conv(x)), y), False, id="the-convolution-is-an-output-too"),
        pytest.param(lambda m, x: m.bn(y := m.conv(x)) + y, False, id="the-convolution-has-another-reader"),
        pytest.param(lambda m, x: m.bn(m.conv(m.conv(x))), False, id="the-convolution-runs-twice"),
        pytest.param(lambda m, x: m.bn(m.conv(m.bn(x))), False, id="the-norm-runs-twice"),
    ],
)
def test_a_batch_norm_folds_where_it_alone_reads_a_layer(forward, folds):
    model = Model(forward, conv=conv(), bn=nn.BatchNorm2d(3))
    assert planned(model).batch_norms == ({"conv": "bn"} if folds else {})


@pytest.mark.parametrize(
    ("layer", "norm", "shape", "folds"),
    [
        pytest.param(nn.Linear(8, 8), nn.BatchNorm1d(8), (4, 8), True, id="linear"),
        pytest.param(nn.Linear(8, 8), nn.BatchNorm1d(8), (4, 8, 8), False, id="the-norm-sees-another-axis"),
        pytest.param(nn.Conv1d(8, 8, 1), nn.BatchNorm1d(8), (4, 8, 8), True, id="conv1d"),
        pytest.param(nn.Linear(8, 8), nn.BatchNorm1d(8, track_running_stats=False), (4, 8), False, id="no-statistics"),
        pytest.param(pruned("weight"), nn.BatchNorm1d(8), (4, 8), False, id="pruned"),
    ],
)
def test_a_batch_norm_folds_along_the_channels_of_the_layer(layer, norm, shape, folds):
    model = nn.Sequential(nn.Linear(8, 8), layer, norm)
    assert planned(model, torch.randn(shape)).batch_norms == ({"1": "2"} if folds else {})


def test_a_float_layer_has_no_batch_norm_to_fold():
    model = nn.Sequential(conv(), nn.BatchNorm2d(3), conv())
    plan, recording = make_plan(
        model,
        QuantPolicy.from_dict({**W4A4, "rules": {"r": {"match": "0", "weight": False}}}),
        lambda: model(torch.randn(IMAGE)),
    )
    assert plan.batch_norms == {}
    apply_plan(model, plan)
    assert [r.folds for r in audit(model, plan, recording)] == [False, False, False]


# -- the float model is still there ------------------------------------------------------------------------------------


def resnet() -> nn.Module:
    torch.manual_seed(0)
    stem = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)]
    return nn.Sequential(*stem, BasicBlock(16, 16, 1), BasicBlock(16, 32, 2), *head)


def test_every_float_key_is_kept_bit_for_bit_and_only_quantizers_come_in_between():
    model = resnet()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    inserted(model)
    after = model.state_dict()
    own = {f"{name}.{k}" for name, q in named_quantizers(model) for k in q.state_dict()}
    assert own  # every module that has a quantizer under a second name repeats its keys
    names = ("input_quantizer", "weight_quantizer")
    kept = {k: v for k, v in after.items() if not any(n in k for n in names)}
    assert list(kept) == list(before)
    assert all(torch.equal(kept[k], v) for k, v in before.items())
    assert own <= set(after)


def test_what_is_inserted_is_in_the_mode_of_the_module_that_it_is_in():
    model, x = resnet().train(), torch.randn(IMAGE)
    model[0].eval()
    apply_plan(model, planned(model, x))
    modes = {name: quantizer.training for name, quantizer in named_quantizers(model)}
    assert {training for name, training in modes.items() if name.startswith("0.")} == {False}
    assert any(training for name, training in modes.items() if name.endswith("weight_quantizer"))


def test_removal_gives_back_classes_keys_and_outputs():
    model, x = resnet().eval(), torch.randn(IMAGE)
    keys, classes, attributes = list(model.state_dict()), [type(m) for m in model.modules()], attributes_of(model)
    before = model(x)
    inserted(model, x)
    assert not torch.equal(model(x), before)
    remove(model)
    assert torch.equal(model(x), before)
    assert list(model.state_dict()) == keys
    assert [type(m) for m in model.modules()] == classes
    assert attributes_of(model) == attributes


def attributes_of(model: nn.Module) -> list[set[str]]:
    return [set(vars(m)) for m in model.modules()]


def test_planning_leaves_no_trace():
    model = resnet().train()
    model[1].eval()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    attributes, random = attributes_of(model), torch.get_rng_state()
    x = torch.randn(IMAGE, generator=torch.Generator().manual_seed(0))
    planned(model, x)
    assert attributes_of(model) == attributes and [m.training for m in model.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_a_plan_survives_plain_containers_and_rebuilds_the_same_quantizers():
    x = torch.randn(IMAGE)
    model, again = resnet(), resnet()
    plan = planned(model, x)
    assert Plan.from_dict(plan.to_dict()) == plan
    apply_plan(model, plan)
    calibrate(model, lambda: model(x))
    apply_plan(again, Plan.from_dict(plan.to_dict()))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(x), model.eval()(x))


class OfAllKinds(nn.Module):
    """Has all that a plan tells of a layer, a weight of a site and an operand, but experts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.tied, self.pair = nn.Linear(4, 4), nn.Linear(4, 4), nn.Bilinear(4, 4, 4)
        self.tied.weight = self.first.weight
        self.attn, self.cell, self.up = nn.MultiheadAttention(4, 1), nn.RNNCell(4, 4), nn.ConvTranspose1d(4, 6, 1)
        self.weight, self.shift = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.tied(self.first(x)) * self.first.weight.mean() + self.shift
        h = F.linear(self.pair(h, x), self.weight)
        return self.up(self.cell(self.attn(h, h, h)[0])[..., None])


STORED = {
    "layers": {
        "first": {"weight": "first", "input": ["first.input"], "read": True},
        "tied": {"weight": "first", "input": ["tied.input"], "read": True},
        "pair": {"weight": "pair", "input": ["pair.input"], "input_1": ["first.input"]},
        "attn.q_proj": {
            "weight": "attn.q_proj", "input": ["attn.q_proj.input"], "parameter": "attn.in_proj_weight", "rows": [0, 4],
        },
        "attn.k_proj": {
            "weight": "attn.k_proj", "input": ["attn.q_proj.input"], "parameter": "attn.in_proj_weight", "rows": [4, 4],
        },
        "attn.v_proj": {
            "weight": "attn.v_proj", "input": ["attn.q_proj.input"], "parameter": "attn.in_proj_weight", "rows": [8, 4],
        },
        "attn.out_proj": {"weight": None, "input": []},
        "cell.ih": {"weight": "cell.ih", "input": ["cell.ih.input"], "parameter": "cell.weight_ih"},
        "cell.hh": {"weight": "cell.hh", "input": ["cell.hh.input"], "parameter": "cell.weight_hh"},
        "up": {"weight": "up", "input": ["up.input"], "axis": 1},
    },
    "parameters": {"linear_0": {"parameter": "weight", "axis": 0, "weight": "linear_0", "alone": True}},
    "operands": {"add_0": {"parameter": "shift", "index": 1, "alone": True}},
}  # fmt: skip


def test_a_plan_is_stored_as_dictionaries_of_what_does_not_go_without_saying():
    rules = {"float": {"match": "attn.out_proj", "weight": False, "act": False}}
    plan = planned(OfAllKinds(), torch.randn(3, 4), rules=rules)
    stored = plan.to_dict()
    assert {key: stored[key] for key in STORED} == STORED
    assert Plan.from_dict(stored) == plan
    experts = {"parameter": "experts.down_proj", "axis": 0, "weight": None, "alone": False, "stacked": "in_out"}
    stored["parameters"]["experts.grouped_mm_1"] = experts
    assert Plan.from_dict(stored).to_dict() == stored


# -- what goes wrong says so -------------------------------------------------------------------------------------------


def test_inserting_twice_is_an_error():
    model = nn.Sequential(nn.Linear(8, 8))
    plan = planned(model, torch.randn(4, 8))
    apply_plan(model, plan)
    with pytest.raises(UserError, match=r"^Sequential holds quantizers already; qat\.remove\(model\) takes them out"):
        apply_plan(model, plan)
    qat.remove(model)
    apply_plan(model, plan)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        pytest.param(
            lambda: Model(None, laier=nn.Linear(8, 8)), "no module 'layer' in Model; did you mean 'laier'", id="name"
        ),
        pytest.param(
            lambda: Model(None, layer=nn.LSTM(8, 8)), "'layer' is a LSTM that cannot be quantized", id="class"
        ),
        pytest.param(lambda: Model(None, layer=pruned("weight")), "'layer' is a Linear that cannot be", id="pruned"),
    ],
)
def test_a_plan_for_another_model_is_an_error(other, message):
    plan = planned(Model(lambda m, x: m.layer(x), layer=nn.Linear(8, 8)), torch.randn(4, 8))
    with pytest.raises(UserError, match=message):
        apply_plan(other(), plan)


def test_a_group_size_that_does_not_fit_names_the_layer_and_changes_nothing():
    model = nn.Sequential(nn.Linear(8, 9), nn.Linear(9, 8))
    plan = planned(model, torch.randn(4, 8), weight={"granularity": "group", "group_size": 4})
    said = r"layer '1': group_size=4 does not divide the 9 .*group_size \(of quant, or of a rule\) to 3"
    with pytest.raises(UserError, match=said):
        apply_plan(model, plan)
    assert type(model[0]) is nn.Linear and not list(named_quantizers(model))


@pytest.mark.parametrize(
    ("model", "policy", "message"),
    [
        pytest.param(nn.ReLU(), W4A4, "ReLU has no layer that can be quantized", id="no-layer"),
        pytest.param(nn.Linear(8, 8), {}, "the policy leaves everything float", id="policy-off"),
        pytest.param(nn.Linear(8, 8), {**W4A4, "rules": {"r": {"match": "head", "act": False}}},
                     "no layer matches 'head'",
                     id="rule-that-matches-nothing"),
    ],
)  # fmt: skip
def test_nothing_to_quantize_is_an_error(model, policy, message):
    with pytest.raises(UserError, match=message):
        make_plan(model, QuantPolicy.from_dict(policy), lambda: model(torch.randn(4, 8)))


def test_a_model_that_is_one_layer_can_be_quantized():
    model = inserted(nn.Linear(8, 8), torch.randn(4, 8))
    assert [name for name, _ in named_quantizers(model)] == ["input_quantizer", "weight_quantizer"]


def test_arguments_by_name_reach_the_grid():
    x = torch.randn(4, 8)
    model = inserted(Model(lambda m, x: m.a(input=x), a=nn.Linear(8, 8)), x)
    assert torch.equal(model(x), model.a(model.a.input_quantizer(x)))


def test_user_hooks_that_add_are_counted_the_same_when_recording_and_running():
    model = Model(lambda m, x: m.block(x) + x, block=Block())
    model.block.register_forward_pre_hook(lambda module, args: (args[0] + args[0],))
    model.block.register_forward_hook(lambda module, args, output: output + args[0])
    x = torch.randn(IMAGE)
    assert planned(model, x).owners == {"": ["add"] * 3, "block": ["add"]}
    assert inserted(model, x)(x).isfinite().all()
