"""The path from a float model to a file without a trainer: docs/python.md, and what goes wrong on it."""

import copy
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from small_models import POLICY, Drawn, Shape, lived
from torch import Tensor, nn

import qat
from qat.config.presets import preset
from qat.errors import UserError
from qat.export.packed import load_packed
from qat.insert import named_quantizers
from qat.planning.plan import Plan

ROOT = Path(__file__).parents[1]
SNIPPETS = re.findall(r"^( *)```python\n(.*?)^ *```", (ROOT / "docs" / "python.md").read_text(), re.S | re.M)


def batch() -> Tensor:
    return Drawn(Shape()).example(16)


def quantized(**shape: Any) -> Drawn:
    model = lived(Drawn(Shape(**shape)))
    qat.quantize(model, POLICY, batch())
    return model


def test_the_documented_path_runs_from_a_float_model_to_onnx_runtime(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for indent, code in SNIPPETS:
        exec(re.sub(f"^{indent}", "", code, flags=re.M), names)
    assert names["accuracy"] > 0.88 and names["same"] > 0.98
    assert qat.plan_of(names["model"]).weights["3"].bits == 2
    x = names["x"][names["unseen"]]
    with torch.no_grad():
        assert torch.equal(names["again"].eval()(x), names["model"](x))
    qat.quantize(names["network"](), names["policy"], x)


@pytest.mark.parametrize(
    "example",
    [
        pytest.param(lambda model, x: x, id="tensor"),
        pytest.param(lambda model, x: (x,), id="arguments"),
        pytest.param(lambda model, x: {"x": x}, id="keywords"),
        pytest.param(lambda model, x: [x[:8], (x[8:],)], id="batches"),
        pytest.param(lambda model, x: lambda: model(x), id="function"),
    ],
)
def test_an_example_is_whatever_the_model_takes(example):
    x, model = batch(), lived(Drawn(Shape()))
    other = copy.deepcopy(model)
    assert qat.quantize(model, POLICY, example(model, x)) == qat.quantize(other, POLICY, x)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())


def test_a_program_keeps_its_own_hydra_while_a_preset_is_read(tmp_path):
    (tmp_path / "own.yaml").write_text("mine: 1")
    with initialize_config_dir(str(tmp_path), version_base=None):
        preset("w4a4")
        assert compose("own").mine == 1


def test_a_part_that_is_float_again_is_named_when_the_whole_is_converted():
    model = quantized()
    qat.remove(model.body)
    with pytest.raises(UserError, match=r"'body' has no quantizers any more; qat\.remove\(model\) before"):
        qat.to_integers(model)


def test_a_preset_is_what_the_command_line_knows_by_its_name():
    x, model = batch(), lived(Drawn(Shape()))
    assert qat.quantize(model, "w4a4", x).policy == preset("w4a4")
    assert {name: spec.bits for name, spec in qat.plan_of(model).weights.items()} == {"stem": 8, "body": 4, "head": 8}


@pytest.mark.parametrize(
    ("policy", "example", "said"),
    [
        pytest.param("w4a", batch(), "quant=w4a: there is no such preset; did you mean 'w4a", id="preset"),
        pytest.param(POLICY, [], "example=[]: holds no batch", id="no-batch"),
        pytest.param(POLICY, "images", "example=str: must be a tensor", id="example"),
        pytest.param(POLICY, batch() * torch.nan, "calibrating 'stem.input_quantizer'", id="nan"),
        pytest.param(
            {"weight": {"bits": 8}, "require_coverage": 1.0}, batch(), "quant.require_coverage=1.0", id="less"
        ),
    ],
)
def test_what_cannot_be_quantized_is_said_and_leaves_the_model_float(policy, example, said):
    model = lived(Drawn(Shape())).train()
    with pytest.raises(UserError, match=re.escape(said)):
        qat.quantize(model, policy, example)
    assert not list(named_quantizers(model)) and model.training
    qat.quantize(model, POLICY, batch())


def test_copies_and_pickles_know_the_plan_and_a_state_dict_does_not():
    model = quantized()
    plan = qat.plan_of(model)
    assert isinstance(plan, Plan)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), qat.to_integers(model)):
        assert qat.plan_of(other) == plan
    assert not [key for key in model.state_dict() if "plan" in key]
    qat.remove(model)
    with pytest.raises(UserError, match=r"^Drawn has no quantization plan: qat.quantize makes and inserts one$"):
        qat.plan_of(model)


def test_a_model_around_the_quantized_one_says_where_the_plan_is():
    with pytest.raises(UserError, match=r"^Sequential has no quantization plan; '0' in it has one$"):
        qat.to_integers(nn.Sequential(quantized()))


@pytest.mark.parametrize("target", ["onnx", "torch", "packed"])
def test_a_file_is_written_and_proven_from_the_model_or_from_its_integers(target, tmp_path):
    model, x = quantized(), batch()
    name = {"onnx": "model.onnx", "torch": "model.pt2", "packed": "model.safetensors"}[target]
    qat.export_model(model.train(), target, tmp_path / "one" / name, x, verify=True)
    qat.export_model(qat.to_integers(model), target, tmp_path / "two" / name, x, verify=target != "packed")
    assert model.training and (tmp_path / "one" / f"{name}.json").is_file() == (target != "packed")
    if target == "packed":
        loaded = load_packed(Drawn(Shape()), tmp_path / "two")
        assert torch.equal(loaded(x), qat.to_integers(model)(x))


def test_a_file_that_computes_something_else_is_an_error(tmp_path, monkeypatch):
    model, x, other = quantized(), batch(), quantized()
    with torch.no_grad():
        other.head.bias += torch.linspace(-9, 9, 5)
    written = qat.to_integers(other)
    monkeypatch.setattr("qat.export.onnx.target.OnnxTarget.prepared", lambda *_: written)
    with pytest.raises(UserError, match=r"model.onnx: predictions .* agree .*; no single layer diverges"):
        qat.export_model(model, "onnx", tmp_path / "model.onnx", x, verify=True)


@pytest.mark.parametrize(
    ("target", "file", "given", "said"),
    [
        pytest.param("onx", "m.onnx", {}, "target=onx: there is no such target; did you mean 'onnx'?", id="target"),
        pytest.param("onnx", "m.bin", {}, "m.bin: this target writes files called *.onnx", id="suffix"),
        pytest.param("onnx", "m.onnx", {"example": None}, "target=onnx: needs an example, one", id="no-example"),
        pytest.param("onnx", "m.onnx", {"weight": 1}, "target=onnx has no setting 'weight'", id="setting"),
        pytest.param("gguf", "m.gguf", {}, "m.gguf: model.gguf cannot hold this quant: it holds weights", id="form"),
    ],
)
def test_what_cannot_be_exported_is_said_in_the_words_of_the_command_line(target, file, given, said, tmp_path):
    with pytest.raises(UserError, match=re.escape(said)):
        qat.export_model(quantized(), target, tmp_path / file, **{"example": batch(), **given})
    assert not list(tmp_path.iterdir())


def test_integers_are_not_converted_again_nor_taken_for_the_quantized_model(tmp_path):
    integers = qat.to_integers(quantized())
    with pytest.raises(UserError, match=r"^Drawn is converted already: its weights are integers$"):
        qat.to_integers(integers)
    with pytest.raises(UserError, match=r"^target=compressed_tensors: takes the quantized model here"):
        qat.export_model(integers, "compressed_tensors", tmp_path / "folder")


def test_the_path_to_integers_needs_torch_alone():
    code = (
        "import sys, torch, qat; from torch import nn; model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(8, 4)\n"
        "qat.quantize(model, {'weight': {'bits': 8}, 'act': {'bits': 8}}, x)\n"
        "qat.quantizer_stats(model, lambda: model(x)); qat.to_integers(model)\n"
        "more = {'pytorch_lightning', 'hydra', 'omegaconf', 'onnx', 'onnxruntime', 'yaml'} & set(sys.modules)\n"
        "assert not more, more"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
