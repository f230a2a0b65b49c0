"""What quantization-aware training elsewhere gets silently wrong, what Lightning's removed `QuantizationAwareTraining`
callback did among it: every item is a named test, here or elsewhere. benchmarks/breaks.py lists them, each with a break
of our handling that its test catches; benchmarks/break_each.py tries them all.
"""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import ModelCheckpoint
from small_models import quantized
from tiny_module import POLICY, Tiny, TinyNet, images, loader, trainer
from torch import Tensor, nn

from qat.convert import convert
from qat.insert import named_quantizers
from qat.lightning import load_from_checkpoint
from qat.planning.audit import audit
from qat.planning.planner import make_plan
from qat.policies.policy import QuantPolicy

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from breaks import BREAKS

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("entry", [pytest.param(e, id=e.what.replace(" ", "-")) for e in BREAKS])
def test_what_a_break_takes_out_is_there_once_and_so_is_the_test_that_catches_it(entry):
    handling = (ROOT / entry.file).read_text()
    assert handling.count(entry.old) == 1, f"{entry.file}: {entry.old}"
    compile(handling.replace(entry.old, entry.new), entry.file, "exec")
    file, _, name = entry.test.partition("::")
    found = re.findall(rf"^def {name.partition('[')[0]}\(", (ROOT / file).read_text(), re.MULTILINE)
    assert len(found) == 1, entry.test


def test_a_forward_of_several_arguments_and_keywords_keeps_its_signature(tmp_path):
    class Two(Tiny):
        def forward(self, x: Tensor, other: Tensor, *, weight: float = 1.0, head: bool = False) -> Tensor:
            y = self.net.norm(self.net.stem(x + weight * other))
            return self.net.head(y.mean((2, 3))) if head else y

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch[0], other=batch[0], weight=0.5, head=True), batch[1])

        validation_step = training_step

    net = Two()
    trainer(tmp_path).fit(net, loader(), loader())
    assert {n.rpartition(".")[0] for n, _ in named_quantizers(net)} >= {"net.stem", "net.head"}
    x = images()
    assert torch.equal(net.eval()(x, x, weight=0.5, head=True), net(x, other=x, weight=0.5, head=True))
    assert not torch.equal(net(x, x, head=True), net(x, x, weight=0.5, head=True))


def test_converting_after_fit_leaves_the_module_and_its_best_checkpoint_as_they_are(tmp_path):
    net, saved = Tiny(), ModelCheckpoint(tmp_path, monitor="val/loss")
    fitted = trainer(tmp_path, saved, enable_checkpointing=True, max_epochs=2)
    fitted.fit(net, loader(), loader())
    before = fitted.test(net, loader(), ckpt_path="best", verbose=False)
    converted = convert(net, net.quantization_plan)
    assert not list(named_quantizers(converted))
    assert fitted.test(net, loader(), ckpt_path="best", verbose=False) == before
    assert torch.equal(load_from_checkpoint(Tiny, saved.best_model_path).eval()(images()), net.eval()(images()))


def test_a_step_that_does_not_call_forward_is_quantized_by_what_it_calls(tmp_path):
    class NoForward(Tiny):
        forward = pl.LightningModule.forward

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        validation_step = training_step

    net = NoForward()
    trainer(tmp_path).fit(net, loader(), loader())
    assert {"net.stem.weight_quantizer", "net.add_0.input_quantizer_0"} <= dict(named_quantizers(net)).keys()


class Twice(nn.Module):
    """One layer under two names, and one that only a dict knows."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first
        self.hidden = {"layer": nn.Linear(4, 4)}

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden["layer"](F.relu(self.second(F.relu(self.first(x)))))


def test_a_module_under_two_names_is_one_layer_with_one_grid():
    model, x = Twice(), torch.randn(8, 4)
    quantized(model, x)
    assert [n for n, q in named_quantizers(model) if q.is_weight] == ["first.weight_quantizer"]
    assert model.second.weight_quantizer is model.first.weight_quantizer


def test_a_module_that_only_a_dict_knows_is_in_the_audit():
    model, x = Twice().eval(), torch.randn(8, 4)
    plan, recording = make_plan(model, QuantPolicy.from_dict(POLICY), lambda: model(x))
    float_rows = [row for row in audit(model, plan, recording) if row.reason]
    assert any((row.type, row.reason) == ("linear", "linear in the forward of Twice") for row in float_rows)


def test_modes_batch_norm_settings_and_dropout_are_left_alone():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, eps=3e-3, momentum=0.07), nn.Dropout(0.3), nn.Linear(8, 2))
    model[1].eval()  # frozen by the user
    x = torch.randn(8, 4)
    before = [m.training for m in model.modules()]
    make_plan(model, QuantPolicy.from_dict(POLICY), lambda: model(x))
    assert [m.training for m in model.modules()] == before
    quantized(model, x)
    model.train().eval().train()
    assert (model[1].eps, model[1].momentum, model[2].p) == (3e-3, 0.07, 0.3)


def test_every_bias_has_a_gradient():
    model, x = TinyNet(), images()
    quantized(model, x)
    model.train()(x).square().sum().backward()
    biases = {n: p.grad for n, p in model.named_parameters() if n.endswith("bias") and n != "stem.bias"}
    assert biases and all(grad is not None and grad.any() for grad in biases.values())


def test_a_strict_export_never_drops_functional_sites():
    model = TinyNet().eval()
    quantized(model, images())
    try:
        program = torch.export.export(model, (images(),), strict=True)
    except Exception as error:  # refused: dynamo says so in its own words
        assert "sites are told apart by their order" in str(error)
    else:
        assert torch.equal(program.module()(images(3)), model(images(3)))
