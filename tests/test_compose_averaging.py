"""Averaged weights (EMA, `WeightAveraging`, SWA): scales are averaged with them, codes and flags are not, and what is
evaluated is what was averaged."""

import copy
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from tiny_module import MINMAX, POLICY, Tiny, images, loader, quantizer_state, same, trainer

from qat.insert import named_quantizers
from qat.lightning import AnnealBits, GradualEnable, LearnBits, load_from_checkpoint

AVERAGES = [
    pytest.param(lambda: EMAWeightAveraging(decay=0.5), id="ema"),
    pytest.param(lambda: EMAWeightAveraging(decay=0.5, use_buffers=False), id="ema-of-parameters"),
    pytest.param(lambda: WeightAveraging(), id="mean"),
]


class Steps(pl.Callback):
    """Keeps the parameters after every optimizer step, and what validation ran with and gave."""

    def __init__(self) -> None:
        self.parameters: list[dict[str, torch.Tensor]] = []
        self.validated: list[tuple[dict[str, torch.Tensor], torch.Tensor]] = []
        self.flags: list[bool] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.parameters.append({n: p.detach().clone() for n, p in pl_module.named_parameters()})

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *args: Any) -> None:
        state = {n: p.detach().clone() for n, p in pl_module.named_parameters()}
        self.validated.append((state, pl_module(images())))
        self.flags.append(all(q.on and bool(q.initialised) for _, q in named_quantizers(pl_module)))


@pytest.mark.parametrize("average", AVERAGES)
def test_the_average_of_scales_is_what_is_left_and_what_was_validated(average, tmp_path):
    net, steps = Tiny(), Steps()
    trainer(tmp_path, average(), steps, num_sanity_val_steps=0).fit(net, loader(), loader())
    history, mean = steps.parameters, average()
    expected = dict(history[0])
    for count, now in enumerate(history[1:], start=1):
        by = 0.5 if isinstance(mean, EMAWeightAveraging) else 1 / (count + 1)
        expected = {n: torch.lerp(expected[n], now[n], by) for n in now}
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], msg=name)
        torch.testing.assert_close(steps.validated[-1][0][name], expected[name], msg=name)
    assert any(n.endswith("quantizer.scale") and not torch.equal(expected[n], history[-1][n]) for n in expected)


@pytest.mark.parametrize("average", AVERAGES)
def test_validation_computes_with_the_average_and_training_goes_on_without_it(average, tmp_path):
    """Weights quantized for one must never be used for the other: the swap goes by `.data`, which no version counts."""
    seen = []

    class Look(pl.Callback):
        def on_validation_batch_end(self, trainer, pl_module, *args):
            other = Tiny.__new__(type(pl_module))
            other.__dict__.update({k: v for k, v in pl_module.__dict__.items() if k != "_trainer"})
            seen.append((pl_module(images()), {k: v.clone() for k, v in pl_module.state_dict().items()}))

    net = Tiny()
    fitted = trainer(tmp_path, average(), Look(), max_epochs=2, limit_train_batches=2)
    fitted.fit(net, loader(), loader())
    fitted.save_checkpoint(tmp_path / "end.ckpt")
    fresh = load_from_checkpoint(Tiny, tmp_path / "end.ckpt").eval()
    for outputs, state in seen:
        fresh.load_state_dict(state)
        with torch.no_grad():
            assert torch.equal(fresh(images()), outputs)
    assert not torch.equal(seen[0][0], seen[-1][0])


def test_before_the_first_update_validation_runs_with_the_calibrated_model(tmp_path):
    net, steps = Tiny(), Steps()
    late = EMAWeightAveraging(decay=0.5, update_starting_at_step=100)
    trainer(tmp_path, late, steps).fit(net, loader(), loader())
    first, last = steps.validated[0][0], steps.validated[-1][0]
    assert all(steps.flags)
    assert all((first[n] != 1).all() for n in first if n.endswith("quantizer.scale")), "1 is a scale before calibration"
    assert same(first, last)


def test_zero_points_do_not_drift(tmp_path):
    """0.9 * 7 + 0.1 * 7 is 6.99..., and becomes 6 as an integer."""
    policy = {role: {"bits": 8, "symmetric": False} for role in ("weight", "act")}
    net, points = Tiny(), []

    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            points.append(quantizer_state(pl_module))

    trainer(tmp_path, EMAWeightAveraging(decay=0.9), Look(), policy=policy, max_epochs=4).fit(net, loader(), loader())
    now = quantizer_state(net)
    fixed = [n for n in now if n.endswith("zero_point")]
    assert any(points[0][n].abs().max() > 0 for n in fixed)
    assert all(torch.equal(points[0][n], now[n]) for n in fixed), "learned steps leave them where they are"


def test_a_flag_that_changed_is_changed_in_the_average(tmp_path):
    flags: list[bool] = []

    class Look(pl.Callback):
        def on_train_end(self, trainer, pl_module):  # the average has taken the module's place
            flags.extend(bool(q.enabled) for _, q in named_quantizers(pl_module))

    net, callbacks = Tiny(), [GradualEnable(1, 1), EMAWeightAveraging(decay=0.9), Look()]
    trainer(tmp_path, *callbacks, policy=MINMAX, max_epochs=2).fit(net, loader(), loader())
    assert flags and all(flags)


@pytest.mark.parametrize("average", AVERAGES)
def test_where_widths_change_the_average_is_one_of_ranges(average, tmp_path):
    history: list[dict[str, torch.Tensor]] = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            history.append({n: q.scale.detach() * q.quant_max for n, q in named_quantizers(pl_module)})

    net, mean = Tiny(), average()
    trainer(tmp_path, AnnealBits({0: 8, 1: 4}), mean, Look(), max_epochs=2).fit(net, loader(), loader())
    expected = dict(history[0])
    for count, now in enumerate(history[1:], start=1):
        by = 0.5 if isinstance(mean, EMAWeightAveraging) else 1 / (count + 1)
        expected = {n: torch.lerp(expected[n], now[n], by) for n in now}
    for name, quantizer in named_quantizers(net):
        assert (quantizer.lowest.item(), quantizer.highest.item()) == (quantizer.quant_min, quantizer.quant_max)
        torch.testing.assert_close(quantizer.scale.detach() * quantizer.quant_max, expected[name], msg=name)


def test_learned_widths_are_those_of_the_average(tmp_path):
    net = Tiny()
    learn = LearnBits({"avg_bits": 4}, lr=1.0)
    policy = {**POLICY, "sites": "off"}
    trainer(tmp_path, learn, EMAWeightAveraging(decay=0.9), policy=policy, max_epochs=4).fit(net, loader(), loader())
    found = dict(named_quantizers(net))
    assert {q.spec.bits for q in found.values()} != {POLICY["act"]["bits"]}
    for name, quantizer in found.items():
        assert (quantizer.lowest.item(), quantizer.highest.item()) == (quantizer.quant_min, quantizer.quant_max), name


@pytest.mark.parametrize(
    "others", [pytest.param([], id="alone"), pytest.param([AnnealBits({0: 8, 1: 4})], id="annealed")]
)
def test_the_average_is_in_the_checkpoint_and_training_resumes_with_both(others, tmp_path):
    whole, first = Tiny(), Tiny()
    first.load_state_dict(whole.state_dict())
    trainer(tmp_path, *copy.deepcopy(others), EMAWeightAveraging(decay=0.9), max_epochs=2).fit(
        whole, loader(), loader()
    )
    keep = ModelCheckpoint(tmp_path / "first", filename="{epoch}", save_top_k=-1)
    averaging = trainer(
        tmp_path, *copy.deepcopy(others), EMAWeightAveraging(decay=0.9), keep, enable_checkpointing=True, max_epochs=2
    )
    averaging.fit(first, loader(), loader())
    content = torch.load(tmp_path / "first" / "epoch=0.ckpt", weights_only=False)
    name = "net.conv.weight_quantizer.scale"
    assert not torch.equal(content["qat_state"][name], content["current_model_state"][name])
    second = Tiny()
    trainer(tmp_path, *copy.deepcopy(others), EMAWeightAveraging(decay=0.9), max_epochs=2).fit(
        second, loader(), loader(), ckpt_path=tmp_path / "first" / "epoch=0.ckpt", weights_only=False
    )
    assert [q.highest.item() for _, q in named_quantizers(second)] == [q.quant_max for _, q in named_quantizers(whole)]
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], value, msg=name)


@pytest.mark.parametrize("norm", [pytest.param(True, id="batch-norm"), pytest.param(False, id="no-batch-norm")])
@pytest.mark.parametrize("policy", [pytest.param(POLICY, id="lsq"), pytest.param(MINMAX, id="minmax")])
def test_stochastic_weight_averaging_averages_scales_and_keeps_their_share_of_the_rate(norm, policy, tmp_path):
    ends: list[dict[str, torch.Tensor]] = []
    ratios: set[float] = set()

    class Look(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch < 3:  # a fourth is for the statistics of BatchNorm
                ends.append({n: p.detach().clone() for n, p in pl_module.named_parameters()})

    class Watched(Tiny):
        def optimizer_step(self, epoch, batch_idx, optimizer, *args, **kwargs):
            super().optimizer_step(epoch, batch_idx, optimizer, *args, **kwargs)
            rest, *own = (group["lr"] for group in optimizer.param_groups)
            ratios.update(round(rate / rest, 6) for rate in own)

    net = Watched(norm=norm)
    swa = StochasticWeightAveraging(0.02, swa_epoch_start=1, annealing_epochs=1)
    trainer(tmp_path, Look(), swa, policy=policy, max_epochs=3).fit(net, loader(), loader())
    assert len(ends) == 3
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.detach(), sum(end[name] for end in ends) / 3, msg=name)
    assert ratios == ({0.1} if policy is POLICY else set())
