"""Distillation: what the teacher is, that its terms are in the loss exactly, and what a checkpoint holds of it."""

import copy
import math
import re

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from qat import QATCallback
from qat.errors import UserError
from qat.lightning import Distill
from qat.starts import Equalize

POLICY = {"weight": {"bits": 3, "granularity": "channel"}, "act": {"bits": 8}}


class Plain(pl.LightningModule):
    """An ordinary module; `form` says what its step returns, `indirect` that it calls its net, not itself."""

    def __init__(self, form: str = "tensor", indirect: bool = False, late: bool = False):
        super().__init__()
        self.form, self.indirect, self.net = form, indirect, None
        self.losses: list[float] = []
        self.gradients: list[torch.Tensor] = []
        if not late:
            self.configure_model()

    def configure_model(self):
        if self.net is None:
            self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x):
        return {"logits": self.net(x)} if self.form == "dict" else self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        out = self.net(x) if self.indirect else self(x)
        loss = F.cross_entropy(out["logits"] if isinstance(out, dict) else out, y)
        return {"loss": loss, "more": 1} if self.form == "dict" else None if self.form == "none" else loss

    def on_before_backward(self, loss):
        self.losses.append(loss.item())

    def on_before_optimizer_step(self, optimizer):
        if self.form != "none":
            self.gradients.append(self.net[0].weight.grad.clone())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data(batches: int = 4) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8 * batches, 6, generator=generator)
    return DataLoader(list(zip(x, torch.arange(len(x)) % 3, strict=True)), batch_size=8)


def trainer(*callbacks, **options) -> pl.Trainer:
    defaults = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet = {"accelerator": "cpu", "enable_model_summary": False}
    return pl.Trainer(callbacks=list(callbacks), **{**defaults, **quiet, **options})


def kl(teacher, student, t=1.0):
    return t**2 * F.kl_div(
        F.log_softmax(student / t, -1), F.log_softmax(teacher / t, -1), log_target=True, reduction="batchmean"
    )


@pytest.mark.parametrize("form", ["tensor", "dict"])
@pytest.mark.parametrize("t", [1.0, 3.0])
@pytest.mark.parametrize("order", [1, -1], ids=["after-qat", "before-qat"])
def test_the_first_loss_is_the_task_s_and_the_teacher_s_in_their_shares(form, t, order):
    module = Plain(form)
    float_net = copy.deepcopy(module.net)
    distill = Distill(alpha=0.6, temperature=t)
    fit = trainer(*[QATCallback(POLICY, calibration_samples=8), distill][::order], max_steps=1)
    quantized: dict = {}

    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            quantized["net"] = copy.deepcopy(pl_module.net)

    fit.callbacks.append(Look())
    fit.fit(module, data())
    x, y = next(iter(data()))
    student, teacher = quantized["net"](x), float_net(x)
    assert not torch.equal(student, teacher)
    expected = 0.4 * F.cross_entropy(student, y) + 0.6 * kl(teacher, student, t)
    assert module.losses[0] == pytest.approx(expected.item(), rel=1e-5)


def test_layers_that_are_made_late_are_taught_by_what_they_were_made_as():
    module, distill = Plain(late=True), Distill(alpha=1.0)
    trainer(QATCallback(POLICY, calibration_samples=8), distill, max_steps=1).fit(module, data())
    assert distill._teacher is not None and not list(distill._teacher.named_buffers())
    assert 0 < module.losses[0] < 0.5, "only what quantization has changed"


def test_features_count_by_their_relative_error():
    module = Plain()
    taught = copy.deepcopy(module)
    taught.net[0].weight.data *= 2
    distill = Distill(alpha=0.0, features="nte.0")
    with pytest.raises(UserError, match=r"no module matches 'nte\.0'; did you mean 'net\.0'"):
        trainer(distill, max_steps=1).fit(Plain(), data())
    distill = Distill(model=taught, alpha=0.0, features="net.0", feature_weight=3.0)
    before = copy.deepcopy(module)
    trainer(distill, max_steps=1).fit(module, data())
    x, y = next(iter(data()))
    a, b = before.net[0](x), taught.net[0](x)
    expected = F.cross_entropy(before.net(x), y) + 3 * ((a - b).square().sum() / b.square().sum())
    assert module.losses[0] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("order", "make", "said"),
    [
        pytest.param(1, {}, None, id="own-self"),
        pytest.param(-1, {}, "put Distill behind QATCallback", id="copied-before"),
        pytest.param(1, {"teacher": "float.safetensors"}, "set teacher to null", id="file"),
        pytest.param(1, {"model": nn.Linear(6, 3)}, "set teacher to null", id="another"),
    ],
)
def test_features_of_an_equalized_model_are_compared_with_those_of_a_teacher_that_is_equalized_alike(order, make, said):
    torch.manual_seed(0)
    module = Plain()
    with torch.no_grad():
        module.net[2].weight.mul_(torch.logspace(-1, 1, 8))
    distill = Distill(features="net.0", **make)
    policy = {"weight": {"bits": 8, "granularity": "channel"}, "act": {"bits": 8}}
    fit = trainer(*[QATCallback(policy, calibration_samples=8, starts=[Equalize()]), distill][::order], max_steps=1)
    if said is not None:
        with pytest.raises(UserError, match=f"features: Equalize scales .*; {said}"):
            fit.fit(module, data())
        return
    fit.fit(module, data())
    assert fit.callback_metrics["distill/features"] < 0.01


def test_a_glob_means_the_layers_of_both_and_no_quantizers():
    module, distill = Plain(), Distill(features="net*")
    trainer(QATCallback(POLICY, calibration_samples=8), distill, max_steps=1).fit(module, data())
    wider = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8))
    with pytest.raises(UserError, match=r"Sequential has no module 'net\.0'; choose from 0, 1, 2"):
        trainer(Distill(model=wider, features="net.*"), max_steps=1).fit(Plain(), data())


class Manual(Plain):
    automatic_optimization = False


@pytest.mark.parametrize(
    ("module", "settings", "said"),
    [
        pytest.param(Plain(), {"teacher": "nowhere.ckpt"}, "checkpoint nowhere.ckpt: no such file", id="file"),
        pytest.param(Plain(), {"features": "net.9"}, "no module matches 'net.9'", id="features"),
        pytest.param(Plain(), {"output_of": "nett"}, "has no module 'nett'; did you mean 'net'", id="output"),
        pytest.param(Manual(), {}, "optimizes manually", id="manual"),
    ],
)
def test_mistakes_show_before_a_float_training(module, settings, said, tmp_path):
    with pytest.raises(UserError, match=re.escape(said)):
        Distill(**settings).check(trainer(default_root_dir=tmp_path), module)
    later = Distill(tmp_path / "float" / "made_later.safetensors")
    later.check(trainer(default_root_dir=tmp_path), Plain())


def test_a_step_that_calls_a_part_of_the_module_says_so_with_output_of():
    with pytest.raises(UserError, match=re.escape("never calls self(x)")):
        trainer(Distill(), max_steps=1).fit(Plain(indirect=True), data())
    module = Plain(indirect=True)
    trainer(QATCallback(POLICY, calibration_samples=8), Distill(output_of="net"), max_steps=1).fit(module, data())
    assert module.losses[0] > 0


def test_accumulated_gradients_are_those_of_the_whole_batch():
    def gradient(batch_size, accumulate):
        torch.manual_seed(3)
        module, teacher = Plain(), Plain()
        loader = DataLoader(data().dataset, batch_size=batch_size)
        trainer(Distill(model=teacher), max_steps=1, accumulate_grad_batches=accumulate).fit(module, loader)
        return module.gradients[0]

    torch.testing.assert_close(gradient(16, 1), gradient(8, 2), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_it_works_in_the_precision_of_the_trainer(precision):
    module, distill = Plain(), Distill(model=Plain(), features="net.0")
    fit = trainer(distill, precision=precision)
    fit.fit(module, data())
    assert all(map(math.isfinite, module.losses)) and "distill/output" in fit.callback_metrics
    dtype = next(distill._teacher.parameters()).dtype
    assert dtype == (torch.bfloat16 if precision == "bf16-true" else torch.float32)


def test_the_teacher_stays_out_of_optimizer_and_checkpoint_and_nothing_is_left_on_the_module(tmp_path):
    module, distill = Plain(), Distill(features="net.0")
    float_weights = copy.deepcopy(module.net.state_dict())
    fit = trainer(QATCallback(POLICY, calibration_samples=8), distill)
    fit.fit(module, data())
    owned = {id(p) for p in distill._teacher.parameters()}
    assert not owned & {id(p) for group in fit.optimizers[0].param_groups for p in group["params"]}
    fit.save_checkpoint(tmp_path / "with.ckpt")
    saved = torch.load(tmp_path / "with.ckpt", weights_only=True)
    assert saved["state_dict"].keys() | saved["qat_state"].keys() == module.state_dict().keys()
    assert [list(v) for k, v in saved["callbacks"].items() if k.startswith("Distill")] == [["teacher"]]
    for name, value in distill._teacher.net.state_dict().items():
        assert torch.equal(value, float_weights[name]), "the teacher never learns"
    assert not any(part.training for part in distill._teacher.modules())
    assert "training_step" not in module.__dict__ and "configure_model" not in module.__dict__
    assert not module._forward_hooks and not module.net[0]._forward_hooks


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "16-true"])
def test_a_resumed_training_gives_the_same_losses_and_refuses_another_teacher(precision, tmp_path):
    def start():
        torch.manual_seed(5)
        return Plain()

    def callbacks():
        return QATCallback(POLICY, calibration_samples=8), Distill()

    whole = start()
    trainer(*callbacks(), max_epochs=2, precision=precision).fit(whole, data())
    first = start()
    fit = trainer(*callbacks(), max_epochs=1, precision=precision)
    fit.fit(first, data())
    fit.save_checkpoint(tmp_path / "half.ckpt")
    resumed, again = start(), trainer(*callbacks(), max_epochs=2, precision=precision)
    again.fit(resumed, data(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert resumed.losses == whole.losses[4:]
    other = Plain()
    with pytest.raises(UserError, match="had another teacher"):
        again.fit(other, data(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)


def test_the_teacher_can_be_a_file(tmp_path):
    teacher, module = Plain(), Plain()
    save_file(teacher.state_dict(), tmp_path / "teacher.safetensors")
    distill = Distill(tmp_path / "teacher.safetensors")
    trainer(QATCallback(POLICY, calibration_samples=8), distill, max_steps=1).fit(module, data())
    for name, value in teacher.state_dict().items():
        assert torch.equal(distill._teacher.state_dict()[name], value)
    with pytest.raises(UserError, match=r"did you mean 'teacher\.safetensors'"):
        trainer(Distill(tmp_path / "techer.safetensors"), max_steps=1).fit(Plain(), data())


def test_a_step_without_a_loss_is_left_alone():
    module = Plain("none")
    trainer(Distill(), max_steps=-1).fit(module, data())
    assert module.losses == []


def test_one_logit_has_no_classes_to_compare_but_a_value():
    class Binary(Plain):
        def forward(self, x):
            return self.net(x)[:, :1]

        def training_step(self, batch, batch_idx):
            return F.binary_cross_entropy_with_logits(self(batch[0])[:, 0], (batch[1] > 0).float())

    with pytest.raises(UserError, match=re.escape("one along class_axis=-1 of [8, 1]") + ".*use loss=mse"):
        trainer(Distill(), max_steps=1).fit(Binary(), data())
    fit = trainer(Distill(model=Binary(), loss="mse"))
    fit.fit(Binary(), data())
    assert fit.callback_metrics["distill/output"] > 0


@pytest.mark.parametrize("settings", [{"features": "net.1"}, {"output_of": "net.1"}], ids=["feature", "output"])
def test_what_a_reentrant_checkpoint_hides_from_the_gradient_is_named(settings):
    class Checkpointed(Plain):
        reentrant = True

        def forward(self, x):
            return checkpoint(self.net, x.requires_grad_(), use_reentrant=self.reentrant)

    with pytest.raises(UserError, match=r"'net\.1' ran without gradients.*use_reentrant=True"):
        trainer(Distill(**settings), max_steps=1).fit(Checkpointed(), data())
    module = Checkpointed()
    module.reentrant = False
    trainer(Distill(model=Plain(), **settings), max_steps=1).fit(module, data())


@pytest.mark.parametrize("thawed", [True, False])
def test_a_feature_that_is_frozen_at_first_is_learned_once_it_is_not(thawed, recwarn):
    class Thaw(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            pl_module.net[0].requires_grad_(thawed and batch_idx >= 2)

    class Frozen(Plain):
        on_before_optimizer_step = pl.LightningModule.on_before_optimizer_step

    modules = Frozen(), Frozen()
    modules[1].load_state_dict(modules[0].state_dict())
    for module, weight in zip(modules, (1.0, 0.0), strict=True):
        trainer(Distill(model=Plain(), features="net.0", feature_weight=weight), Thaw()).fit(module, data())
    assert torch.equal(modules[0].net[0].weight, modules[1].net[0].weight) != thawed
    told = [str(w.message) for w in recwarn if "the teacher had no effect: net.0" in str(w.message)]
    assert bool(told) != thawed


def test_a_look_without_gradient_beside_the_step_s_own_is_allowed():
    class Twice(Plain):
        def training_step(self, batch, batch_idx):
            with torch.no_grad():
                self(batch[0])
            return super().training_step(batch, batch_idx)

    module = Twice()
    trainer(Distill(features="net.0"), max_steps=1).fit(module, data())
    assert len(module.losses) == 1


def test_a_step_without_gradient_is_the_task_s_alone():
    losses = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            with torch.no_grad():
                losses.append((pl_module.training_step(batch, 0), F.cross_entropy(pl_module(batch[0]), batch[1])))

    trainer(Distill(), Look(), max_steps=1).fit(Plain(), data())
    assert losses and torch.equal(*losses[0])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        pytest.param({"alpha": 1.5}, "alpha=1.5: must be from 0 to 1", id="alpha"),
        pytest.param({"temperature": 0}, "temperature=0: must be above 0", id="temperature"),
        pytest.param({"loss": "l2"}, "loss='l2': must be kl or mse", id="loss"),
        pytest.param({"alpha": 0.0}, "nothing to learn from the teacher", id="nothing"),
        pytest.param({"feature_weight": -1.0}, "feature_weight=-1.0", id="feature-weight"),
        pytest.param({"loss": "mse", "temperature": 2.0}, "temperature=2.0: has no effect with loss=mse", id="mse-t"),
        pytest.param({"loss": "mse", "class_axis": 1}, "class_axis=1: has no effect with loss=mse", id="mse-axis"),
    ],
)
def test_wrong_settings_are_named(settings, said):
    with pytest.raises(UserError, match=re.escape(said)):
        Distill(**settings)
