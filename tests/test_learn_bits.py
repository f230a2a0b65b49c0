"""Learned bit-widths: gradients against closed forms, budgets kept to the letter, resumed, and a YAML that trains."""

import json

import pytest
import torch
import yaml
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins import MixedPrecision
from tiny_module import Tiny, loader, trainer
from torch import nn

import qat
from qat.cli import main
from qat.errors import UserError
from qat.grid.spec import QuantSpec
from qat.insert import named_quantizers
from qat.lightning import AnnealBits, LearnBits, QATCallback, load_from_checkpoint
from qat.policies.policy import QuantPolicy
from qat.quantizers import create
from qat.search import Search
from qat.search.costs import Files, make_costs
from qat.search.fractional import FractionalGrid, RelaxedCost, Width, all_pairs, check_learnable, first_scales
from qat.search.learned import check_grids, fractional_grids, shared_widths
from qat.search.space import make_space

POLICY = {"weight": {"bits": 4, "granularity": "channel"}, "act": {"bits": 4}, "sites": {"bits": 8}}
WIDTHS = [2, 3, 4, 8]


def _grid(quantizer: str = "lsq", at: float = 3.3, granularity: str = "channel", width: int = 4):
    """A learned grid of a weight, and the weight."""
    weight = torch.randn(6, 10, generator=torch.Generator().manual_seed(0)).requires_grad_()
    group = 5 if granularity == "group" else None
    specs = {
        bits: QuantSpec(bits=bits, granularity=granularity, group_size=group, quantizer=quantizer).resolved(
            nonnegative=False, weight=True
        )
        for bits in WIDTHS
    }
    inner = create(specs[width], weight.shape)
    inner.calibrate(weight.detach())
    grid = FractionalGrid(inner, specs, first_scales(inner, specs, weight.detach()), Width(WIDTHS, at))
    grid.attach()
    return grid, weight


# -- one grid ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [2.0, 2.25, 3.5, 5.0, 8.0])
@pytest.mark.parametrize("quantizer", ["lsq", "fixed", "ewgs"])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
def test_between_two_widths_value_and_gradients_are_the_closed_form(quantizer, at, granularity):
    grid, weight = _grid(quantizer, at, granularity)
    upstream = torch.randn(6, 10, generator=torch.Generator().manual_seed(1))
    y = grid.quantizer(weight)
    (y * upstream).sum().backward()
    low, high = {2.0: (2, 3), 2.25: (2, 3), 3.5: (3, 4), 5.0: (4, 8), 8.0: (4, 8)}[at]
    share = (at - low) / (high - low)
    by_hand, grad_x = {}, torch.zeros_like(weight)
    for bits, part in ((low, 1 - share), (high, share)):
        alone = create(grid.specs[bits], weight.shape)
        alone.calibrate(weight.detach())
        x = weight.detach().clone().requires_grad_()
        by_hand[bits] = alone(x)
        (by_hand[bits] * upstream).sum().backward()
        grad_x += part * x.grad
    torch.testing.assert_close(y, (1 - share) * by_hand[low] + share * by_hand[high], rtol=0, atol=1e-6)
    slope = (upstream * (by_hand[high] - by_hand[low])).sum() / (high - low)
    torch.testing.assert_close(grid.width.value.grad, slope, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weight.grad, grad_x, rtol=1e-6, atol=1e-6)


def test_the_gradient_of_a_width_is_the_finite_difference():
    grid, weight = _grid(at=3.3)
    loss = lambda: grid.quantizer(weight).square().sum()  # noqa: E731
    loss().backward()
    values = []
    for at in (3.29, 3.31):
        with torch.no_grad():
            grid.width.value.fill_(at)
            grid.width.clamp()
            values.append(loss().double())
    assert grid.width.value.grad.item() == pytest.approx((values[1] - values[0]).item() / 0.02, rel=5e-3)


def test_the_scale_s_gradient_is_that_of_both_grids_each_in_its_own_unit():
    grid, weight = _grid(at=3.25)
    grid.quantizer(weight).sum().backward()
    whole = torch.zeros_like(grid.quantizer.scale)
    for bits, share in ((3, 0.75), (4, 0.25)):
        alone = create(grid.specs[bits], weight.shape)
        alone.calibrate(weight.detach())
        alone(weight.detach()).sum().backward()
        # LSQ's factor 1 / sqrt(N quant_max) is that of the nearest width, 3 bits.
        factor = (alone.quant_max / grid.specs[3].quant_max) ** 0.5
        whole += share * factor * alone.scale.grad * grid.starts[bits] / grid.starts[3]
    torch.testing.assert_close(grid.quantizer.scale.grad, whole, rtol=1e-4, atol=1e-5)


def test_in_the_middle_of_two_widths_the_wider_is_the_nearest():
    assert [Width([2, 4, 8], at).nearest for at in (2.9, 3.0, 5.9, 6.0)] == [2, 4, 4, 8]


def test_evaluation_has_the_nearest_width_on_its_own_calibrated_grid():
    grid, weight = _grid(at=2.4)
    grid.quantizer.eval()
    alone = create(grid.specs[2], weight.shape)
    alone.calibrate(weight.detach())
    torch.testing.assert_close(grid.quantizer(weight), alone(weight), rtol=1e-6, atol=0)
    assert grid.quantizer.spec.bits == 2 and not grid.quantizer.spec.narrow, "as a policy with 2 bits would have it"
    grid.detach()
    assert "forward" not in grid.quantizer.__dict__


# -- a model -----------------------------------------------------------------------------------------------------------


def _space(policy=POLICY, **settings):
    model = Tiny().eval()
    x = next(iter(loader()))[0]
    search = Search(**{"weight_bits": WIDTHS, "act_bits": WIDTHS, **settings})
    space = make_space(model, QuantPolicy.from_dict(policy), search, lambda: model(x))
    quantized = Tiny().eval()
    qat.quantize(quantized, policy, x)
    return space, quantized, lambda: quantized(x)


def test_costs_between_widths_are_the_table_s_at_whole_ones_and_multilinear_between():
    space, model, _ = _space()
    every = {t: space.widths(t) for t in space.tensors}
    widths = shared_widths(space, model)
    cost = make_costs(space, Files())["bops"]
    relaxed = RelaxedCost(cost, space.layers)
    for bits in (2, 3, 8):
        for width in widths.values():
            width.value.data.fill_(bits)
            width.clamp()
        pairs = {layer.name: (bits, bits if layer.act else None) for layer in space.layers}
        assert relaxed.total(widths).item() == pytest.approx(cost.total(pairs))
    for i, width in enumerate(widths.values()):
        width.value.data.fill_(2.5 + 0.7 * i)
        width.clamp()
    by_hand = cost.fixed
    for layer in space.layers:
        macs = space.rows[layer.name].macs
        act = widths[layer.act].at if layer.act else space.rows[layer.name].act_bits
        by_hand += macs * widths[layer.weight].at * act
    total = relaxed.total(widths)
    assert total.item() == pytest.approx(by_hand, rel=1e-6)
    total.backward()
    conv = next(layer for layer in space.layers if layer.name == "net.conv")
    slope = space.rows["net.conv"].macs * widths[conv.act].at
    assert widths[conv.weight].value.grad.item() == pytest.approx(slope, rel=1e-5)
    assert set(all_pairs(conv, every)) == {(w, a) for w in WIDTHS for a in WIDTHS}


def test_tied_layers_share_widths_and_a_layer_with_one_choice_keeps_it():
    space, model, run = _space(tie=["net.[sc]*"], least={"@last": 8})
    widths = shared_widths(space, model)
    assert widths["net.stem.weight"] is widths["net.conv.weight"]
    assert widths["net.head.weight"].fixed and widths["net.head.weight"].widths == [8]
    grids, _ = fractional_grids(space, model, widths, run)
    for grid in grids["net.head.weight"]:
        grid.attach()
    assert model.net.head.weight_quantizer.spec.bits == 8
    assert "forward" not in model.net.head.weight_quantizer.__dict__


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        pytest.param({**POLICY, "sites": {}}, "is read by 'net.add_0' too, whose bits are not learned", id="site"),
        pytest.param(
            {**POLICY, "act": {"bits": 4, "quantizer": "minmax"}}, "quantizer=minmax has more than one", id="minmax"
        ),
        pytest.param({**POLICY, "act": {"bits": 4, "quantizer": "dsq"}}, "quantizer=dsq hardens", id="dsq"),
        pytest.param(
            {**POLICY, "act": {"bits": 4, "symmetric": False}}, "learned widths need symmetric: true", id="affine"
        ),
    ],
)
def test_a_grid_whose_width_cannot_be_learned_is_named(policy, said):
    space, model, _ = _space(policy)
    with pytest.raises(UserError, match=said.replace("(", r"\(")):
        check_grids(space, model, shared_widths(space, model))


def test_the_quantizers_that_the_message_recommends_can_be_learned():
    for quantizer in ("lsq", "fixed", "ewgs", "pact"):
        spec = QuantSpec(bits=4, quantizer=quantizer).resolved(nonnegative=True, weight=False)
        check_learnable("x", create(spec))


# -- training ----------------------------------------------------------------------------------------------------------


def _fit(learn: LearnBits, *callbacks, ckpt=None):
    module = Tiny()
    fit = trainer(None, learn, *callbacks, policy=POLICY, max_epochs=4, enable_checkpointing=bool(callbacks))
    fit.fit(module, loader(32), ckpt_path=ckpt, weights_only=True)
    return module


@pytest.mark.parametrize(
    ("settings", "check"),
    [
        pytest.param({"budget": {"avg_bits": 3}}, lambda c, t: t["avg_bits"] <= 3, id="avg_bits"),
        pytest.param({"budget": {"avg_bits": 4, "bops": 40_000}}, lambda c, t: t["bops"] <= 40_000, id="two-budgets"),
        pytest.param({"budget": {"packed": 2930}}, lambda c, t: t["packed"] <= 2930, id="packed"),
        pytest.param(
            {"budget": {"avg_bits": 5}, "pairs": [[4, 4], [8, 8]]},
            lambda c, t: all(p in ((4, 4), (8, 8)) for p in c.values()),
            id="pairs",
        ),
        pytest.param(
            {"budget": {"avg_bits": 4}, "tie": ["net.[sc]*"], "least": {"@last": 8}},
            lambda c, t: c["net.stem"] == c["net.conv"] and c["net.head"] == (8, 8),
            id="ties-and-least",
        ),
    ],
)
def test_what_training_ends_with_keeps_budgets_ties_and_pairs(settings, check, tmp_path):
    output = tmp_path / "quant" / "learned.yaml"
    learn = LearnBits(**{"weight_bits": WIDTHS, "act_bits": WIDTHS, "lr": 0.2, "output": str(output), **settings})
    module = _fit(learn)
    content = yaml.safe_load(output.read_text())
    assert check(learn.choice, content["predicted"])
    rules = {n: r for n, r in content["rules"].items() if n.startswith("searched_")}
    chosen = {name: (r["weight"]["bits"], r["act"]["bits"]) for r in rules.values() for name in r["match"]}
    assert chosen == learn.choice
    for name, (weight, act) in chosen.items():
        layer = module.get_submodule(name)
        grid = layer.input_quantizer
        grid = grid[-1] if isinstance(grid, nn.Sequential) else grid
        assert (layer.weight_quantizer.spec.bits, grid.spec.bits) == (weight, act)
        assert module.quantization_plan.weights[name].bits == weight
    assert all("forward" not in q.__dict__ for _, q in named_quantizers(module))


def test_the_widths_of_one_network_are_learned_alone(tmp_path):
    output = tmp_path / "quant" / "learned.yaml"
    learn = LearnBits({"avg_bits": 3}, WIDTHS, WIDTHS, lr=0.2, output=str(output))
    module = Tiny()
    trainer(None, QATCallback(POLICY, 16, module="net"), learn, policy=None, max_epochs=4).fit(module, loader(32))
    rules = yaml.safe_load(output.read_text())["modules"]["net"]["rules"]
    chosen = {f"net.{n}": (r["weight"]["bits"], r["act"]["bits"]) for r in rules.values() for n in r["match"]}
    assert chosen == learn.choice
    assert {name: spec.bits for name, spec in module.quantization_plan.weights.items()} == {
        name: weight for name, (weight, _) in chosen.items()
    }


def test_the_width_of_the_data_s_own_grid_learns_as_all_others_do():
    class Watched(LearnBits):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
            free = {name: width.value.grad for name, width in self.learned.widths.items() if not width.fixed}
            seen.append({name for name, gradient in free.items() if gradient is None or not gradient.any()})
            super().on_before_optimizer_step(trainer, pl_module, optimizer)

    seen: list[set[str]] = []
    learn = Watched({"avg_bits": 4.0}, least={})  # a budget that says nothing of inputs
    trainer(None, learn, policy=POLICY, max_epochs=1).fit(Tiny(), loader())
    assert "net.stem.input" in learn.learned.widths and seen[0] == set()


def test_the_projection_behind_an_attention_learns_as_any_layer_does():
    module = Tiny()
    encoder = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
    module.net = nn.Sequential(nn.Flatten(1, 2), encoder, nn.Flatten(), nn.Linear(36, 3))
    learn = LearnBits({"avg_bits": 4, "bops": 300_000}, WIDTHS, WIDTHS)
    trainer(None, learn, policy=POLICY, max_epochs=2).fit(module, loader())
    assert set(learn.choice) == {"net.1.self_attn.out_proj", "net.1.linear1", "net.1.linear2", "net.3"}


def test_a_tight_budget_narrows_and_a_wide_one_does_not():
    wide, tight = (LearnBits({"avg_bits": b}, WIDTHS, WIDTHS, lr=0.1, until=3) for b in (8, 2.5))
    for learn in (wide, tight):
        _fit(learn)
    mean = [sum(w.at for t, w in c.learned.widths.items() if t.endswith(".weight")) / 3 for c in (wide, tight)]
    assert mean[1] < 3 < mean[0]


def test_widths_and_penalty_are_logged():
    learn = LearnBits({"avg_bits": 3}, WIDTHS, WIDTHS, until=3)
    logged = {}
    learn_end = learn.on_train_epoch_end

    def spy(fit, module):
        learn_end(fit, module)
        logged.update({k: float(v) for k, v in fit.callback_metrics.items() if k.startswith("bits/")})

    learn.on_train_epoch_end = spy
    _fit(learn)
    assert {"bits/net.conv.weight", "bits/cost/avg_bits", "bits/penalty"} <= set(logged)
    over = max(0.0, logged["bits/cost/avg_bits"] / 3 - 1)
    assert logged["bits/penalty"] == pytest.approx(10 * over**2, abs=1e-6)


@pytest.mark.parametrize("until", [3, 1], ids=["while-learned", "after-they-are-whole"])
def test_a_resumed_training_ends_with_the_same_numbers(tmp_path, until):
    def learn() -> LearnBits:
        return LearnBits({"avg_bits": 3}, WIDTHS, WIDTHS, lr=0.2, until=until)

    whole = _fit(learn(), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1))
    resumed = _fit(learn(), ckpt=tmp_path / "epoch=1.ckpt")
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)
    assert resumed.quantization_plan == whole.quantization_plan


class Manual(Tiny):
    """Steps its optimizer itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


def test_a_module_that_steps_by_hand_learns_the_same_widths():
    learned = []
    for kind in (Tiny, Manual):
        torch.manual_seed(0)
        learned.append(LearnBits({"avg_bits": 3}, WIDTHS, WIDTHS, lr=0.2, until=2))
        fit = trainer(None, learned[-1], policy=POLICY, max_epochs=3)
        fit.fit(kind(), loader(32))
    widths = [{tensor: width.at for tensor, width in learn.learned.widths.items()} for learn in learned]
    assert widths[0] == widths[1] and learned[0].choice == learned[1].choice
    assert any(at != 4 for at in widths[0].values())


def test_widths_do_not_depend_on_the_scale_of_the_loss_in_half_precision():
    found = []
    for scale in (1.0, 2.0**10):
        torch.manual_seed(0)
        learn = LearnBits({"avg_bits": 3}, WIDTHS, WIDTHS, lr=0.2)
        half = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))  # pyright: ignore
        fit = trainer(None, learn, policy=POLICY, plugins=[half])
        fit.fit(Tiny(), loader(16))
        found.append([width.at for width in learn.learned.widths.values()])
    assert found[1] == pytest.approx(found[0], abs=0.005) and found[0] != [4] * len(found[0])


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_widths_are_learned_in_the_precision_of_the_module_itself(precision):
    learn = LearnBits({"avg_bits": 3, "packed": 3000}, WIDTHS, WIDTHS, lr=0.2)
    trainer(None, learn, policy=POLICY, max_epochs=2, precision=precision).fit(Tiny(), loader())
    assert learn.choice is not None


def test_a_checkpoint_from_the_middle_loads_as_a_plain_quantized_model(tmp_path):
    _fit(LearnBits({"avg_bits": 2.5}, WIDTHS, WIDTHS, lr=0.2, until=3), ModelCheckpoint(tmp_path, "{epoch}"))
    path = next(tmp_path.glob("*.ckpt"))
    model = load_from_checkpoint(Tiny, path)
    assert any(q.spec.bits != 4 for _, q in named_quantizers(model) if q.is_weight)
    assert model.eval()(next(iter(loader()))[0]).isfinite().all()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        pytest.param({"budget": {}}, "give one or more of avg_bits, bops, packed", id="none"),
        pytest.param({"budget": {"latency": "1ms"}}, "give one or more of avg_bits, bops, packed", id="latency"),
        pytest.param({"budget": {"avg_bits": 3}, "strength": 0}, "strength=0: must be above 0", id="strength"),
        pytest.param({"budget": {"avg_bits": 3}, "until": 1.0}, "until=1.0: must be a share", id="until"),
        pytest.param({"budget": {"avg_bits": 3}, "weight_bits": [0]}, "weight_bits=0: widths go from", id="width"),
    ],
)
def test_a_wrong_setting_is_refused_at_once(settings, said):
    with pytest.raises(UserError, match=said):
        LearnBits(**settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        pytest.param({"budget": {"avg_bits": 1.5}}, "cannot be met: the smallest feasible is 2", id="infeasible"),
        pytest.param({"least": {"net.hed": 8}}, "no layer matches 'net.hed'; did you mean 'net.head'", id="pattern"),
        pytest.param({"until": 9}, "LearnBits: until=9: training ends before", id="until"),
        pytest.param({"weight_bits": [3], "act_bits": [4]}, "every grid has one width", id="no-choice"),
        pytest.param({"output": "mine.yaml"}, "must be a .yaml in a folder named quant", id="output"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_the_first_step(settings, said):
    with pytest.raises(UserError, match=said):
        _fit(LearnBits(**{"budget": {"avg_bits": 3}, **settings}))


@pytest.mark.slow
@pytest.mark.parametrize("first", ["learned", "annealed"])
def test_bits_that_are_learned_are_not_annealed_too(first):
    learn, anneal = LearnBits({"avg_bits": 3}, WIDTHS, WIDTHS), AnnealBits({0: 8, 1: 4})
    both = [learn, anneal] if first == "learned" else [anneal, learn]
    with pytest.raises(UserError, match=r"AnnealBits changes the bits of 'net.stem.input_quantizer'.* leave one of"):
        trainer(None, *both, policy=POLICY, max_epochs=2).fit(Tiny(), loader())
    apart = AnnealBits({0: 16, 1: 8}, match="net.add_0.*")
    trainer(None, LearnBits({"avg_bits": 3}, WIDTHS, WIDTHS), apart, policy=POLICY, max_epochs=2).fit(Tiny(), loader())


def test_a_run_ends_in_a_verified_file_and_a_yaml_that_trains(tmp_path):
    tiny = """model=mlp model.width=16 data.train_limit=192 data.val_limit=64 data.test_limit=128 float_epochs=1
        quant.calibration_samples=64 trainer.enable_progress_bar=false""".split()  # noqa: SIM905
    common = ["train", *tiny, f"cache_dir={tmp_path / 'cache'}"]
    first, second = tmp_path / "first", tmp_path / "second"
    learned = ["callbacks=learn_bits", "callbacks.learn_bits.lr=0.5", "trainer.max_epochs=4"]
    least = "callbacks.learn_bits.least=null"
    assert main([*common, *learned, least, "callbacks.learn_bits.budget.avg_bits=4", f"run_dir={first}"]) == 0
    assert (
        main([*common, "trainer.max_epochs=1", "--config-dir", str(first), "quant=learned", f"run_dir={second}"]) == 0
    )
    reports = [json.loads((folder / "report.json").read_text()) for folder in (first, second)]
    bits = [{layer["name"]: (layer["weight_bits"], layer["act_bits"]) for layer in r["layers"]} for r in reports]
    assert bits[0] == bits[1] and reports[1]["predicted"]["avg_bits"] <= 4
    assert reports[0]["bops"] == reports[1]["bops"] == reports[1]["predicted"]["bops"]
    assert all(report["verify"]["passed"] for report in reports)
    assert {row["name"]: row["weight_bits"] for row in json.loads((first / "audit.json").read_text())["rows"]}[
        "fc1"
    ] == bits[0]["fc1"][0]
