"""A quantized module is used as any other: compiled, in mixed precision, saved whole, reloaded, evaluated, pruned."""

import copy
import io
import pickle
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint, ModelPruning
from pytorch_lightning.plugins.layer_sync import TorchSyncBatchNorm
from pytorch_lightning.strategies import SingleDeviceStrategy
from tiny_module import MINMAX, POLICY, Tiny, images, loader, quantizer_state, same, trainer
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassJaccardIndex

from qat.convert import convert
from qat.copies import copied
from qat.errors import UserError
from qat.insert import named_quantizers, remove
from qat.layers.twin import original_class
from qat.lightning import (
    AnnealBits,
    Distill,
    FreezeOscillations,
    LearnBits,
    QuantizerHealth,
    ReestimateBatchNorm,
    load_from_checkpoint,
    load_weights,
)
from qat.lightning.losses import BatchLosses
from qat.lightning.steps import trainer_source
from qat.planning.planner import make_plan
from qat.policies.policy import QuantPolicy

# -- traced ------------------------------------------------------------------------------------------------------------


def test_a_trace_holds_how_weights_are_quantized_and_is_the_same_twice(tmp_path):
    """As `TensorBoardLogger(log_graph=True)` asks of it: torch compares a trace with one that has no gradients."""
    net, x = Tiny(), images()
    trainer(tmp_path).fit(net, loader(), loader())
    net.eval()
    with torch.no_grad():
        net(x)  # keeps quantized weights
    traced = torch.jit.trace(net, x)
    with torch.no_grad():
        net.net.head.weight.mul_(3.0)
        torch.testing.assert_close(traced(x), net(x))


# -- compiled ----------------------------------------------------------------------------------------------------------


class Direct(Tiny):
    """Its own forward holds a site, and it logs nothing (torch.compile of a module that logs breaks in Lightning)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.net.norm(self.net.stem(x)))
        return self.net.head(F.relu(self.net.conv(y) + y).mean((2, 3)))

    def validation_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


def _in_place(net: Tiny) -> Tiny:
    net.net.compile(backend="eager", fullgraph=True)
    return net


def _whole(net: Tiny) -> Any:
    return torch.compile(net, backend="eager")


@pytest.mark.parametrize(
    ("cls", "compiled"),
    [pytest.param(Tiny, _in_place, id="network-in-place"), pytest.param(Direct, _whole, id="module")],
)
@pytest.mark.parametrize("policy", [pytest.param(POLICY, id="lsq"), pytest.param(MINMAX, id="minmax")])
def test_a_module_compiled_before_fit_trains_and_validates_as_an_eager_one(policy, cls, compiled, tmp_path):
    torch._dynamo.reset()
    eager, other = cls(), cls()
    other.load_state_dict(eager.state_dict())
    trainer(tmp_path, policy=policy).fit(eager, loader(), loader())
    trainer(tmp_path, policy=policy).fit(compiled(other), loader(), loader())
    assert list(other.state_dict()) == list(eager.state_dict())
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)


def _called(net: Tiny) -> Tiny:
    net.compile(backend="eager")
    return net


COMPILED = [
    pytest.param(Tiny, _in_place, id="network-in-place"),
    pytest.param(Direct, _called, id="module-in-place"),
    pytest.param(Direct, _whole, id="module"),
]


@pytest.mark.parametrize(("cls", "compiled"), COMPILED)
def test_a_copy_of_a_compiled_module_computes_with_weights_of_its_own(cls, compiled, tmp_path):
    torch._dynamo.reset()
    net = cls()
    trainer(tmp_path, policy=None).fit(compiled(net), loader())
    expected = net.eval()(images())
    other = copied(net)
    for parameter in net.parameters():
        parameter.data.zero_()
    assert expected.any() and torch.equal(other(images()), expected)


@pytest.mark.parametrize(("cls", "compiled"), COMPILED)
def test_a_compiled_module_is_distilled_and_converted_as_an_eager_one(cls, compiled, tmp_path):
    torch._dynamo.reset()
    eager, other = cls(), cls()
    other.load_state_dict(eager.state_dict())
    found = []
    for net, module in ((eager, eager), (other, compiled(other))):
        fit = trainer(tmp_path, Distill(alpha=0.5, features="net.stem"))
        fit.fit(module, loader())
        made = convert(net, net.quantization_plan)
        for parameter in net.parameters():
            parameter.data.zero_()
        terms = [fit.callback_metrics[f"distill/{name}"] for name in ("output", "features")]
        assert all(terms)
        found.append([*terms, made(images())])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("cls", "compiled"), COMPILED)
def test_bits_of_a_compiled_module_are_learned(cls, compiled, tmp_path):
    torch._dynamo.reset()
    learn = LearnBits({"avg_bits": 4})
    trainer(tmp_path, learn, policy={**POLICY, "sites": {"bits": 8}}).fit(compiled(cls()), loader())
    assert set(learn.choice) == {"net.stem", "net.conv", "net.head"}


# -- precision ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [pytest.param(POLICY, id="lsq"), pytest.param(MINMAX, id="minmax")])
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])  # on a CPU, Lightning makes the second the first
def test_mixed_precision_keeps_scales_in_float32_and_trains_them(precision, policy, tmp_path):
    net, start = Tiny(), {}

    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            start.update(quantizer_state(pl_module))

    mixed = trainer(tmp_path, Look(), policy=policy, precision=precision)
    mixed.fit(net, loader(), loader())
    assert all(q.scale.dtype == torch.float32 and q.scale.isfinite().all() for _, q in named_quantizers(net))
    assert all(
        not torch.equal(start[n], v) for n, v in quantizer_state(net).items() if n.endswith("weight_quantizer.scale")
    )


def test_half_precision_gives_finite_gradients_to_every_scale(tmp_path):
    net = Tiny(norm=False)
    trainer(tmp_path).fit(net, loader())
    net.train().zero_grad()
    with torch.autocast("cpu", torch.float16):
        logits = net(images())
    assert logits.dtype == torch.float16
    logits.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in net.parameters())


@pytest.mark.parametrize("policy", [pytest.param(POLICY, id="lsq"), pytest.param(MINMAX, id="minmax")])
@pytest.mark.parametrize("data", ["float32 data", "data of its own"])
@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("bf16-true", torch.bfloat16), ("16-true", torch.float16), ("64-true", torch.float64)],
)
def test_a_model_of_another_type_is_calibrated_on_batches_of_its_type(precision, dtype, data, policy, tmp_path):
    net, batches = Tiny(norm=False), loader()
    if data == "data of its own":
        batches = DataLoader([(x.to(dtype), y) for x, y in batches.dataset], batch_size=4)
    trainer(tmp_path, policy=policy, precision=precision).fit(net, batches, batches)
    assert net.net.stem.weight.dtype == dtype and all(q.on for _, q in named_quantizers(net))


def test_scales_in_front_of_a_model_do_not_hide_its_type(tmp_path):
    class Mirrored(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + x.flip(-1)

    class Shifted(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(Mirrored(), self.net)

    net = Shifted()
    trainer(tmp_path, ReestimateBatchNorm(2), policy=POLICY | {"sites": {"bits": 8}}, precision="bf16-true").fit(
        net, loader(), loader()
    )
    assert "scale" in next(iter(net.named_parameters()))[0] and not net.net[1].norm.running_mean.isnan().any()


# -- saved and loaded --------------------------------------------------------------------------------------------------


def _through_torch(net: Any) -> Any:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = [
    pytest.param(_through_torch, id="torch-save"),
    pytest.param(lambda net: pickle.loads(pickle.dumps(net)), id="pickle"),
    pytest.param(copy.deepcopy, id="deepcopy"),
]


@pytest.mark.parametrize("through", COPIES)
def test_a_copy_of_the_trained_module_computes_the_same_and_can_be_trained_on(through, tmp_path):
    net = Tiny()
    trainer(tmp_path).fit(net, loader())
    other = through(net)
    assert original_class(other) is Tiny and torch.equal(other.eval()(images()), net.eval()(images()))
    trainer(tmp_path).fit(other, loader())
    assert not same(quantizer_state(net), quantizer_state(other))


def test_the_best_checkpoint_is_tested_after_early_stopping(tmp_path):
    net, saved = Tiny(lr=1.0), ModelCheckpoint(tmp_path, monitor="val/loss")
    stop = EarlyStopping("val/loss", patience=1)
    fitted = trainer(tmp_path, saved, stop, enable_checkpointing=True, max_epochs=30)
    fitted.fit(net, loader(), loader())
    assert fitted.current_epoch < 30, "it stopped"
    last = fitted.test(net, loader(), verbose=False)[0]["test/loss"]
    best = fitted.test(net, loader(), ckpt_path="best", verbose=False)[0]["test/loss"]
    assert best == pytest.approx(float(saved.best_model_score)) and best < last


def test_checkpoints_cross_between_float_and_quantized(tmp_path):
    """Float keys are untouched: they load strictly, both ways."""
    plain = Tiny()
    float_keys = set(plain.state_dict())
    torch.save(plain.state_dict(), tmp_path / "float.pt")
    net = Tiny()
    fitted = trainer(tmp_path)
    fitted.fit(net, loader())
    own = net.state_dict()
    missing, unexpected = net.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and missing and all("_quantizer" in key for key in missing)
    plain.load_state_dict({key: value for key, value in own.items() if key in float_keys}, strict=True)
    before = Tiny()
    load_weights(before, tmp_path / "float.pt")
    assert same(dict(before.state_dict()), torch.load(tmp_path / "float.pt"))

    fitted.save_checkpoint(tmp_path / "quantized.ckpt")
    ours = load_from_checkpoint(Tiny, tmp_path / "quantized.ckpt")
    assert torch.equal(ours.eval()(images()), net.eval()(images()))
    theirs = Tiny.load_from_checkpoint(tmp_path / "quantized.ckpt")
    assert type(theirs) is Tiny and theirs.state_dict().keys() == float_keys
    assert same(dict(theirs.state_dict()), {k: v for k, v in own.items() if k in float_keys})
    with pytest.raises(UserError, match="is quantized, and a float model is wanted"):
        load_weights(Tiny(), tmp_path / "quantized.ckpt")


@pytest.mark.parametrize("key", ["net.head.bias", "net.norm.running_var"])
def test_weights_of_nan_are_refused_and_masks_of_infinity_are_not(key, tmp_path):
    model = Tiny()
    model.register_buffer("mask", torch.tensor([-torch.inf]))
    torch.save(model.state_dict(), tmp_path / "float.pt")
    load_weights(model, tmp_path / "float.pt")
    torch.save({**model.state_dict(), key: model.state_dict()[key] * torch.nan}, tmp_path / "float.pt")
    with pytest.raises(UserError, match=f"float.pt: '{key}' holds NaN or infinity"):
        load_weights(model, tmp_path / "float.pt")


@pytest.mark.parametrize("loop", ["validate", "test", "predict"])
def test_loops_around_fit_compute_what_the_module_computes(loop, tmp_path):
    net = Tiny()
    fitted = trainer(tmp_path)
    fitted.fit(net, loader(), loader())
    found = getattr(fitted, loop)(net, loader())
    batches = list(loader())
    with torch.no_grad():
        outputs = [net.eval()(x) for x, _ in batches]
    if loop == "predict":
        assert all(torch.equal(a, b) for a, b in zip(found, outputs, strict=True))
    else:
        loss = sum(F.cross_entropy(o, y) for o, (_, y) in zip(outputs, batches, strict=True)) / len(batches)
        assert next(iter(found[0].values())) == pytest.approx(float(loss), rel=1e-5)


class Measured(Tiny):
    """Its metric adds to a state in place."""

    def __init__(self) -> None:
        super().__init__()
        self.jaccard = MulticlassJaccardIndex(3)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.jaccard.update(self(batch[0]), batch[1])
        self.log("val/jaccard", self.jaccard)


def test_a_metric_that_an_evaluation_before_has_filled_is_no_obstacle(tmp_path):
    net = Measured()
    trainer(tmp_path, policy=None).validate(net, loader())
    assert net.jaccard.confmat.is_inference()
    fitted = trainer(tmp_path)
    fitted.fit(net, loader(), loader())
    assert fitted.callback_metrics["val/jaccard"] == fitted.validate(net, loader())[0]["val/jaccard"]


# -- pruned ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_validation", [False, True])
def test_pruned_weights_stay_zero_on_the_grid_and_their_scales_still_learn(at_validation, tmp_path):
    net, start = Tiny(), {}
    prune = ModelPruning(
        "l1_unstructured", amount=0.5, parameter_names=["weight"], prune_on_train_epoch_end=not at_validation
    )

    class Look(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            start[trainer.current_epoch] = quantizer_state(pl_module)

    saved = ModelCheckpoint(tmp_path, save_last=True)
    pruned = trainer(tmp_path, prune, Look(), saved, enable_checkpointing=True, max_epochs=3)
    pruned.fit(net, loader(), loader())
    for layer in (net.net.stem, net.net.conv, net.net.head):
        share = (layer.weight == 0).float().mean()
        assert share > 0.1 and (layer.weight_quantizer(layer.weight)[layer.weight == 0] == 0).all()
    assert sum((m.weight == 0).sum() for m in (net.net.stem, net.net.conv, net.net.head)) >= 0.49 * (36 + 144 + 12)
    scales = [n for n in start[2] if n.endswith("weight_quantizer.scale")]
    assert all(not torch.equal(start[2][n], quantizer_state(net)[n]) for n in scales)
    tested = trainer(tmp_path).test(Tiny(), loader(), ckpt_path=saved.last_model_path, verbose=False)
    assert tested == trainer(tmp_path, policy=None).test(net, loader(), verbose=False)


def test_a_module_is_probed_where_it_is_not_where_lightning_will_move_it(tmp_path, monkeypatch):
    """As on a GPU, which the device of tensors without values stands for."""
    elsewhere = torch.device("meta")

    class Ahead(pl.Callback):
        def setup(self, trainer, pl_module, stage):
            pl_module._device = elsewhere

    monkeypatch.setattr(SingleDeviceStrategy, "tensor_init_context", lambda self, empty_init=None: elsewhere)
    module = Tiny()
    trainer(tmp_path, Ahead()).fit(module, loader(), loader())
    assert {name: t.device.type for name, t in module.state_dict().items() if t.is_meta} == {}
    assert all(quantizer.initialised for _, quantizer in named_quantizers(module))


@pytest.mark.parametrize("when", ["eval", "train"])
def test_batch_norms_that_lightning_exchanges_for_training_fold_all_the_same(when, monkeypatch, tmp_path):
    class Synced(SingleDeviceStrategy):
        """What `sync_batchnorm=True` does, for which DDP on GPUs is needed otherwise."""

        def setup(self, trainer):
            self.model = TorchSyncBatchNorm().apply(self.model)
            super().setup(trainer)

        def teardown(self):
            TorchSyncBatchNorm().revert(self.model)
            super().teardown()

    monkeypatch.setattr(nn.SyncBatchNorm, "forward", lambda self, x: nn.BatchNorm2d.forward(self, x))
    policy, states = {**POLICY, "round_bias": when}, []
    for strategy in (SingleDeviceStrategy(), Synced()):
        torch.manual_seed(0)
        module = Tiny()
        trainer(tmp_path, policy=policy, strategy=strategy).fit(module, loader(), loader())
        states.append(module.state_dict())
    assert original_class(module.net.norm) is not nn.BatchNorm2d
    assert same(*states)
    x = images()
    converted = convert(module, module.quantization_plan)
    with torch.no_grad():
        torch.testing.assert_close(converted(x), module.eval()(x))
    trainer(tmp_path, policy=policy).test(converted, loader(), verbose=False)
    assert type(converted.net.norm) is nn.Identity
    remove(module)
    assert make_plan(module, QuantPolicy.from_dict(policy), lambda: module(x))[0].batch_norms == {
        "net.stem": "net.norm"
    }


@pytest.mark.parametrize("hook", ["on_before_batch_transfer", "on_after_batch_transfer"])
def test_calibration_and_loss_differences_see_batches_as_the_module_s_hooks_make_them(hook, tmp_path):
    class Brighter(Tiny):
        def forward(self, x):
            seen.append(x.abs().max().item())
            return super().forward(x)

    seen: list[float] = []
    setattr(Brighter, hook, lambda self, batch, index: (batch[0].abs() + 100, batch[1]))
    model, t = Brighter(), trainer(tmp_path)
    t.fit(model, loader(64), loader())
    next(BatchLosses(trainer_source(t), samples=4)(model))
    probing = 1  # of nothing but shapes
    assert len(seen) > 20 and sum(peak < 100 for peak in seen) <= probing


@pytest.mark.parametrize(
    "callback",
    [
        pytest.param(lambda: AnnealBits({0: 8, 1: 4}), id="anneal"),
        pytest.param(lambda: FreezeOscillations((1.0, 0.01)), id="freeze"),
        pytest.param(lambda: QuantizerHealth(2), id="health"),
        pytest.param(lambda: LearnBits({"avg_bits": 4}, lr=1.0), id="learn-bits"),
    ],
)
def test_given_another_module_a_callback_starts_anew(callback, tmp_path):
    used, fresh = callback(), callback()
    head_apart = {**POLICY, "sites": "off", "rules": {"head": {"match": "net.head", "weight": {"bits": 8}}}}
    trainer(tmp_path, used, policy={**POLICY, "sites": "off"}, max_epochs=2).fit(Tiny(), loader(), loader())
    first, second = Tiny(), Tiny()
    second.load_state_dict(first.state_dict())
    for module, one in ((first, used), (second, fresh)):
        trainer(tmp_path, one, policy=head_apart, max_epochs=2).fit(module, loader(), loader())
    assert [q.spec for _, q in named_quantizers(first)] == [q.spec for _, q in named_quantizers(second)]
    assert same(first.state_dict(), second.state_dict())
    assert str(used.state_dict()) == str(fresh.state_dict())
