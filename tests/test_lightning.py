"""`QATCallback` on a module that knows nothing of it: insertion, calibration, optimizers, checkpoints."""

import copy
import pickle
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import StochasticWeightAveraging
from pytorch_lightning.loggers import CSVLogger
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import ConstantLR, CyclicLR, LambdaLR, OneCycleLR, ReduceLROnPlateau, SequentialLR
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import qat
from qat.calibrate import needs_calibration
from qat.errors import UserError
from qat.insert import named_quantizers
from qat.lightning import QATCallback, load_from_checkpoint

SPEC = {"bits": 4}
POLICY = {"weight": SPEC, "act": SPEC}
MINMAX = {"weight": SPEC | {"quantizer": "minmax"}, "act": SPEC | {"quantizer": "minmax"}}


def _layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))


class Net(pl.LightningModule):
    """Builds its layers when told: `init`, `setup` or `configure_model`."""

    def __init__(self, built_in: str = "init") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.built_in = built_in
        self.accuracy = MulticlassAccuracy(3)
        self.outputs: list[torch.Tensor] = []
        self._build("init")

    def _build(self, where: str) -> None:
        if self.built_in == where and not hasattr(self, "net"):
            self.net = _layers()

    def setup(self, stage: str) -> None:
        self._build("setup")

    def configure_model(self) -> None:
        self._build("configure_model")

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        self.accuracy(logits, y)
        self.outputs.append(logits)
        self.log("val/acc", self.accuracy)

    def test_step(self, batch, batch_idx):
        self.log("test/sum", self(batch[0]).abs().sum())

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return SGD(self.parameters(), lr=0.1, weight_decay=1e-3, momentum=0.9)


def _loader(samples: int = 32, batch_size: int = 8, shuffle: bool = False) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 8, generator=generator)
    return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=batch_size, shuffle=shuffle)


def _trainer(tmp_path, *callbacks, policy=POLICY, **settings) -> pl.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "accelerator": "cpu", "max_epochs": 1, "default_root_dir": tmp_path}
    return pl.Trainer(callbacks=[QATCallback(policy, 16), *callbacks], **(quiet | settings))


def _scales(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: q.scale.detach().clone() for name, q in named_quantizers(module)}


def _same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def _fitted(tmp_path, net=None, **settings) -> tuple[pl.Trainer, Net]:
    net = net or Net()
    trainer = _trainer(tmp_path, **settings)
    trainer.fit(net, _loader(), _loader())
    return trainer, net


# -- insertion -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("built_in", ["init", "setup", "configure_model"])
def test_layers_are_found_wherever_they_are_built_and_their_scales_are_trained(built_in, tmp_path):
    net = Net(built_in)
    seen = {}

    class Before(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            seen.update(_scales(pl_module))

    trainer = _trainer(tmp_path, Before())
    trainer.fit(net, _loader(), _loader())
    assert sorted(seen) == [
        "net.0.input_quantizer",
        "net.0.weight_quantizer",
        "net.4.input_quantizer",
        "net.4.weight_quantizer",
    ]
    assert all(not torch.equal(seen[name], scale) for name, scale in _scales(net).items())


def test_a_model_without_quantizable_layers_is_an_error_that_names_it(tmp_path):
    net = Net("never")
    net.net = nn.Sequential(nn.BatchNorm1d(8), nn.AdaptiveMaxPool1d(3))
    with pytest.raises(UserError, match="Net has no layer that can be quantized"):
        _trainer(tmp_path).fit(net, _loader())


def test_a_callback_that_must_see_the_quantized_model_may_not_come_first(tmp_path):
    trainer = _trainer(tmp_path, max_epochs=2)
    trainer.callbacks.insert(0, StochasticWeightAveraging(0.1))
    with pytest.raises(UserError, match="QATCallback must come before StochasticWeightAveraging"):
        trainer.fit(Net(), _loader())


# -- optimizer groups ------------------------------------------------------------------------------------------------


def _optimizers(net: Net, configure, tmp_path, factor: float | None = None) -> list[Optimizer]:
    """The optimizers of a fit, before its first step."""
    net.configure_optimizers = configure
    found = []

    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            found.extend(
                copy.deepcopy(
                    [[dict(g, params=[id(p) for p in g["params"]]) for g in o.param_groups] for o in trainer.optimizers]
                )
            )

    class Configured(Net):
        def configure_optimizers(self):
            return configure(self)

    net.__class__ = Configured
    del net.__dict__["configure_optimizers"]
    trainer = pl.Trainer(
        callbacks=[QATCallback(POLICY, 16, scale_lr_factor=factor), Look()], max_epochs=1, limit_train_batches=2,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        accelerator="cpu", default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(net, _loader())
    return found


def _split(net: Net, groups) -> tuple[list[dict], list[dict]]:
    scales = {id(q.scale) for _, q in named_quantizers(net)}
    own = [g for g in groups if set(g["params"]) <= scales]
    rest = [g for g in groups if not set(g["params"]) & scales]
    assert len(own) + len(rest) == len(groups), "a group mixes scales and weights"
    assert {p for g in own for p in g["params"]} == scales
    return rest, own


@pytest.mark.parametrize("named", [False, True], ids=["parameters", "named-parameters"])
@pytest.mark.parametrize(
    ("cls", "factor", "expected"),
    [
        pytest.param(SGD, None, 0.1, id="sgd-decides"),
        pytest.param(AdamW, None, 3.0, id="adamw-decides"),
        pytest.param(torch.optim.RMSprop, None, 3.0, id="rmsprop-decides"),
        pytest.param(AdamW, 0.5, 0.5, id="given"),
    ],
)
def test_scales_have_a_group_of_their_own(named, cls, factor, expected, tmp_path):
    net = Net()
    params = (lambda m: m.named_parameters()) if named else (lambda m: m.parameters())
    [groups] = _optimizers(net, lambda m: cls(params(m), lr=0.1, weight_decay=0.05), tmp_path, factor)
    [rest], [own] = _split(net, groups)
    assert (rest["lr"], rest["weight_decay"], own["weight_decay"]) == (0.1, 0.05, 0.0)
    assert own["lr"] == pytest.approx(0.1 * expected)


def test_each_of_several_groups_and_optimizers_is_split(tmp_path):
    net = Net()
    net.automatic_optimization = False
    net.training_step = lambda batch, batch_idx: None

    def configure(m):
        first = SGD([{"params": m.net[0].parameters(), "lr": 0.2}, {"params": [m.net[1].weight]}], lr=0.1)
        return [first, AdamW(m.net[4].parameters(), lr=0.1)]

    groups = [g for optimizer in _optimizers(net, configure, tmp_path) for g in optimizer]
    rest, own = _split(net, groups)
    assert [g["lr"] for g in rest] == [0.2, 0.1, 0.1]
    assert [g["lr"] for g in own] == pytest.approx([0.02, 0.3])


def _warm(optimizer):
    return SequentialLR(optimizer, [ConstantLR(optimizer, 0.5, 1), LambdaLR(optimizer, lambda t: 1.0)], [1])


@pytest.mark.parametrize(
    ("make", "peak"),
    [
        pytest.param(lambda o: LambdaLR(o, lambda t: 0.5), 0.05, id="lambda"),
        pytest.param(lambda o: LambdaLR(o, [lambda t: 0.5]), 0.05, id="lambda-list"),
        pytest.param(partial(ReduceLROnPlateau, factor=0.5, patience=0, min_lr=[0.02]), 0.1, id="plateau-list"),
        pytest.param(_warm, 0.05, id="sequential"),
        pytest.param(partial(OneCycleLR, max_lr=1.0, total_steps=10, div_factor=10), 0.1, id="one-cycle"),
        pytest.param(partial(OneCycleLR, max_lr=[1.0], total_steps=10, div_factor=10), 0.1, id="one-cycle-list"),
        pytest.param(partial(CyclicLR, base_lr=0.2, max_lr=1.0), 0.2, id="cyclic"),
    ],
)
def test_schedulers_keep_the_ratio_of_learning_rates(make, peak, tmp_path):
    net, ratios = Net(), []

    def configure(m):
        optimizer = SGD(m.parameters(), lr=0.1, momentum=0.9)
        scheduler = make(optimizer)
        rest, own = optimizer.param_groups
        ratios.append((rest["lr"], own["lr"] / rest["lr"]))
        for _ in range(4):
            optimizer.step()
            scheduler.step(*[1.0] * isinstance(scheduler, ReduceLROnPlateau))
            ratios.append((rest["lr"], own["lr"] / rest["lr"]))
        return optimizer

    _optimizers(net, configure, tmp_path, factor=0.1)
    assert ratios[0][0] == pytest.approx(peak)
    assert [ratio for _, ratio in ratios] == pytest.approx([0.1] * 5)


# -- ranges ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [pytest.param(POLICY, id="lsq"), pytest.param(MINMAX, id="minmax")])
def test_sanity_checks_and_validation_never_move_ranges(policy, tmp_path):
    seen = []

    class Look(pl.Callback):
        def on_sanity_check_start(self, trainer, pl_module):
            seen.append(_scales(pl_module))

        def on_train_start(self, trainer, pl_module):
            assert _same(seen[0], _scales(pl_module))

        def on_validation_start(self, trainer, pl_module):
            seen.append(_scales(pl_module))

        def on_validation_end(self, trainer, pl_module):
            assert _same(seen[-1], _scales(pl_module))

    net = Net()
    trainer = _trainer(tmp_path, Look(), policy=policy, num_sanity_val_steps=2)
    trainer.fit(net, _loader(), _loader())
    assert len(seen) == 3 and not _same(seen[0], seen[-1]), "training moves them"


def test_calibration_leaves_no_trace(tmp_path):
    net, logger = Net(), CSVLogger(tmp_path)
    before = {}

    class Around(QATCallback):
        def on_fit_start(self, trainer, pl_module):
            before.update(copy.deepcopy({k: v for k, v in pl_module.state_dict().items() if "quantizer" not in k}))
            rng, modes = torch.get_rng_state(), [m.training for m in pl_module.modules()]
            super().on_fit_start(trainer, pl_module)
            assert torch.equal(rng, torch.get_rng_state())
            assert modes == [m.training for m in pl_module.modules()]
            assert _same(before, {k: v for k, v in pl_module.state_dict().items() if "quantizer" not in k})
            assert not pl_module.outputs and not pl_module.accuracy.update_called
            assert not trainer.callback_metrics and not trainer.logged_metrics
            assert trainer.loggers == [logger] and "log" not in pl_module.__dict__
            assert all(q.initialised for _, q in named_quantizers(pl_module))

    trainer = _trainer(tmp_path, logger=logger)
    trainer.callbacks[0] = Around(POLICY, 16)
    trainer.fit(net, _loader(), _loader())
    assert before


class Counting(Net):
    """Its steps write to one buffer, and make another anew, with its length beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))
        self.register_buffer("angles", torch.zeros(0))
        self.length = 0

    def validation_step(self, batch, batch_idx):
        self.seen += 1
        if self.length < len(batch[0]):
            self.length = len(batch[0])
            self.angles = torch.arange(self.length)
        super().validation_step(batch, batch_idx)


def test_calibration_leaves_no_trace_in_buffers_either(tmp_path):
    net = Counting()
    _trainer(tmp_path, limit_val_batches=0).fit(net, _loader())
    assert net.seen == 0 and len(net.angles) == net.length > 0
    assert all(q.initialised for _, q in named_quantizers(net))


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_a_stage_before_fit_calibrates_and_fit_then_trains_what_it_made(stage, tmp_path):
    net, trainer = Net(), _trainer(tmp_path)

    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            return _loader()

        val_dataloader = test_dataloader = predict_dataloader = train_dataloader

    seen = []
    hook = "on_validation_end" if stage == "validate" else f"on_{stage}_end"
    during = {hook: lambda *_: seen.extend(q.training for _, q in named_quantizers(net))}
    trainer.callbacks.append(type("Modes", (pl.Callback,), during)())
    getattr(trainer, stage)(net, datamodule=Data())
    assert seen and not any(seen) and all(m.training for m in net.modules()), "in evaluation, and back in training"
    before = _scales(net)
    assert len(before) == 4 and all(q.initialised for _, q in named_quantizers(net))
    assert not any(t.is_inference() for t in net.state_dict().values())
    _trainer(tmp_path).fit(net, datamodule=Data())
    assert not _same(before, _scales(net))


def test_calibration_without_training_data_says_what_to_pass(tmp_path):
    with pytest.raises(UserError, match="no training data to calibrate on"):
        _trainer(tmp_path).test(Net(), _loader(), verbose=False)


# -- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("built_in", ["init", "configure_model"])
def test_a_checkpoint_is_tested_resumed_and_loaded_by_the_plain_class(built_in, tmp_path):
    trainer, net = _fitted(tmp_path, Net(built_in))
    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    expected = trainer.test(net, _loader(), verbose=False)

    assert _trainer(tmp_path).test(Net(built_in), _loader(), ckpt_path=path, verbose=False) == expected
    loaded = load_from_checkpoint(Net, path)
    assert isinstance(loaded, Net) and loaded.built_in == built_in
    assert _same(loaded.state_dict(), net.state_dict())
    assert (
        pl.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False).test(loaded, _loader(), verbose=False)
        == expected
    )

    other = Net(built_in)
    seen = []

    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            seen.append(_same(pl_module.state_dict(), net.state_dict()))

    _trainer(tmp_path, Look(), max_epochs=2).fit(other, _loader(), ckpt_path=path)
    assert seen == [True] and not _same(_scales(other), _scales(net))


def test_resuming_from_a_float_checkpoint_says_how_to_start_from_one(tmp_path):
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    trainer.fit(Net(), _loader())
    path = tmp_path / "float.ckpt"
    trainer.save_checkpoint(path)
    with pytest.raises(UserError, match="the checkpoint is of a float model"):
        _trainer(tmp_path, max_epochs=2).fit(Net(), _loader(), ckpt_path=path)


def test_resuming_under_another_policy_is_an_error_that_names_the_setting(tmp_path):
    trainer, _ = _fitted(tmp_path)
    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    with pytest.raises(UserError, match=r"another quantization policy \(weight.bits differ\)"):
        _trainer(tmp_path, policy=POLICY | {"weight": {"bits": 8}}, max_epochs=2).fit(Net(), _loader(), ckpt_path=path)


def test_a_setting_that_is_null_is_one_that_older_checkpoints_lack(tmp_path):
    trainer, _ = _fitted(tmp_path)
    trainer.save_checkpoint(path := tmp_path / "last.ckpt")
    newer = POLICY | {"act": {**POLICY["act"], "group_axis": None}}
    _trainer(tmp_path, policy=newer, max_epochs=2).fit(Net(), _loader(), ckpt_path=path)


def test_resuming_under_another_rate_of_scales_is_an_error(tmp_path):
    trainer, _ = _fitted(tmp_path)
    trainer.save_checkpoint(path := tmp_path / "last.ckpt")
    callback, quiet = QATCallback(POLICY, 16, scale_lr_factor=0.5), {"logger": False, "enable_progress_bar": False}
    other = pl.Trainer(callbacks=[callback], max_epochs=2, accelerator="cpu", default_root_dir=tmp_path, **quiet)
    with pytest.raises(UserError, match=r"scale_lr_factor=0\.5: the checkpoint was trained with None"):
        other.fit(Net(), _loader(), ckpt_path=path)
    other.test(Net(), _loader(), ckpt_path=path, verbose=False)


def test_a_module_without_its_quantizers_is_quantized_anew_under_any_policy(tmp_path):
    _, net = _fitted(tmp_path)
    qat.remove(net)
    assert net.quantization_plan is None
    wider = {"weight": {"bits": 8}, "act": SPEC}
    _trainer(tmp_path, policy=wider, max_epochs=1).fit(net, _loader(), _loader())
    assert qat.plan_of(net).policy == wider and not needs_calibration(net)


def test_a_module_that_was_quantized_by_hand_trains_on_and_keeps_its_plan_in_checkpoints(tmp_path):
    net = Net()
    plan = qat.quantize(net, POLICY, next(iter(_loader()))[0])
    trainer = _trainer(tmp_path, max_epochs=1)
    trainer.fit(net, _loader(), _loader())
    assert net.quantization_plan == plan
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert qat.load_from_checkpoint(Net, tmp_path / "last.ckpt").quantization_plan == plan


def test_a_quantized_module_does_not_take_another_policy_in_silence(tmp_path):
    trainer, net = _fitted(tmp_path)
    trainer.fit(net, _loader(), _loader())  # the same one goes on
    other = _trainer(tmp_path, policy={"weight": {"bits": 8}, "act": SPEC})
    with pytest.raises(UserError, match=r"Net is quantized already, with another policy \(weight.bits differ\)"):
        other.fit(net, _loader(), _loader())


def test_a_float_checkpoint_is_not_loaded_as_a_quantized_model(tmp_path):
    trainer = pl.Trainer(accelerator="cpu", logger=False, max_epochs=1, default_root_dir=tmp_path)
    trainer.fit(Net(), _loader(), _loader())
    trainer.save_checkpoint(tmp_path / "float.ckpt")
    with pytest.raises(UserError, match=r"is of a float model; Net\.load_from_checkpoint loads it"):
        load_from_checkpoint(Net, tmp_path / "float.ckpt")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param({"policy": "w4a4"}, "quant='w4a4': must be settings such as", id="a-presets-name"),
        pytest.param({"policy": None}, "quant=None: must be settings such as", id="no-policy"),
        pytest.param({"policy": POLICY, "starts": "equalize"}, "starts='equalize': must be a list", id="a-starts-name"),
        pytest.param({"policy": POLICY, "starts": [3]}, r"starts=\[3\]: must be a list", id="no-start"),
    ],
)
def test_a_wrong_argument_of_the_callback_is_named(arguments, said):
    with pytest.raises(UserError, match=said):
        QATCallback(**arguments)


def test_the_module_can_be_pickled_and_copied_in_the_middle_of_training(tmp_path):
    copies = []

    class Copy(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            made = pickle.loads(pickle.dumps(pl_module)), copy.deepcopy(pl_module)
            copies.append((made, {k: v.clone() for k, v in pl_module.state_dict().items()}))

    net = Net()
    _trainer(tmp_path, Copy()).fit(net, _loader())
    x = torch.randn(4, 8)
    for made, state in copies:
        for each in made:
            assert type(each) is type(net) and _same(each.state_dict(), state)
    assert torch.equal(copies[-1][0][0].eval()(x), copies[-1][0][1].eval()(x))


@pytest.mark.parametrize("first", ["last.ckpt", 3, nn.Linear], ids=["a path", "a number", "another class"])
def test_what_is_loaded_is_a_class_and_then_a_path(first):
    with pytest.raises(UserError, match="the LightningModule's class comes first"):
        load_from_checkpoint(first, "last.ckpt")
