"""Training fast changes how it is computed, not what: channels last, compiled, in mixed precision."""

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from qat.errors import UserError
from qat.lightning import AnnealBits, ChannelsLast, Compile, Distill, QATCallback
from qat.models import MLP, ResNet

POLICY = {"weight": {"bits": 4, "granularity": "channel"}, "act": {"bits": 4}, "sites": {"bits": 8}}


def trained(*callbacks, precision="32-true", model=None):
    """A ResNet-8 after two epochs of two batches, the second of which is smaller."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 3, 8, 8, generator=generator)
    y = torch.randint(10, (12,), generator=generator)
    torch.manual_seed(0)
    model = ResNet(8, lr=0.01) if model is None else model
    trainer = pl.Trainer(
        max_epochs=2, callbacks=[QATCallback(POLICY), *callbacks], accelerator="cpu", precision=precision, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, DataLoader(TensorDataset(x, y), batch_size=8))
    return model


class Watch(pl.Callback):
    """Notes how an activation lies in memory."""

    def __init__(self) -> None:
        self.formats, self.dtypes = set(), set()

    def on_train_start(self, trainer, pl_module):
        quantizer = pl_module.layer2[0].conv2.input_quantizer
        quantizer.register_forward_pre_hook(lambda _, args: self._note(args[0]))

    def _note(self, x):
        self.formats.add(x.is_contiguous(memory_format=torch.channels_last))
        self.dtypes.add(x.dtype)


class HowRun(pl.Callback):
    """Notes for each training batch whether it runs compiled."""

    def __init__(self) -> None:
        self.compiled = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.compiled.append(pl_module._compiled_call_impl is not None)


def test_channels_last_reaches_the_activations_and_changes_nothing_else():
    watch = Watch()
    plain, fast = trained(), trained(ChannelsLast(), watch)
    assert watch.formats == {True}
    assert list(fast.state_dict()) == list(plain.state_dict())
    for name, value in plain.state_dict().items():
        # Sums in another order: now and then a value falls on the other side of a border between two codes.
        torch.testing.assert_close(fast.state_dict()[name], value, rtol=0.02, atol=2e-3, msg=name)


def test_channels_last_without_a_convolution_is_an_error():
    with pytest.raises(UserError, match="MLP has no parameter of four dimensions"):
        trained(ChannelsLast(), model=MLP(in_features=192, width=8))


@pytest.fixture
def eager_backend(monkeypatch):
    """torch.compile without a C++ compiler: the captured graph, with its guards, run by torch."""
    compile_ = torch.compile

    def captured(function, fullgraph, options):
        return compile_(function, fullgraph=fullgraph, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", captured)
    yield
    torch._dynamo.reset()


def test_compiled_training_takes_the_same_steps_bits_changing_included(eager_backend):
    how, anneal = HowRun(), {0: 8, 1: 4}
    plain, fast = trained(AnnealBits(anneal)), trained(AnnealBits(anneal), Compile(fullgraph=True), how)
    assert how.compiled == [True, False] * 2  # the second batch is smaller
    assert fast._compiled_call_impl is None
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(fast.state_dict()[name], value, rtol=0.02, atol=2e-3, msg=name)


def test_a_batch_that_somebody_watches_runs_as_it_is_written(eager_backend):
    class Hook(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 2:
                self.handle = pl_module.conv1.register_forward_hook(lambda *_: None)

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 3:
                self.handle.remove()

    how = HowRun()
    trained(Hook(), Compile(), how)
    assert how.compiled == [True, False, False, False]


@pytest.mark.parametrize("features", [[], ["layer1"]], ids=["outputs", "features"])
def test_a_student_that_is_listened_to_is_compiled_once(features, eager_backend):
    seen = torch._dynamo.utils.counters["stats"]
    seen.clear()
    distilled = dict(alpha=0.5, features=features)
    plain, fast = trained(Distill(**distilled)), trained(Distill(**distilled), Compile(fullgraph=True))
    assert seen["unique_graphs"] == 2  # of two epochs: the student's and the teacher's
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(fast.state_dict()[name], value, rtol=0.02, atol=2e-3, msg=name)


def test_hooks_of_a_teacher_are_heard_by_whoever_is_compiled_next(eager_backend):
    def teacher(factor):
        torch.manual_seed(1)
        model = ResNet(8)
        if factor != 1:
            model.conv1.register_forward_hook(lambda m, args, y: y * factor)
        return model

    for factor in (1, 5):
        plain, fast = (trained(Distill(model=teacher(factor)), *more) for more in ([], [Compile()]))
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(fast.state_dict()[name], value, rtol=0.02, atol=2e-3, msg=name)
    assert not torch.equal(plain.linear.weight, trained(Distill(model=teacher(1))).linear.weight)


def test_grids_stay_in_float32_under_autocast():
    watch = Watch()
    model = trained(watch, precision="bf16-mixed")
    quantizer = model.layer2[0].conv2.input_quantizer
    assert watch.dtypes == {torch.bfloat16}
    assert quantizer.scale.dtype == torch.float32
    # A large tensor and a bfloat16 one that holds the same values: the same codes.
    x = torch.randn(4096).abs().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer.quantize(x), quantizer.quantize(x.float()))
