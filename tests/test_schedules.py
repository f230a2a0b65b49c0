"""Schedules do what they say when they say it, and go on after a resume as if nothing had happened."""

import copy
from contextlib import nullcontext
from itertools import pairwise

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from qat.config.configs import composed, finalize_config
from qat.config.instantiate import instantiate
from qat.convert import convert
from qat.errors import UserError
from qat.grid.spec import QuantSpec
from qat.insert import named_quantizers
from qat.lightning import QATCallback, load_from_checkpoint
from qat.lightning.schedules import (
    AnnealBits,
    DampenOscillations,
    FreezeBatchNorm,
    FreezeOscillations,
    FreezeRanges,
    GradualEnable,
    ReestimateBatchNorm,
    TrackOscillations,
)
from qat.lightning.schedules.moments import cosine
from qat.planning.plan import Plan
from qat.quantizers import create

LSQ = {"weight": {"bits": 4}, "act": {"bits": 4}}
MINMAX = {"weight": {"bits": 4, "quantizer": "minmax"}, "act": {"bits": 4, "quantizer": "minmax", "symmetric": False}}
TWO_BITS = {"weight": {"bits": 2}, "act": {"bits": 8}, "rules": {"head": {"match": "@last", "weight": {"bits": 8}}}}

TERNARY = {"weight": {"format": "ternary", "bits": None}}
N2UQ = {"act": {"bits": 4, "quantizer": "n2uq"}}
DOREFA = {"weight": {"bits": 3, "format": "midrise", "quantizer": "dorefa"}}
ENDLESS = {"max_epochs": -1}


class Net(pl.LightningModule):
    """A layer, a BatchNorm, a residual add and a head, for 8 features and 3 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(F.relu(self.norm(self.stem(x))) + x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self(batch[0])

    def configure_optimizers(self):
        return SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


def data(batches: int = 4) -> DataLoader:
    x = torch.randn(8 * batches, 8, generator=torch.Generator().manual_seed(1)) + 0.5
    return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), 8)


def net(seed: int = 0, cls=Net):
    torch.manual_seed(seed)
    return cls()


def trainer(tmp_path, *callbacks, policy=LSQ, **settings) -> pl.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    quiet |= {"accelerator": "cpu", "max_epochs": 4, "default_root_dir": tmp_path}
    before = [QATCallback(copy.deepcopy(policy), 16)] if policy else []
    return pl.Trainer(callbacks=[*before, *callbacks], **(quiet | settings))


class Watch(pl.Callback):
    """Keeps what `look` sees after every optimizer step."""

    def __init__(self, look) -> None:
        self.look, self.seen = look, []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.seen.append(copy.deepcopy(self.look(pl_module)))


def watched(tmp_path, look, *callbacks, model=None, **settings) -> list:
    watch = Watch(look)
    trainer(tmp_path, *callbacks, watch, **settings).fit(model or net(), data(), data())
    return watch.seen


def _range(model: Net) -> torch.Tensor:
    return model.stem.input_quantizer.running_high


class Save(pl.Callback):
    """Writes a checkpoint at the end of an epoch."""

    def __init__(self, epoch: int, path) -> None:
        self.epoch, self.path = epoch, path

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(self.path)


def changes(values: list) -> list[bool]:
    """Whether each step changed the tensor before it."""
    return [not torch.equal(a, b) for a, b in pairwise(values)]


# -- freezing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [pytest.param(0.5, id="share"), pytest.param(2, id="epoch")])
def test_ranges_follow_the_data_until_they_are_frozen(at, tmp_path):
    ranges = watched(tmp_path, lambda m: m.stem.input_quantizer.running_high, FreezeRanges(at), policy=MINMAX)
    assert changes(ranges) == [True] * 7 + [False] * 8  # 4 epochs of 4 batches


@pytest.mark.parametrize("later", [(), (FreezeRanges(7),)], ids=["without", "not-yet"])
def test_ranges_move_again_in_a_fit_that_goes_on_from_where_they_were_frozen(later, tmp_path):
    first, again, watch = trainer(tmp_path, FreezeRanges(0.5), policy=MINMAX), net(), Watch(_range)
    first.callbacks.append(Save(3, tmp_path / "frozen.ckpt"))
    first.fit(net(), data())
    settings = {"policy": MINMAX, "max_epochs": 8}
    trainer(tmp_path, *later, watch, **settings).fit(again, data(), ckpt_path=tmp_path / "frozen.ckpt")
    moves = changes(watch.seen)
    assert moves == ([True] * 11 + [False] * 4 if later else [True] * 15)


@pytest.mark.parametrize("scales", [True, False], ids=["stop", "go-on"])
def test_learned_scales_stop_only_if_asked(scales, tmp_path):
    policy = LSQ | {"weight": MINMAX["weight"]}
    seen = watched(
        tmp_path,
        lambda m: torch.cat([m.stem.input_quantizer.scale, m.stem.weight[0]]).detach(),
        FreezeRanges(0.5, scales),
        policy=policy,
    )
    assert changes([s[:1] for s in seen]) == [True] * 7 + [not scales] * 8
    assert all(changes([s[1:] for s in seen])), "weights always learn"


@pytest.mark.parametrize("calls_train", [True, False], ids=["module-calls-train", "plain"])
def test_frozen_batch_norm_keeps_its_statistics_and_learns_its_gamma(calls_train, tmp_path):
    class Restless(Net):
        def on_validation_epoch_end(self):
            self.train()

    model = net(cls=Restless if calls_train else Net)
    seen = watched(tmp_path, lambda m: (m.norm.running_mean, m.norm.weight), FreezeBatchNorm(0.5), model=model)
    assert changes([mean for mean, _ in seen]) == [True] * 7 + [False] * 8
    assert all(changes([gamma for _, gamma in seen]))


@pytest.mark.parametrize(
    ("steps", "epochs", "half"),
    [
        pytest.param(6, -1, 3, id="steps-alone"),
        pytest.param(6, 4, 3, id="steps-end-first"),
        pytest.param(24, 2, 4, id="epochs-end-first"),
    ],
)
def test_a_share_of_training_is_of_what_ends_it(steps, epochs, half, tmp_path):
    settings = {"policy": MINMAX, "max_steps": steps, "max_epochs": epochs}
    ranges = watched(tmp_path, lambda m: m.stem.input_quantizer.running_high, FreezeRanges(0.5), **settings)
    assert changes(ranges) == [True] * (half - 1) + [False] * half


def test_batch_norm_statistics_are_those_of_the_last_weights(tmp_path):
    model = net()
    trainer(tmp_path, ReestimateBatchNorm(batches=3), max_epochs=1).fit(model, data())
    with torch.no_grad():
        outputs = [model.eval().stem(x) for x, _ in list(data())[:3]]
    assert model.norm.momentum == 0.1
    torch.testing.assert_close(model.norm.running_mean, torch.stack([y.mean(0) for y in outputs]).mean(0))
    torch.testing.assert_close(model.norm.running_var, torch.stack([y.var(0) for y in outputs]).mean(0))


class TwoNorms(Net):
    """Freezes one BatchNorm in training steps, and calls `train()` on all of itself after each validation."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = nn.BatchNorm1d(8)
        self.kept.running_mean.fill_(5.0)

    def forward(self, x):
        return super().forward(self.kept(x))

    def on_train_batch_start(self, batch, batch_idx):
        self.kept.eval()

    def on_validation_epoch_end(self):
        self.train()


def test_batch_norms_that_are_frozen_keep_their_statistics(tmp_path, monkeypatch):
    model, said = net(cls=TwoNorms), []
    watch = Watch(lambda m: m.norm.running_mean)
    monkeypatch.setattr("qat.lightning.schedules.reestimate.rank_zero_info", said.append)
    trainer(tmp_path, ReestimateBatchNorm(2), watch, max_epochs=1).fit(model, data(), data())
    assert said == ["ReestimateBatchNorm: left out 1 BatchNorms that were frozen"]
    assert model.kept.running_mean.tolist() == [5.0] * 8
    assert not torch.equal(model.norm.running_mean, watch.seen[-1])
    assert model.kept.momentum == model.norm.momentum == 0.1


def test_a_fit_that_resumes_at_its_end_knows_which_were_frozen(tmp_path):
    class Saves(pl.Callback):
        def on_train_end(self, trainer, pl_module) -> None:
            trainer.save_checkpoint(tmp_path / "end.ckpt")

    first, resumed = net(cls=TwoNorms), net(cls=TwoNorms)
    trainer(tmp_path, ReestimateBatchNorm(2), Saves(), max_epochs=1).fit(first, data(), data())
    resuming = trainer(tmp_path, ReestimateBatchNorm(2), max_epochs=1)
    resuming.fit(resumed, data(), data(), ckpt_path=tmp_path / "end.ckpt", weights_only=False)
    assert resuming.global_step == len(data()) and resumed.kept.running_mean.tolist() == [5.0] * 8
    assert torch.equal(resumed.norm.running_mean, first.norm.running_mean)


class Stops(pl.Callback):
    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 10:
            raise RuntimeError("in the middle")


@pytest.mark.parametrize("stopped", [False, True], ids=["to-the-end", "stopped-in-the-middle"])
def test_what_was_frozen_moves_in_the_next_training(stopped, tmp_path):
    model, frozen = net(cls=TwoNorms), [FreezeBatchNorm(0.5), FreezeRanges(0.5)]
    with pytest.raises(RuntimeError, match="in the middle") if stopped else nullcontext():
        trainer(tmp_path, *frozen, *[Stops()] * stopped, policy=MINMAX).fit(model, data())
    assert model.norm.training and not model.kept.training, "what the user froze stays frozen"
    look = lambda m: torch.cat([m.norm.running_mean, m.stem.input_quantizer.running_high])  # noqa: E731
    assert all(changes([s[:8] for s in watched(tmp_path, look, model=model, policy=MINMAX)]))
    assert all(changes([s[8:] for s in watched(tmp_path, look, model=model, policy=MINMAX)]))


def test_where_all_are_frozen_a_line_says_that_none_is_re_estimated(tmp_path):
    model, watch = net(cls=TwoNorms), Watch(lambda m: m.norm.running_mean)
    callbacks = FreezeBatchNorm(0.5), ReestimateBatchNorm(2), watch
    with pytest.warns(UserWarning, match="every BatchNorm was frozen, so none was re-estimated"):
        trainer(tmp_path, *callbacks).fit(model, data(), data())
    assert torch.equal(model.norm.running_mean, watch.seen[-1])


# -- bits --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"quantizer": "lsq", "signed": True}, id="symmetric"),
        pytest.param({"quantizer": "minmax", "signed": False, "symmetric": False}, id="affine"),
        pytest.param({"quantizer": "lsq_plus", "signed": False, "symmetric": False}, id="learned-offset"),
        pytest.param({"quantizer": "lsq", "format": "midrise"}, id="midrise"),
    ],
)
def test_a_changed_width_keeps_the_range(settings, tmp_path):
    spec = QuantSpec.from_dict({"bits": 8, **settings}).resolved(nonnegative=False, weight=False)
    quantizer = create(spec)
    x = torch.linspace(-1, 3, 101)
    quantizer.calibrate(x)
    keys, top = {k: v.shape for k, v in quantizer.state_dict().items()}, quantizer(x).max()
    quantizer.change_bits(3)
    assert {k: v.shape for k, v in quantizer.state_dict().items()} == keys
    assert len(quantizer(x).unique()) <= 8 and quantizer.quantize(x).max() <= quantizer.quant_max == quantizer.highest
    assert quantizer.spec == QuantSpec(**(spec.to_dict() | {"bits": 3}))
    step = quantizer.step().item()
    assert abs(quantizer(x).max() - top) <= step  # an affine grid's zero moves by up to half a step


def test_a_symmetric_step_is_rescaled_by_the_ratio_of_the_highest_codes():
    quantizer = create(QuantSpec(bits=8, signed=True, narrow=False))
    quantizer.calibrate(torch.randn(100))
    before = quantizer.scale.item()
    quantizer.change_bits(4)
    assert quantizer.scale.item() == pytest.approx(before * 127 / 7)
    assert (quantizer.quant_min, quantizer.quant_max) == (-8, 7) == (quantizer.lowest, quantizer.highest)


@pytest.mark.parametrize("signed", [pytest.param(True, id="signed"), pytest.param(False, id="unsigned")])
def test_an_affine_grid_of_other_bits_has_its_ends_where_they_were(signed):
    quantizer = create(QuantSpec(bits=8, signed=signed, symmetric=False, narrow=False, quantizer="fixed"))
    quantizer.calibrate(torch.linspace(-1, 3, 101))
    before = quantizer.scale.item()
    quantizer.change_bits(3)
    step, zero = quantizer.scale.item(), quantizer.zero_point.item()
    assert step == pytest.approx(before * 255 / 7)
    low, high = ((code - zero) * step for code in (quantizer.quant_min, quantizer.quant_max))
    assert abs(low + 1) <= 0.51 * step and abs(high - 3) <= 0.51 * step  # zero is a code: both move by up to a half


def test_bits_go_down_by_the_schedule_and_end_at_the_policy(tmp_path):
    model = net()
    final = {}

    class Before(pl.Callback):
        def on_fit_start(self, trainer, pl_module):
            final["plan"] = copy.deepcopy(pl_module.quantization_plan)

    def bits(m):
        planned = m.quantization_plan.weights["stem"].bits
        return m.stem.weight_quantizer.spec.bits, m.head.weight_quantizer.spec.bits, planned

    seen = watched(tmp_path, bits, Before(), AnnealBits({3: 2, 0: 8, 1: 4}), policy=TWO_BITS, model=model)
    assert seen == [(8, 8, 8)] * 4 + [(4, 8, 4)] * 8 + [(2, 8, 2)] * 4
    assert model.quantization_plan == final["plan"]
    codes = convert(model, model.quantization_plan).get_submodule("stem").integer_weight.codes
    assert codes.min() >= -2 and codes.max() <= 1


def test_bits_go_down_after_shares_of_training_in_the_middle_of_an_epoch(tmp_path):
    seen = watched(tmp_path, lambda m: m.stem.weight_quantizer.spec.bits, AnnealBits({0: 8, 0.125: 6, 0.5: 4}))
    assert seen == [8] * 2 + [6] * 6 + [4] * 8


@pytest.mark.parametrize(
    "match", ["@act", "*.input_quantizer*", ["stem.input_quantizer", "head.input_quantizer"]], ids=str
)
def test_a_schedule_is_for_what_it_matches(match, tmp_path):
    bits = watched(tmp_path, lambda m: [q.spec.bits for _, q in named_quantizers(m)], AnnealBits({0: 8, 1: 4}, match))
    assert len(set(bits[0])) == 2 and set(bits[-1]) == {4}


def test_both_inputs_of_a_layer_are_annealed(tmp_path):
    class TwoInputs(Net):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Bilinear(8, 8, 8)

        def forward(self, x):
            return self.head(self.stem(x, -x))

    bits = watched(
        tmp_path,
        lambda m: m.quantization_plan.activations["stem.input_1"].bits,
        AnnealBits({0: 8, 2: 4}),
        model=net(cls=TwoInputs),
    )
    assert bits == [8] * 8 + [4] * 8


def test_probabilities_and_outputs_of_functions_are_annealed(tmp_path):
    class Attends(Net):
        def forward(self, x):
            y = self.stem(x)[:, None]
            return F.softmax(self.head(F.scaled_dot_product_attention(y, y, y)[:, 0]), -1)

    names = ("attention_0.probabilities", "softmax_0.output")
    rules = {"between": {"match": ["*.probabilities", "softmax_0"], "act": {"bits": 4}}}
    bits = watched(
        tmp_path,
        lambda m: [m.quantization_plan.activations[name].bits for name in names],
        AnnealBits({0: 8, 2: 4}),
        model=net(cls=Attends),
        policy=LSQ | {"kinds": ["attention", "softmax"], "rules": rules},
    )
    assert bits == [[8, 8]] * 8 + [[4, 4]] * 8


def test_a_checkpoint_of_the_middle_loads_with_the_bits_of_the_middle(tmp_path):
    run = trainer(tmp_path, AnnealBits({0: 8, 2: 4}), max_epochs=3)
    state = {}

    class Save(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")
                state["y"] = copy.deepcopy(pl_module).eval()(torch.ones(2, 8)).detach()

    run.callbacks.append(Save())
    run.fit(net(), data())
    loaded = load_from_checkpoint(Net, tmp_path / "middle.ckpt")
    assert isinstance(loaded.quantization_plan, Plan)
    assert {q.spec.bits for _, q in named_quantizers(loaded)} == {8}
    assert torch.equal(loaded.eval()(torch.ones(2, 8)), state["y"])


def test_training_that_stops_before_the_last_bits_says_so(tmp_path):
    class Stop(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = True

    with pytest.warns(UserWarning, match="AnnealBits: training ended early"):
        trainer(tmp_path, AnnealBits({0: 8, 2: 4}), Stop()).fit(net(), data())


# -- enabling ----------------------------------------------------------------------------------------------------------


def test_a_schedule_that_was_cut_off_begins_anew_with_another_module(tmp_path):
    anneal = AnnealBits({0: 8, 2: 4})
    trainer(tmp_path, anneal, max_epochs=3, max_steps=4).fit(net(), data())
    seen = watched(tmp_path, lambda m: m.stem.weight_quantizer.spec.bits, anneal, max_epochs=3)
    assert seen == [8] * 8 + [4] * 4


def test_weights_are_quantized_first_and_activations_later(tmp_path):
    def on(m):
        return tuple({q.on for _, q in named_quantizers(m) if q.is_weight is weight}.pop() for weight in (True, False))

    states = watched(tmp_path, on, GradualEnable(weights_at=1, activations_at=0.5))
    assert states == [(False, False)] * 4 + [(True, False)] * 4 + [(True, True)] * 8


def test_oscillations_are_counted_anew_on_a_new_grid(tmp_path):
    track = TrackOscillations(momentum=0.5)
    policy = {"weight": {"bits": 2}}
    watched(tmp_path, lambda m: None, AnnealBits({0: 4, 3: 2}), track, policy=policy)
    for state in track.weights.values():
        assert state.width == 2 and state.previous.abs().max() <= 2
        assert set(state.frequency.unique().tolist()) <= {0, 0.125, 0.25, 0.5, 0.625, 0.75}, "of four steps alone"


# -- resume ------------------------------------------------------------------------------------------------------------

RESUMED = [
    pytest.param(lambda: [FreezeRanges(0.6)], MINMAX, id="ranges"),
    pytest.param(lambda: [FreezeRanges(1, scales=True)], LSQ, id="scales"),
    pytest.param(lambda: [FreezeBatchNorm(0.4)], LSQ, id="batch-norm"),
    pytest.param(lambda: [AnnealBits({0: 8, 1: 6, 3: 4})], LSQ, id="anneal"),
    pytest.param(lambda: [AnnealBits([[0, 8], [0.4, 6], [0.7, 4]])], LSQ, id="anneal-by-shares"),
    pytest.param(
        lambda: [AnnealBits({0: 8, 1: 6, 3: 4}, "@weight"), AnnealBits({0: 8, 2: 5, 3: 4}, "@act")],
        LSQ,
        id="anneal-twice",
    ),
    pytest.param(lambda: [GradualEnable(0.3, 0.7)], LSQ, id="gradual"),
    pytest.param(
        lambda: [TrackOscillations(), DampenOscillations(0.05), FreezeOscillations((0.12, 0.1), momentum=0.1)],
        LSQ,
        id="oscillation",
    ),
    pytest.param(
        lambda: [AnnealBits({0: 4, 1: 2}), TrackOscillations(), ReestimateBatchNorm(2)],
        TWO_BITS,
        id="all",
    ),
]


@pytest.mark.parametrize("epoch", [0, 1, 2])
@pytest.mark.parametrize(("make", "policy"), RESUMED)
def test_a_resumed_run_ends_like_an_uninterrupted_one(make, policy, epoch, tmp_path):
    whole, resumed = net(), net(seed=1)
    callbacks = make()
    first = trainer(tmp_path, *callbacks, policy=policy)
    first.callbacks.append(Save(epoch, tmp_path / "middle.ckpt"))
    first.fit(whole, data())
    again = make()
    trainer(tmp_path, *again, policy=policy).fit(resumed, data(), ckpt_path=tmp_path / "middle.ckpt", weights_only=True)
    a, b = whole.state_dict(), resumed.state_dict()
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []
    assert whole.quantization_plan == resumed.quantization_plan
    for mine, theirs in zip(callbacks, again, strict=True):
        assert str(mine.state_dict()) == str(theirs.state_dict())
        assert not isinstance(mine, FreezeOscillations) or any(w.frozen.any() for w in mine.weights.values())


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda: FreezeRanges(1.0), r"at=1.0: must be a share", id="all-of-training"),
        pytest.param(lambda: FreezeBatchNorm(-1), r"at=-1: must be a share", id="negative-epoch"),
        pytest.param(lambda: GradualEnable(activations_at=float("nan")), "activations_at=nan", id="nan"),
        pytest.param(lambda: GradualEnable(weights_at=True), "weights_at=True", id="bool"),
        pytest.param(lambda: AnnealBits({}), "must map epochs or shares to bits", id="empty-schedule"),
        pytest.param(lambda: AnnealBits({0: 8, 1: 4.0}), "must map epochs or shares to bits", id="fractional-bits"),
        pytest.param(lambda: AnnealBits({"0": 8}), "must map epochs or shares to bits", id="no-number"),  # pyright: ignore
        pytest.param(lambda: AnnealBits({1: 8, 2: 4}), "must begin at 0", id="late-schedule"),
        pytest.param(lambda: AnnealBits({-1: 8, 0: 4}), "must begin at 0", id="early-schedule"),
        pytest.param(lambda: AnnealBits({0: 8, 1.5: 4}), "^schedule=1.5: must be a share", id="share-above-one"),
        pytest.param(lambda: AnnealBits({0: 8, 0.5: 6, 2: 4}), "epochs and shares", id="epochs-and-shares"),
        pytest.param(lambda: ReestimateBatchNorm(0), "batches=0", id="no-batches"),
        pytest.param(lambda: DampenOscillations(0), "strength=0", id="no-strength"),
        pytest.param(lambda: DampenOscillations(max_bits=0), "max_bits=0", id="dampen-no-bits"),
        pytest.param(lambda: TrackOscillations(max_bits=0), "max_bits=0", id="track-no-bits"),
        pytest.param(lambda: TrackOscillations(threshold=0), "threshold=0", id="no-threshold"),
        pytest.param(lambda: TrackOscillations(momentum=1), "momentum=1", id="no-memory"),
        pytest.param(lambda: FreezeOscillations((0.01, 0.1)), "freeze_above=", id="rising-threshold"),
        pytest.param(lambda: FreezeOscillations((0.1, 0.001)), "one flip would be enough", id="below-momentum"),
    ],
)
def test_a_bad_option_is_an_error(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize(
    ("callback", "policy", "settings", "message"),
    [
        pytest.param(lambda: FreezeRanges(5), MINMAX, {}, "at=5: training ends before, after max_epochs=4", id="never"),
        pytest.param(lambda: FreezeRanges(), LSQ, {}, "nothing to stop; scales: true stops", id="nothing-to-stop"),
        pytest.param(lambda: FreezeRanges(), MINMAX, ENDLESS, "training has no end", id="endless-share"),
        pytest.param(lambda: FreezeOscillations(), LSQ, ENDLESS, "training has no end", id="endless-freezing"),
        pytest.param(lambda: DampenOscillations(), LSQ, ENDLESS, "training has no end", id="endless-dampening"),
        pytest.param(lambda: GradualEnable(0, 4), LSQ, {}, "activations_at=4: training ends before", id="never-on"),
        pytest.param(lambda: GradualEnable(), None, {}, "Net has no quantizers; QATCallback", id="not-quantized"),
        pytest.param(lambda: AnnealBits({0: 8, 4: 4}), LSQ, {}, "training ends before", id="never-annealed"),
        pytest.param(
            lambda: AnnealBits({0: 8, 1: 3}), LSQ, {}, "ends at 3 bits, but .* grids have 4", id="no-such-bits"
        ),
        pytest.param(lambda: AnnealBits({0: 8, 1: 2}, "@weight"), TWO_BITS, {}, "gives 'head.*' 8", id="other-bits"),
        pytest.param(
            lambda: AnnealBits({0: 8, 1: 4}, "stm.*"), LSQ, {}, r"no quantizer matches 'stm\.\*'", id="no-match"
        ),
        pytest.param(lambda: AnnealBits({0: 8, 1: 4}, "@weights"), LSQ, {}, "did you mean '@weight'", id="no-role"),
        pytest.param(lambda: AnnealBits({0: 17, 1: 4}), LSQ, {}, r"schedule\[0\]=17 for 'stem.*16 bits", id="too-many"),
        pytest.param(lambda: AnnealBits({0: 4, 1: 2}), TERNARY, {}, "format=ternary", id="fixed-format"),
        pytest.param(
            lambda: AnnealBits({0: 8, 1: 4}), N2UQ, {}, "learns something per level", id="shapes-would-change"
        ),
        pytest.param(lambda: TrackOscillations(max_bits=3), LSQ, {}, "no weight .* at most max_bits=3", id="too-wide"),
        pytest.param(lambda: FreezeOscillations(), DOREFA, {}, "'stem' is transformed", id="transformed"),
    ],
)
def test_a_schedule_that_cannot_be_kept_is_an_error(callback, policy, settings, message, tmp_path):
    with pytest.raises(UserError, match=message):
        trainer(tmp_path, callback(), policy=policy, **settings).fit(net(), data())


@pytest.mark.parametrize("callback", [FreezeBatchNorm, ReestimateBatchNorm])
def test_a_model_without_batch_norm_is_an_error(callback, tmp_path):
    model = net()
    model.norm = nn.Identity()
    with pytest.raises(UserError, match="has no BatchNorm with running statistics"):
        trainer(tmp_path, callback()).fit(model, data())


def test_a_cosine_begins_and_ends_where_it_says():
    assert [cosine(0.1, 0.01, share) for share in (0, 0.5, 1)] == pytest.approx([0.1, 0.055, 0.01])


# -- configs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["freeze", "anneal", "gradual", "oscillation"])
def test_a_config_adds_callbacks_that_train(option, tmp_path):
    cfg, default = (composed([f"callbacks={name}"]) for name in (option, "default"))
    finalize_config(cfg, tmp_path)
    own = [instantiate(node) for name, node in cfg.callbacks.items() if name not in default.callbacks]
    assert own and set(default.callbacks) < set(cfg.callbacks)
    assert all(node[key] is not None or key == "match" for node in cfg.callbacks.values() for key in node)
    trainer(tmp_path, *own).fit(net(), data())
