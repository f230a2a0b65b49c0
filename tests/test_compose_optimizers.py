"""Ways to optimize: manual, several optimizers and policies (a GAN), accumulation, clipping, tuners."""

import copy
import math
import pickle
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import BaseFinetuning, BatchSizeFinder, LearningRateFinder
from pytorch_lightning.tuner import Tuner
from tiny_module import MINMAX, POLICY, Tiny, loader, quantizer_state, same, trainer
from torch import nn

from qat.errors import UserError
from qat.grid.spec import QuantSpec
from qat.insert import named_quantizers
from qat.lightning import QATCallback, load_from_checkpoint
from qat.lightning.scale_groups import own_groups
from qat.lightning.scale_steps import FACTOR, in_proportion
from qat.quantizers import create


class ByHand(Tiny):
    """The same training, optimized by hand."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


def test_manual_optimization_trains_to_the_same_weights_and_scales(tmp_path):
    own, by_hand = Tiny(), ByHand()
    by_hand.load_state_dict(own.state_dict())
    for net in (own, by_hand):
        trainer(tmp_path).fit(net, loader(), loader())
    assert same(dict(own.state_dict()), dict(by_hand.state_dict()))


@pytest.mark.parametrize("clip", ["norm", "value"])
def test_accumulated_and_clipped_gradients_move_scales_as_one_batch_would(clip, tmp_path):
    """Without BatchNorm, whose statistics depend on how a batch is split."""
    nets = [Tiny(norm=False), Tiny(norm=False)]
    start = {name: value.clone() for name, value in nets[0].state_dict().items()}
    nets[1].load_state_dict(start)
    policy = {role: {"bits": 4, "range": "minmax"} for role in ("weight", "act")}
    clipping: dict[str, Any] = {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": clip, "policy": policy}
    trainer(tmp_path, **clipping).fit(nets[0], loader(8, batch_size=8))
    trainer(tmp_path, accumulate_grad_batches=2, **clipping).fit(nets[1], loader(8, batch_size=4))
    before = quantizer_state(nets[0])
    for name, value in quantizer_state(nets[1]).items():
        torch.testing.assert_close(value, before[name], rtol=1e-4, atol=1e-6, msg=name)
    free = Tiny(norm=False)
    free.load_state_dict(start)
    trainer(tmp_path, policy=policy).fit(free, loader(8, batch_size=8))
    assert not same(quantizer_state(free), before), "the gradients were large enough to be clipped"


# -- several networks --------------------------------------------------------------------------------------------------


class Gan(pl.LightningModule):
    """Two networks, two optimizers, no step but `training_step`, and no forward."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 36))
        self.discriminator = nn.Sequential(nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 1))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        of_generator, of_discriminator = self.optimizers()
        real = batch[0].flatten(1)
        self.toggle_optimizer(of_discriminator)
        fake = self.generator(torch.randn(len(real), 4)).detach()
        self.manual_backward(F.softplus(self.discriminator(fake) - self.discriminator(real)).mean())
        of_discriminator.step()
        of_discriminator.zero_grad()
        self.untoggle_optimizer(of_discriminator)
        self.toggle_optimizer(of_generator)
        self.manual_backward(F.softplus(-self.discriminator(self.generator(torch.randn(len(real), 4)))).mean())
        of_generator.step()
        of_generator.zero_grad()
        self.untoggle_optimizer(of_generator)

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(net.parameters(), 1e-2) for net in (self.generator, self.discriminator)]


def _gan_callbacks() -> list[QATCallback]:
    stem = {"rules": {"stem": {"match": "@first", "weight": {"bits": 8}}}}
    return [
        QATCallback(POLICY | stem, 8, module="generator"),
        QATCallback({"weight": {"bits": 8}}, 8, scale_lr_factor=0.02, module="discriminator"),
    ]


def test_each_network_of_a_gan_has_its_own_policy_optimizer_and_factor(tmp_path):
    gan, before = Gan(), {}

    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            before.update(quantizer_state(pl_module))

    fitted = trainer(tmp_path, *_gan_callbacks(), Look(), policy=None)
    fitted.fit(gan, loader())
    bits = {name: q.spec.bits for name, q in named_quantizers(gan)}
    assert bits == {
        "generator.0.input_quantizer": 4,
        "generator.0.weight_quantizer": 8,
        "generator.2.input_quantizer": 4,
        "generator.2.weight_quantizer": 4,
        "discriminator.0.weight_quantizer": 8,
        "discriminator.2.weight_quantizer": 8,
    }
    for optimizer, net, factor in zip(fitted.optimizers, (gan.generator, gan.discriminator), (3.0, 0.02), strict=True):
        rest, own = optimizer.param_groups
        assert {id(p) for p in own["params"]} == {id(q.scale) for _, q in named_quantizers(net)}
        assert own["lr"] == pytest.approx(rest["lr"] * factor)
    stuck = [n for n, v in quantizer_state(gan).items() if n.endswith("scale") and torch.equal(before[n], v)]
    assert not stuck

    fitted.save_checkpoint(tmp_path / "gan.ckpt")
    assert same(dict(load_from_checkpoint(Gan, tmp_path / "gan.ckpt").state_dict()), dict(gan.state_dict()))
    again = Gan()
    resumed = trainer(tmp_path, *_gan_callbacks(), policy=None, max_epochs=2)
    resumed.fit(again, loader(), ckpt_path=tmp_path / "gan.ckpt")
    assert not same(quantizer_state(again), quantizer_state(gan))


@pytest.mark.parametrize(
    ("cls", "expected"),
    [
        pytest.param(torch.optim.SGD, lambda scale, lr: min(0.1 * lr / scale, 0.2), id="sgd"),
        pytest.param(torch.optim.Adam, lambda scale, lr: min(3 * lr, math.log(2)), id="adam"),
    ],
)
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("lr", [1e-6, 1e-3, 10.0])
def test_the_logarithm_of_a_scale_moves_and_no_step_moves_it_far(cls, expected, lr, sign):
    model = nn.ModuleList(create(QuantSpec().resolved(nonnegative=False, weight=False)) for _ in range(2))
    scales, weight = [quantizer.scale for quantizer in model], nn.Parameter(torch.tensor([1.0]))
    for scale, start in zip(scales, (1e-4, 0.5), strict=True):
        scale.data.fill_(start)
    with own_groups(model):
        optimizer = cls([*scales, weight], lr=lr)
    for parameter in (*scales, weight):
        parameter.grad = torch.full((1,), sign)
    optimizer.step()
    assert weight.item() == pytest.approx(1.0 - sign * lr)
    for scale, before in zip(scales, (1e-4, 0.5), strict=True):
        change = -sign * expected(before, lr)
        assert scale.item() == pytest.approx(before * math.exp(change), rel=1e-4)


class Configured(Tiny):
    """Optimizes as it is told."""

    def __init__(self, configure: Any) -> None:
        super().__init__()
        self.configure = configure

    def configure_optimizers(self) -> Any:
        return self.configure(self)


class Heads(Configured):
    """Two heads read one tensor, and so share its quantizer; the concatenation is in the module's own forward."""

    def __init__(self, configure: Any) -> None:
        super().__init__(configure)
        self.automatic_optimization = False
        self.body, self.left, self.right = nn.Linear(36, 8), nn.Linear(8, 2), nn.Linear(8, 1)
        del self.net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.body(x.flatten(1)))
        heads = [self.left(x), self.right(x)]
        return torch.cat(heads, 1) + torch.cat(heads, 1)  # two sites that share their grids

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers = [self.optimizers()] if len(self.trainer.optimizers) == 1 else self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize(
    "configure",
    [
        pytest.param(lambda m: [*m.body.parameters(), *m.left.parameters(), *m.right.parameters()], id="added-up"),
        pytest.param(lambda m: [p for p in m.named_parameters() if p[0][:5] in ("body.", "left.")], id="named"),
        pytest.param(lambda m: [{"params": layer.parameters()} for layer in (m.body, m.left, m.right)], id="groups"),
        pytest.param(
            lambda m: [torch.optim.SGD(layer.parameters(), lr=0.01) for layer in (m.body, m.left, m.right)],
            id="optimizers",
        ),
    ],
)
def test_what_is_learned_is_in_one_group_whoever_lists_the_parameters(configure, tmp_path, recwarn):
    def optimizers(module: nn.Module) -> list[torch.optim.Optimizer]:
        found = configure(module)
        return found if isinstance(found[0], torch.optim.Optimizer) else [torch.optim.SGD(found, lr=0.01)]

    net = Heads(optimizers)
    fitted = trainer(tmp_path)
    fitted.fit(net, loader(), loader())
    members = [id(p) for o in fitted.optimizers for group in o.param_groups for p in group["params"]]
    scales = {n: id(p) for n, p in net.named_parameters() if "quantizer" in n}
    assert any(name.startswith("cat_0.") for name in scales) and net.left.input_quantizer is net.right.input_quantizer
    listed = {i for n, i in scales.items() if not n.startswith("right.")}  # nobody lists the right head by name
    assert len(members) == len(set(members)) and listed <= set(members)
    assert not [w for w in recwarn if "duplicate parameters" in str(w.message)]


def test_optimizers_that_take_turns_both_have_the_scales(tmp_path):
    net = Configured(lambda m: torch.optim.SGD(m.parameters(), lr=0.01))
    trainer(tmp_path).fit(net, loader())
    net.configure = lambda m: [torch.optim.Adam(m.parameters()), torch.optim.SGD(m.parameters(), lr=0.01)]
    everything = {id(p) for p in net.parameters()}
    for optimizer in net.configure_optimizers():
        assert {id(p) for group in optimizer.param_groups for p in group["params"]} == everything


@pytest.mark.parametrize(
    ("own", "lr"), [pytest.param({"lr": 0.003}, 0.003, id="own-rate"), pytest.param({}, 0.01, id="own-group")]
)
def test_scales_in_a_group_of_their_own_keep_its_rate_or_have_their_share_of_the_optimizer_s(own, lr, tmp_path):
    def configure(net: nn.Module) -> Any:
        named = dict(net.named_parameters())
        inputs = [p for n, p in named.items() if "input_quantizer" in n]  # of sites, too
        others = [p for n, p in named.items() if "input_quantizer" not in n]
        optimizer = torch.optim.SGD([{"params": others}, {"params": inputs, **own}], lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda e: 0.5, lambda e: 1.0])]

    fitted = trainer(tmp_path)
    fitted.fit(Configured(configure), loader())
    assert [len(group["params"]) for group in fitted.optimizers[0].param_groups] == [8, 3, 5]
    assert [group["lr"] for group in fitted.optimizers[0].param_groups] == pytest.approx([0.05, 0.005, lr])


class Thaw(BaseFinetuning):
    """Trains the head for an epoch, and then the other layers, too."""

    def freeze_before_training(self, pl_module):
        self.freeze([pl_module.net.stem, pl_module.net.conv])

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group([pl_module.net.stem, pl_module.net.conv], optimizer, lr=0.02)


class ThawByHand(pl.Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            layers = nn.ModuleList([pl_module.net.stem, pl_module.net.conv])
            pl_module.optimizers().add_param_group({"params": layers.parameters(), "lr": 0.02})


FLOAT_HEAD = POLICY | {"sites": "off", "rules": {"head": {"match": "*head", "weight": "off", "act": "off"}}}


@pytest.mark.parametrize("thaw", [Thaw, ThawByHand])
@pytest.mark.parametrize("policy", [pytest.param(POLICY, id="scales-from-the-start"), FLOAT_HEAD])
def test_layers_that_join_late_have_their_scales_in_a_group_of_their_own(policy, thaw, tmp_path):
    net = Configured(lambda m: torch.optim.AdamW(m.net.head.parameters(), lr=0.01, weight_decay=0.1))
    fitted = trainer(tmp_path, thaw(), policy=policy, max_epochs=3)
    fitted.fit(net, loader(), loader())
    [optimizer] = fitted.optimizers
    scales = {id(q.scale) for _, q in named_quantizers(net)}
    own = [group for group in optimizer.param_groups if FACTOR in group]
    listed = [id(p) for group in own for p in group["params"]]
    assert set(listed) == scales and len(listed) == len(scales)
    assert all(group["weight_decay"] == 0 for group in own)
    assert own[-1]["lr"] == pytest.approx(0.06) and in_proportion in optimizer._optimizer_step_post_hooks.values()
    assert torch.optim.Optimizer.add_param_group.__module__ == "torch.optim.optimizer"
    assert len(pickle.loads(pickle.dumps(copy.deepcopy(optimizer))).param_groups) == len(optimizer.param_groups)


@pytest.mark.parametrize("late", [0, 1])
def test_a_head_that_joins_late_leaves_a_shared_scale_to_the_optimizer_that_trains_it(late, tmp_path):
    class ThawHead(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                pl_module.optimizers()[late].add_param_group({"params": pl_module.right.parameters(), "lr": 0.02})

    def optimizers(net: nn.Module) -> list[torch.optim.Optimizer]:
        layers = [net.left, net.body] if late else [net.body, net.left]
        return [torch.optim.SGD(layer.parameters(), lr=0.01, momentum=0.9) for layer in layers]

    net = Heads(optimizers)
    fitted = trainer(tmp_path, ThawHead(), max_epochs=2)
    fitted.fit(net, loader())
    listed = [[id(p) for group in o.param_groups for p in group["params"]] for o in fitted.optimizers]
    assert net.left.input_quantizer is net.right.input_quantizer
    assert id(net.left.input_quantizer.scale) in set(listed[1 - late]) - set(listed[late])
    assert len({*listed[0], *listed[1]}) == len(listed[0]) + len(listed[1])
    assert {id(net.right.weight_quantizer.scale), id(net.right.weight)} <= set(listed[late])


def test_scales_of_layers_that_joined_are_watched_when_training_resumes(tmp_path):
    def fit(epochs: int, ckpt: Any = None) -> pl.Trainer:
        net = Configured(lambda m: torch.optim.AdamW(m.net.head.parameters(), lr=0.01))
        fitted = trainer(tmp_path, Thaw(), policy=FLOAT_HEAD, max_epochs=epochs)
        fitted.fit(net, loader(), loader(), ckpt_path=ckpt, weights_only=False)
        return fitted

    fit(2).save_checkpoint(tmp_path / "thawed.ckpt")
    [optimizer] = fit(3, tmp_path / "thawed.ckpt").optimizers
    assert [FACTOR in group for group in optimizer.param_groups] == [False, False, True]
    assert in_proportion in optimizer._optimizer_step_post_hooks.values()


def test_an_optimizer_that_takes_one_group_gets_one(tmp_path):
    net, fitted = Configured(lambda m: torch.optim.LBFGS(m.parameters(), lr=0.1)), trainer(tmp_path)
    fitted.fit(net, loader())
    [group] = fitted.optimizers[0].param_groups
    assert {id(p) for p in group["params"]} == {id(p) for p in net.parameters()}


def test_trying_a_manual_step_out_moves_nothing(tmp_path):
    gan = Gan()
    before = {name: value.clone() for name, value in gan.state_dict().items()}

    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            state = pl_module.state_dict()
            assert all(torch.equal(state[name], value) for name, value in before.items())
            assert all(p.grad is None for p in pl_module.parameters())
            assert all(not o.state for o in trainer.optimizers)

    trainer(tmp_path, *_gan_callbacks(), Look(), policy=None).fit(gan, loader())
    assert {"optimizers", "manual_backward", "log"}.isdisjoint(vars(gan))


def test_a_policy_for_one_network_leaves_the_other_float(tmp_path):
    gan = Gan()
    trainer(tmp_path, _gan_callbacks()[0], policy=None).fit(gan, loader())
    assert not list(named_quantizers(gan.discriminator)) and len(list(named_quantizers(gan.generator))) == 4


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        pytest.param(["generater"], "no such submodule in Gan; did you mean 'generator'", id="typo"),
        pytest.param([None, "generator"], "give each a submodule of its own", id="whole-and-part"),
        pytest.param(["generator", "generator"], "give each a submodule of its own", id="twice"),
        pytest.param(["generator", "generator.0"], "lies within 'generator'", id="nested"),
        pytest.param(["generator.1"], "module=generator.1: the step ran no layer in it", id="nothing-in-it"),
    ],
)
def test_callbacks_that_cannot_share_a_module_say_so(modules, message, tmp_path):
    callbacks = [QATCallback(POLICY, 8, module=m) for m in modules]
    with pytest.raises(UserError, match=message):
        trainer(tmp_path, *callbacks, policy=None).fit(Gan(), loader())


def test_a_manual_step_that_needs_gradients_asks_for_a_validation_step(tmp_path):
    class Penalty(Gan):
        def training_step(self, batch, batch_idx):
            self.discriminator(batch[0].flatten(1)).sum().backward()

    with pytest.raises(UserError, match=r"Penalty.training_step .* give the module a validation_step"):
        trainer(tmp_path, *_gan_callbacks(), policy=None).fit(Penalty(), loader())


# -- tuners ------------------------------------------------------------------------------------------------------------


class Sized(Tiny):
    """Its batch size can be tuned."""

    batch_size = 2

    def train_dataloader(self) -> Any:
        return loader(64, batch_size=self.batch_size)

    val_dataloader = train_dataloader


FINDERS = [
    pytest.param(lambda: LearningRateFinder(num_training_steps=20, max_lr=0.5), id="learning-rate"),
    pytest.param(lambda: BatchSizeFinder(max_trials=2, steps_per_trial=1), id="batch-size"),
]


@pytest.mark.parametrize("policy", [pytest.param(POLICY, id="lsq"), pytest.param(MINMAX, id="minmax")])
@pytest.mark.parametrize("finder", FINDERS)
def test_a_finder_leaves_ranges_steps_and_groups_as_it_found_them(finder, policy, tmp_path):
    start: list[dict[str, torch.Tensor]] = []
    searched: list[tuple[float, float]] = []

    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            start.append(quantizer_state(pl_module))
            assert trainer.global_step == 0 and trainer.current_epoch == 0
            groups = trainer.optimizers[0].param_groups
            assert len(groups) == (2 if policy is POLICY else 1)
            states = trainer.optimizers[0].state.values()
            assert all(state.get("momentum_buffer") is None for state in states)

    class Watched(Sized):
        def optimizer_step(self, epoch, batch_idx, optimizer, *args, **kwargs):
            super().optimizer_step(epoch, batch_idx, optimizer, *args, **kwargs)
            searched.append(tuple(group["lr"] for group in optimizer.param_groups))

    plain, tuned = Watched(), Watched()
    tuned.load_state_dict(plain.state_dict())
    trainer(tmp_path, Look(), policy=policy).fit(plain)
    searched.clear()
    trainer(tmp_path, Look(), finder(), policy=policy).fit(tuned)
    assert same(*start)
    assert len(searched) > 4, "it searched"
    if policy is POLICY:
        assert all(own == pytest.approx(0.1 * rest) for rest, own in searched)
        assert len({rest for rest, _ in searched}) > 1 or finder().__class__ is BatchSizeFinder
    assert (tuned.lr != plain.lr) if isinstance(finder(), LearningRateFinder) else (tuned.batch_size > plain.batch_size)


def test_the_tuner_finds_and_fit_begins_anew(tmp_path):
    net, tuned = Sized(), trainer(tmp_path)
    tuner = Tuner(tuned)
    assert tuner.scale_batch_size(net, max_trials=2, steps_per_trial=1) == 4
    found = tuner.lr_find(net, num_training=20, max_lr=0.5)
    assert net.lr == found.suggestion() != 0.05
    assert [type(c).__name__ for c in tuned.callbacks].count("QATCallback") == 1
    tuned.fit(net)
    rest, own = tuned.optimizers[0].param_groups
    assert (rest["lr"], own["lr"]) == (net.lr, pytest.approx(0.1 * net.lr))
