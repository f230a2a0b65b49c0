"""`qat train` from end to end: what a run writes, what `qat verify` says of it, and how mistakes end."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import yaml
from pytorch_lightning.profilers import SimpleProfiler
from safetensors.torch import load_file
from small_models import exact_where_shared

from qat.cli import main
from qat.errors import UserError
from qat.export.manifest import write_manifest
from qat.lightning.weights import load_weights, read_checkpoint
from qat.models import MLP

TINY = ["model=mlp", "model.width=16", "data.train_limit=192", "data.val_limit=64", "data.test_limit=128"]
SHORT = [
    *TINY,
    "float_epochs=1",
    "trainer.max_epochs=1",
    "quant.calibration_samples=64",
    "trainer.enable_progress_bar=false",
]
EVERY_FILE = """float.safetensors float.onnx checkpoints/last.ckpt checkpoints/best.ckpt quantized.ckpt model.onnx
    model.onnx.json model.safetensors manifest.json audit.json report.json report.png progress.json csv/metrics.csv
    float/metrics.csv train.log .hydra/config.yaml""".split()  # noqa: SIM905 - as one writes it on the command line


def _train(run_dir: Path, *overrides: str, base=SHORT) -> int:
    with warnings.catch_warnings():
        return main(["train", *base, f"run_dir={run_dir}", *overrides])


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    assert _train(run_dir, "data.train_limit=null", "float_epochs=3", "trainer.max_epochs=2") == 0
    return run_dir


def _report(run_dir: Path) -> dict:
    return json.loads((run_dir / "report.json").read_text())


# -- what a run writes -----------------------------------------------------------------------------------------------


def test_a_run_writes_every_file_and_reports_every_stage(finished):
    assert [name for name in EVERY_FILE if not (finished / name).is_file()] == []
    hidden = [path.name for path in finished.rglob(".*") if path.is_file()]
    assert hidden == [".running"], "the lock of the run, and no temporary files"
    report = _report(finished)
    assert list(report["stages"]) == ["float", "ptq", "qat", "exported"]
    assert report["stages"]["qat"]["metric"] > 0.5, "it learns"
    assert report["verify"]["passed"] and report["verify"]["codes_identical"]
    assert {"name", "weight_bits", "act_bits", "weight_sqnr_db", "macs"} <= set(report["layers"][0])
    assert report["stages"]["exported"]["bytes"] == (finished / "model.onnx").stat().st_size
    stored = {k: v for k, v in load_file(finished / "model.safetensors").items() if "input_quantizer" not in k}
    for rows in (report["layers"], json.loads((finished / "audit.json").read_text())["rows"]):
        assert sum(row["bytes"] for row in rows) == sum(v.nbytes for v in stored.values())


def test_the_log_holds_the_scale_and_the_sqnr_of_every_layer(finished):
    header = (finished / "csv" / "metrics.csv").read_text().splitlines()[0].split(",")
    for layer in ("fc1", "fc2", "linear"):
        assert {f"scale/{layer}.weight_quantizer", f"scale/{layer}.input_quantizer", f"sqnr/{layer}"} <= set(header)


def test_a_run_says_little(tmp_path, capfd):
    assert _train(tmp_path / "run") == 0
    out, err = capfd.readouterr()
    for noise in (
        "GPU available",
        "deprecated",
        "Replaced initializer",
        "Removed",
        "Tip",
        "does not have many workers",
    ):
        assert noise not in out + err
    assert err == ""
    for said in ("Float", "Calibrated (PTQ)", "Quantization-aware training", "Exported", "verified"):
        assert said in out


# -- verification ----------------------------------------------------------------------------------------------------


def test_verify_passes_on_a_finished_run(finished, capfd):
    assert main(["verify", str(finished)]) == 0
    assert "verified: weight codes identical" in capfd.readouterr().out


def test_verify_fails_with_status_1_and_says_why_after_one_weight_code_was_changed(finished, capfd):
    path = finished / "model.onnx"
    original = path.read_bytes()
    model = onnx.load_from_string(original)
    tensor = next(t for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 2)
    codes = onnx.numpy_helper.to_array(tensor).copy()
    codes.flat[0] = codes.flat[0] + np.int8(1) if codes.flat[0] < 127 else codes.flat[0] - np.int8(1)
    tensor.CopyFrom(onnx.numpy_helper.from_array(codes, tensor.name))
    path.write_bytes(model.SerializeToString())
    manifest = path.with_name("model.onnx.json")
    stated = manifest.read_text()
    write_manifest(manifest, "OnnxTarget", [path], {path.name: path.name})
    try:
        assert main(["verify", str(finished)]) == 1
        said = capfd.readouterr().out
        assert "NOT VERIFIED: weight codes differ" in said and "weight codes: of 1 of 3 layers" in said
    finally:
        path.write_bytes(original)
        manifest.write_text(stated)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        pytest.param("report.json", "holds no finished run: there is no report.json", id="unfinished"),
        pytest.param("model.onnx", "model.onnx: no such file", id="file-gone"),
    ],
)
def test_verify_names_what_is_missing(name, said, finished, capfd):
    hidden = finished / name
    hidden.rename(finished / "hidden")
    try:
        assert main(["verify", str(finished)]) == 2
        assert said in capfd.readouterr().err
    finally:
        (finished / "hidden").rename(hidden)


# -- variants --------------------------------------------------------------------------------------------------------


def test_without_quantization_the_run_ends_with_the_float_model(tmp_path, capfd):
    assert _train(tmp_path / "run", "quant=off") == 0
    assert list(_report(tmp_path / "run")["stages"]) == ["float"] and (tmp_path / "run" / "float.onnx").is_file()
    assert not (tmp_path / "run" / "model.onnx").exists() and not (tmp_path / "run" / "checkpoints").exists()
    assert main(["verify", str(tmp_path / "run")]) == 2
    assert "was run with quant=off" in capfd.readouterr().err


def test_without_a_runtime_file_the_packed_integers_are_written_all_the_same(tmp_path, capfd):
    assert _train(tmp_path / "run", "export=none") == 0
    assert (tmp_path / "run" / "model.safetensors").is_file() and not (tmp_path / "run" / "model.onnx").exists()
    assert list(_report(tmp_path / "run")["stages"]) == ["float", "ptq", "qat"]
    assert main(["verify", str(tmp_path / "run")]) == 0
    assert "model.safetensors: verified: weight codes identical" in " ".join(capfd.readouterr().out.split())


@pytest.mark.parametrize(
    ("quant", "bits"),
    [("w8a8", [8, 8, 8]), ("w4a8", [8, 4, 8]), ("w4a4", [8, 4, 8]), ("w2a4", [8, 2, 8])],
)
def test_every_number_format_runs_to_the_end(quant, bits, finished, tmp_path):
    start = [f"quant={quant}", f"ckpt={finished / 'float.safetensors'}", "trainer.limit_train_batches=1"]
    assert _train(tmp_path / "run", *start, "export.max_metric_change=0.05", "export.min_agreement=0.9") == 0
    assert [layer["weight_bits"] for layer in _report(tmp_path / "run")["layers"]] == bits


def test_the_mixed_recipe_keeps_the_ends_of_a_cnn_at_8_bits(tmp_path):
    loose = ["export.max_metric_change=0.1", "export.min_agreement=0.8", "trainer.limit_train_batches=1"]
    base = [o for o in SHORT if not o.startswith("model")]
    assert _train(tmp_path / "run", "quant=mixed", *loose, base=base) == 0
    bits = [layer["weight_bits"] for layer in _report(tmp_path / "run")["layers"] if layer["weight_bits"]]
    assert bits == [8, 4, 4, 4, 4, 4, 8]


@pytest.mark.parametrize("debug", ["fdr", "limit", "overfit", "profiler"])
def test_every_debug_preset_runs_to_the_end(debug, tmp_path, monkeypatch):
    summaries = []  # Lightning prints them to whatever stderr was when it was imported
    monkeypatch.setattr(SimpleProfiler, "summary", lambda self: summaries.append(self) or "")
    loose = ["export.max_metric_change=0.1", "export.min_agreement=0.8"]
    overrides = [o for o in SHORT if "epochs" not in o] + (
        ["float_epochs=1", "trainer.max_epochs=2"] if debug == "overfit" else []
    )
    assert _train(tmp_path / "run", f"debug={debug}", *loose, base=overrides) == 0
    assert list(_report(tmp_path / "run")["stages"]) == ["float", "ptq", "qat", "exported"]
    ran = [s for s in summaries if "run_training_epoch" in s.recorded_durations]
    assert bool(ran) == (debug == "profiler")


def test_tensorboard_logs_below_the_run(tmp_path):
    pytest.importorskip("tensorboard", reason="needs the extra `tensorboard`")
    assert _train(tmp_path / "run", "logger=tensorboard", "quant.sites=off") == 0
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))


def test_wandb_offline_holds_layers_results_and_the_exported_files(tmp_path, monkeypatch):
    import wandb

    logged, artifacts, tables = [], [], []
    monkeypatch.setattr(
        wandb.Run,
        "log",
        lambda self, data, *a, **k: (
            logged.append(data) or tables.extend(k for k in data if isinstance(data[k], wandb.Table))
        ),
    )
    monkeypatch.setattr(wandb.Run, "log_artifact", lambda self, artifact: artifacts.append(artifact))
    assert _train(tmp_path / "run", "logger=wandb", "name=a run") == 0
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*")) and wandb.run is None
    keys = {key for data in logged for key in data}
    assert {"scale/fc1.weight_quantizer", "sqnr/fc1", "train/loss", "val/acc"} <= keys and tables == [
        "results",
        "layers",
    ]
    [artifact] = artifacts
    names = set(artifact.manifest.entries)
    assert artifact.name == "a-run-export" and names == {
        "model.onnx",
        "model.onnx.json",
        "model.safetensors",
        "manifest.json",
        "report.json",
        "report.png",
    }


def test_another_module_metric_and_scale_lr_reach_their_place(tmp_path):
    assert (
        _train(
            tmp_path / "run",
            "metric=test/loss",
            "val_metric=val/loss",
            "mode=min",
            "quant.scale_lr=0",
            "export.max_metric_change=0.1",
        )
        == 0
    )
    report = _report(tmp_path / "run")
    assert report["metric"] == "test/loss" and not report["higher_is_better"]
    rows = (tmp_path / "run" / "csv" / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("scale/fc1.input_quantizer")
    logged = [float(row.split(",")[column]) for row in rows[1:] if row.split(",")[column]]
    state = torch.load(tmp_path / "run" / "quantized.ckpt", weights_only=True)["qat_state"]
    assert logged == [pytest.approx(state["fc1.input_quantizer.scale"].item())]


# -- mistakes --------------------------------------------------------------------------------------------------------


class Trap:
    """Unpickled, it leaves a file."""

    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.fixture
def in_an_empty_folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        pytest.param(["quant.rules.stem.match=layr1.*"], "quant.rules.stem", id="pattern-that-matches-nothing"),
        pytest.param(["quant.weight.bit=4"], "did you mean 'quant.weight.bits'", id="misspelled-key"),
        pytest.param(
            ["+quant.rules.stem.weight.bitz=4"], "quant.rules.stem.weight.bitz", id="misspelled-key-in-a-rule"
        ),
        pytest.param(["+quant.wieght.bits=4"], "quant.wieght", id="added-key"),
        pytest.param(["quant.weight.bits=0"], "quant.weight: bits=0: ", id="no-bits"),
        pytest.param(["quant.weight.bits=33"], "quant.weight: bits=33: ", id="33-bits"),
        pytest.param(["quant.weight.bits=four"], "quant.weight.bits='four'", id="bits-in-words"),
        pytest.param(
            ["quant.calibration_samples=many"], "quant.calibration_samples='many': must be int", id="samples-in-words"
        ),
        pytest.param(
            ["quant.calibration_samples=0"], "quant.calibration_samples=0: must be at least 1", id="no-samples"
        ),
        pytest.param(["quant.scale_lr=-1"], "error: quant.scale_lr=-1: must be 0 or more", id="negative-rate"),
        pytest.param(["data.num_workers=-1"], "error: data.num_workers=-1: expected 0 or more", id="workers"),
        pytest.param(["cache_dir=/dev/null/x"], "error: cache_dir=/dev/null/x: there is no such folder", id="no-cache"),
        pytest.param(
            ["data.on_device=true", "data.num_workers=2"],
            "error: data.on_device=True: expected false, as data.num_workers prepare batches",
            id="both",
        ),
        pytest.param(["data.split_seed=-1"], "error: data.split_seed=-1: expected a seed from 0", id="split-seed"),
        pytest.param(["data.mean=[nan]"], "error: data.mean=[nan]: expected one number", id="mean-nan"),
        pytest.param(["model.lr=inf"], "error: model.lr=inf: expected a positive number", id="rate-infinite"),
        pytest.param(["float_model.lr=-1"], "error: float_model.lr=-1: expected a positive", id="float-model-value"),
        pytest.param(
            ["start=equalize", "start.equalize.rounds=0"], "error: start.equalize.rounds=0: must be", id="start-value"
        ),
        pytest.param(["seed=one"], "seed='one': must be int", id="seed-in-words"),
        pytest.param(["seed=-1"], "seed=-1: must be between 0 and", id="negative-seed"),
        pytest.param(["mode=maxx"], "mode='maxx': must be 'max' or 'min'; did you mean 'max'", id="mode"),
        pytest.param(["float_epochs=0"], "float_epochs=0: must be at least 1", id="no-float-epochs"),
        pytest.param(["float_model.lrr=0.1"], "did you mean 'float_model.lr'", id="float-model-key"),
        pytest.param(
            ["+float_model.lrr=0.1"], "float_model.lrr: MLP has no parameter 'lrr'", id="float-model-added-key"
        ),
        pytest.param(["float_model.lr=fast"], "float_model.lr='fast': MLP wants float", id="float-model-type"),
        pytest.param(["trainer.max_epochs=three"], "trainer.max_epochs='three'", id="trainer-type"),
        pytest.param(["callbacks.best.mode=maxx"], "callbacks.best", id="callback-value"),
        pytest.param(["export.min_agreement=2"], "error: export.min_agreement=2", id="export-value"),
        pytest.param(["data=cifar10", "data.root=/nope"], "/nope", id="data-folder"),
        pytest.param(
            ["model.num_classes=5"], "model.num_classes=5, but the data has the label 9", id="too-few-classes"
        ),
        pytest.param(["trainer.limit_test_batches=0"], "there is no test batch to measure it on", id="no-test-batch"),
        pytest.param(
            ["trainer.accumulate_grad_batches=0"], "trainer.accumulate_grad_batches=0: must be above 0", id="division"
        ),
        pytest.param(["trainer.strategy=ddp_fork"], "trainer.strategy=ddp_fork: what it trains stays", id="strategy"),
        pytest.param(["+trainer.callbacks=[]"], "trainer.callbacks: a run has its own", id="trainers-callbacks"),
        pytest.param(["callbacks.best=true"], "callbacks.best: has no _target_", id="callback-of-no-kind"),
        pytest.param(
            ["+callbacks.mine={_target_: torch.nn.ReLU}"],
            "callbacks.mine._target_: 'torch.nn.ReLU' makes no Callback",
            id="callback-of-another-kind",
        ),
        pytest.param(["ckpt=."], "checkpoint .: is no file", id="checkpoint-is-a-folder"),
        pytest.param(
            ["metric=test/accuracy"],
            "metric=test/accuracy: MLP.test_step logs no such value; did you mean 'test/acc'",
            id="metric",
        ),
        pytest.param(
            ["val_metric=val/precision"],
            "error: val_metric=val/precision: MLP.validation_step logs no such value; choose from val/loss, ",
            id="val-metric",
        ),
        pytest.param(
            ["metric=test/loss", "mode=min"],
            "error: val_metric=val/acc: mode=min is said of it, too; name what the module logs in validation for "
            "metric=test/loss, such as val_metric=val/loss",
            id="mode-of-the-metric-alone",
        ),
        pytest.param(
            ["callbacks.best.monitor=val/precision"],
            "callbacks.best.monitor=val/precision: MLP.validation_step logs no such value; choose from val/loss, ",
            id="monitor",
        ),
        pytest.param(
            ["+callbacks.stop={_target_: pytorch_lightning.callbacks.EarlyStopping, monitor: val_loss}"],
            "callbacks.stop.monitor=val_loss: MLP.validation_step logs no such value; did you mean 'val/loss'",
            id="monitor-of-another-callback",
        ),
        pytest.param(
            ["callbacks=anneal", "trainer.max_epochs=2"],
            "error: callbacks.anneal.schedule=2: training ends before, after max_epochs=2; give an earlier epoch",
            id="schedule-too-long",
        ),
        pytest.param(
            ["callbacks=learn_bits"],
            "error: callbacks.learn_bits.budget: avg_bits=3 bits cannot be met: the smallest feasible is 6.8",
            id="budget",
        ),
        pytest.param(
            ["callbacks=freeze"],
            "error: callbacks.freeze_batch_norm: MLP has no BatchNorm with running statistics",
            id="callback-without-work",
        ),
        pytest.param(["ckpt=last"], "ckpt=last: there is no run to resume in", id="nothing-to-resume"),
        pytest.param(["ckpt=nowhere.ckpt"], "checkpoint nowhere.ckpt: no such file", id="no-checkpoint"),
        pytest.param(
            ["distill=self", "callbacks.distill.teacher=nowhere.ckpt"],
            "checkpoint nowhere.ckpt: no such file",
            id="no-teacher",
        ),
        pytest.param(
            ["distill=self", "callbacks.distill.features=fc9"],
            "features: no module matches 'fc9'; did you mean 'fc2' or 'fc1'",
            id="features",
        ),
    ],
)
def test_a_mistake_is_one_line_with_status_2_and_nothing_written(overrides, said, in_an_empty_folder, capfd):
    base = [o for o in TINY if not o.startswith("data.")] if "data=cifar10" in overrides else TINY
    assert main(["train", *base, "run_dir=run", *overrides]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and said in lines[0], lines
    assert list(in_an_empty_folder.iterdir()) == []


@pytest.mark.parametrize("command", [["train"], ["train", "-m", "seed=0,1"], ["search", "packed=9kB"]], ids=" ".join)
def test_a_config_that_is_no_yaml_is_named_with_line_and_column(command, in_an_empty_folder, capfd):
    config = in_an_empty_folder / "own" / "model" / "mine.yaml"
    config.parent.mkdir(parents=True)
    config.write_text("_target_: qat.models.MLP\nwidth: [1, 2\nlr: 3\n")
    assert main([command[0], "--config-dir", "own", *command[1:], "model=mine"]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and f"{config}, line 3, column 3: is no YAML: " in lines[0], lines


def test_what_the_users_own_callbacks_log_may_be_monitored(own_parts):
    stop = "{_target_: pytorch_lightning.callbacks.EarlyStopping, monitor: val/mine}"
    own = ["+callbacks.mine={_target_: own_parts_of_run.Logs}", f"+callbacks.stop={stop}"]
    assert _train(Path("run"), "export=none", *own) == 0


def test_a_run_is_not_written_over_another(finished, capfd):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file() and path.suffix != ".log"}
    assert _train(finished, "seed=5") == 2
    assert f"{finished} holds a run: qat train ckpt=last run_dir={finished} goes on with it" in capfd.readouterr().err
    after = {path: path.stat().st_mtime_ns for path in before if ".hydra" not in path.parts}
    assert after == {path: at for path, at in before.items() if path in after}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        pytest.param(lambda path: path.write_bytes(b"PK\x03\x04 no zip"), "is damaged or no checkpoint", id="corrupt"),
        pytest.param(
            lambda path: torch.save({"state_dict": {}, "trap": Trap()}, path), "could run any code", id="with-code"
        ),
        pytest.param(
            lambda path: torch.save({"other.weight": torch.ones(1)}, path), "lacks 'fc1.weight'", id="another-models"
        ),
    ],
)
def test_a_bad_checkpoint_is_refused_and_never_executed(make, said, in_an_empty_folder, capfd):
    make(in_an_empty_folder / "bad.ckpt")
    assert main(["train", *TINY, "run_dir=run", "ckpt=bad.ckpt"]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and "checkpoint bad.ckpt" in lines[0] and said in lines[0], lines
    assert [path.name for path in in_an_empty_folder.iterdir()] == ["bad.ckpt"]


def test_only_checkpoints_are_suggested_for_one_that_is_not_there(tmp_path):
    for name in ("quantized.ckpt", "float.safetensors", "train.log", "nowhere.png"):
        (tmp_path / name).write_text("")
    with pytest.raises(UserError, match=r"no such file; choose from quantized\.ckpt, float\.safetensors$"):
        read_checkpoint(tmp_path / "nowhere")


def test_a_quantized_checkpoint_says_where_its_float_model_is(finished):
    for name in ("quantized.ckpt", "checkpoints/last.ckpt"):
        with pytest.raises(UserError) as refused:
            load_weights(MLP(width=16), finished / name)
        assert str(refused.value) == (
            f"checkpoint {finished / name}: is quantized, and a float model is wanted; "
            f"its float model is {finished / 'float.safetensors'}"
        )


def test_a_model_with_nothing_to_quantize_is_refused_before_training(in_an_empty_folder, monkeypatch, capfd):
    package = in_an_empty_folder / "bare_model.py"
    package.write_text(
        "from qat.models.classifier import Classifier\nimport torch\nfrom torch import nn\n"
        "class Bare(Classifier):\n    def __init__(self):\n        super().__init__(10)\n"
        "        self.scale = nn.Parameter(torch.zeros(10))\n"
        "    def forward(self, x):\n        return x.flatten(1)[:, :10] * self.scale\n"
    )
    monkeypatch.syspath_prepend(str(in_an_empty_folder))
    monkeypatch.setenv("QAT_TARGETS", "bare_model")
    config = in_an_empty_folder / "own" / "model"
    config.mkdir(parents=True)
    (config / "bare.yaml").write_text(yaml.safe_dump({"_target_": "bare_model.Bare"}))
    argv = ["train", "--config-dir", "own", "model=bare", "float_model=null", "run_dir=run"]
    assert main(argv) == 2
    assert "Bare has no layer that can be quantized" in capfd.readouterr().err
    assert not Path("run").exists()


OWN = """
import os
from pathlib import Path
import torch
from pytorch_lightning.callbacks import Callback
from torch.utils.data import DataLoader
from qat.data import Digits
from qat.errors import UserError
from qat.models import MLP
class Pair(MLP):
    def forward(self, x):
        return super().forward(x), x
    def _step(self, batch):
        logits = self(batch[0])[0]
        return torch.nn.functional.cross_entropy(logits, batch[1]), logits, batch[1]
class Fixed(MLP):
    def forward(self, x):
        return super().forward(x) + self.linear.bias.expand(len(x), -1)
class Nothing(Digits):
    def train_dataloader(self):
        return DataLoader([])
class Untested(Digits):
    def test_dataloader(self):
        return DataLoader([])
class Logs(Callback):
    def on_validation_end(self, trainer, pl_module):
        trainer.callback_metrics["val/mine"] = torch.tensor(1.0)
class Stops(Callback):
    def __init__(self, when: bool):
        self.when = when
    def on_train_start(self, trainer, pl_module):
        if self.when:
            raise UserError("when=True: never")
class Breaks(MLP):
    def training_step(self, batch, batch_idx):
        assert not self.training or os.path.exists("corrected"), "no such loss"
        return super().training_step(batch, batch_idx)
class Tied(MLP):
    def __init__(self, in_features: int = 64, num_classes: int = 10, width: int = 16):
        super().__init__(in_features, num_classes, width)
        self.again = torch.nn.Linear(width, width)
        self.again.weight = self.fc2.weight
    def forward(self, x):
        x = torch.relu(self.again(torch.relu(self.fc1(x.flatten(1)))))
        return self.linear(torch.relu(self.fc2(x)))
class Holed(MLP):
    def forward(self, x):
        part = "training" if self.training else "test"
        return super().forward(x * torch.nan if Path(f"nan-in-{part}").exists() else x)
"""
SMALLEST = [
    "~model.optimizer",
    "~model.momentum",
    "~model.warmup",
    "~model.lr",
    "~model.weight_decay",
    "float_model=null",
]


@pytest.fixture
def own_parts(in_an_empty_folder, monkeypatch) -> Path:
    """An empty folder whose module `own_parts_of_run` may be named."""
    (in_an_empty_folder / "own_parts_of_run.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(in_an_empty_folder))
    monkeypatch.setenv("QAT_TARGETS", "own_parts_of_run")
    return in_an_empty_folder


@exact_where_shared
def test_tied_parameters_are_kept_under_every_name(own_parts):
    assert _train(Path("run"), "model._target_=own_parts_of_run.Tied", *SMALLEST, "quant=w8a8", "cache_dir=cache") == 0
    state = load_file("run/float.safetensors")
    assert torch.equal(state["fc2.weight"], state["again.weight"])
    report = _report(Path("run"))
    assert report["verify"]["passed"] and report["verify"]["codes_identical"]


@pytest.mark.parametrize(("export", "rows"), [("none", []), ("packed", ["exported"])])
def test_what_needs_no_graph_takes_a_forward_that_has_none(export, rows, own_parts, capfd):
    assert _train(Path("run"), "model._target_=own_parts_of_run.Pair", f"export={export}") == 0
    stages = _report(Path("run"))["stages"]
    assert list(stages) == ["float", "ptq", "qat", *rows]
    assert stages["float"]["bytes"] is None and not Path("run/float.onnx").exists()
    capfd.readouterr()
    assert main(["verify", "run"]) == 0 and main(["export", "run", "target=packed", "out=."]) == 0
    said = " ".join(capfd.readouterr().out.split())
    assert "verified: weight codes identical, 100.00% of samples within a step of 8 bits" in said
    assert main(["export", "run", "target=onnx"]) == 2
    assert "Pair returns a tuple: ONNX export needs" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("override", "said"),
    [
        pytest.param(
            "model._target_=own_parts_of_run.Pair",
            "Pair returns a tuple: ONNX export needs a forward that returns one tensor; export=packed and export=none",
            id="two-outputs",
        ),
        pytest.param(
            "model._target_=own_parts_of_run.Fixed",
            "Fixed.forward makes the size of the batch a constant",
            id="fixed-batch",
        ),
        pytest.param("data._target_=own_parts_of_run.Nothing", "the train_dataloader is empty", id="no-training-data"),
        pytest.param("data._target_=own_parts_of_run.Untested", "the test_dataloader is empty", id="no-test-data"),
    ],
)
def test_what_cannot_be_exported_or_trained_is_refused_before_training(override, said, own_parts, capfd):
    assert main(["train", *TINY, "run_dir=run", override]) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("qat: error: ")]
    assert len(lines) == 1 and said in lines[0], lines
    assert not Path("run").exists()
    assert not Path("run").exists()


def test_a_run_that_a_mistake_stops_before_its_first_step_goes_on_corrected(own_parts, capfd):
    stops = "+callbacks.stops={_target_: own_parts_of_run.Stops, when: true}"
    assert _train(Path("run"), stops, "export=none", "quant=w2a2") == 2
    err = capfd.readouterr().err
    assert "qat: error: when=True: never" in err and "goes on with: qat train ckpt=last run_dir=" in err
    before = json.loads(Path("run/progress.json").read_text())["stages"]
    assert list(before) == ["float"], "what is calibrated may be corrected, too"
    assert main(["train", "ckpt=last", "run_dir=run", "quant=w8a8", "callbacks.stops.when=false"]) == 0
    after = _report(Path("run"))["stages"]
    assert list(after) == ["float", "ptq", "qat"] and after["float"] == before["float"]


def test_a_run_that_fails_in_its_first_step_starts_over_by_the_same_command(own_parts, capfd):
    same = ["model._target_=own_parts_of_run.Breaks", "export=none"]
    with pytest.raises(AssertionError, match="no such loss") as failed:
        _train(Path("run"), *same)
    assert "goes on with: qat train ckpt=last run_dir=" in failed.value.__notes__[0]
    Path("corrected").touch()
    capfd.readouterr()
    assert _train(Path("run"), *same) == 0
    assert list(_report(Path("run"))["stages"]) == ["float", "ptq", "qat"] and capfd.readouterr().err == ""


def test_training_on_no_batch_is_ptq_alone(finished, tmp_path, capfd):
    start = [f"ckpt={finished / 'float.safetensors'}", "export=none"]
    assert _train(tmp_path / "run", "trainer.limit_train_batches=0", *start) == 0
    assert "Quantization-aware training" not in capfd.readouterr().out
    assert list(_report(tmp_path / "run")["stages"]) == ["float", "ptq"]
    assert main(["train", "ckpt=last", f"run_dir={tmp_path / 'run'}", "trainer.limit_train_batches=2"]) == 0
    assert list(_report(tmp_path / "run")["stages"]) == ["float", "ptq", "qat"]


HOLED = [
    "model._target_=own_parts_of_run.Holed",
    "metric=test/loss",
    "mode=min",
    "quant=off",
    "cache_dir=cache",
]


@pytest.mark.parametrize(
    ("part", "said", "kept"),
    [
        pytest.param("training", "float training ended with NaN or infinity in 'fc1.weight': NaN in", False, id="fit"),
        pytest.param("test", "metric=test/loss: the float model measures nan, though its weights are", True, id="test"),
    ],
)
def test_a_float_model_of_nan_is_neither_done_nor_shared(part, said, kept, own_parts, capfd):
    Path(f"nan-in-{part}").touch()
    assert _train(Path("run"), *HOLED) == 2
    err = capfd.readouterr().err
    assert f"qat: error: {said}" in err and "corrected, it goes on with: qat train ckpt=last run_dir=" in err
    assert json.loads(Path("run/progress.json").read_text())["stages"] == {}
    assert not Path("run/float.safetensors").exists() and not list(Path("cache").glob("*/values.json"))
    assert Path("run/float/last.ckpt").is_file() is kept, "training goes on from no NaN"
    Path(f"nan-in-{part}").unlink()
    assert main(["train", "ckpt=last", "run_dir=run"]) == 0
    assert np.isfinite(_report(Path("run"))["stages"]["float"]["metric"])
    assert list(Path("cache").glob("*/values.json"))


def test_training_that_ends_in_nan_is_not_done_and_begins_anew_once_corrected(finished, own_parts, capfd):
    start = ["model._target_=own_parts_of_run.Holed", f"ckpt={finished / 'float.safetensors'}", "export=none"]
    Path("nan-in-training").touch()
    assert _train(Path("run"), *start, "callbacks.quantizers=null") == 2
    assert "qat: error: training ended with NaN or infinity in 'fc1.weight': NaN in the" in capfd.readouterr().err
    assert list(json.loads(Path("run/progress.json").read_text())["stages"]) == ["float", "ptq"]
    Path("nan-in-training").unlink()
    assert main(["train", "ckpt=last", "run_dir=run"]) == 0
    assert _report(Path("run"))["stages"]["qat"]["metric"] > 0.2


def test_ptq_alone_is_a_run_without_a_stage_of_training(tmp_path, capfd):
    run_dir = tmp_path / "run"
    assert _train(run_dir, "trainer.max_epochs=0", "export=packed", "callbacks=anneal") == 0
    said = capfd.readouterr().out
    assert list(_report(run_dir)["stages"]) == ["float", "ptq", "exported"] and "verified:" in said
    assert "Quantization-aware training" not in said and "QAT" not in said
    assert main(["verify", str(run_dir)]) == 0
    main(["inspect", str(run_dir)])
    assert "weights alone: the model is calibrated and not trained" in " ".join(capfd.readouterr().out.split())
    assert main(["train", "ckpt=last", f"run_dir={run_dir}", "trainer.max_epochs=1", "~callbacks.anneal"]) == 0
    assert list(_report(run_dir)["stages"]) == ["float", "ptq", "qat", "exported"]


def test_float_training_can_start_from_float_weights(finished, tmp_path, capfd):
    weights = f"float_ckpt={finished / 'float.safetensors'}"
    assert _train(tmp_path / "run", "quant=off", weights, "float_model.lr=1e-9") == 0
    before, after = (_report(run)["stages"]["float"]["metric"] for run in (finished, tmp_path / "run"))
    assert after == pytest.approx(before, abs=0.01), "one epoch at no learning rate leaves it as it was"
    assert _train(tmp_path / "other", weights, f"ckpt={finished / 'float.safetensors'}") == 2
    assert "leave one out" in capfd.readouterr().err and not (tmp_path / "other").exists()


def test_a_callback_without_a_target_is_refused_before_anything_is_trained(tmp_path, capfd):
    assert _train(tmp_path / "run", "+callbacks.stop={monitor: val/loss}") == 2
    assert "callbacks.stop: has no _target_, so there is no Callback for its monitor" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


FULL_PRECISION = """
import os, sys, torch
from qat.lightning.runs.evaluate import full_precision
for setting in sys.argv[1:]:
    child = os.fork()  # settings belong to a process; importing takes seconds
    if child:
        assert os.waitpid(child, 0)[1] == 0, setting
        continue
    exec(setting)
    cudnn, mkldnn, cuda = torch.backends.cudnn, torch.backends.mkldnn, torch.backends.cuda
    kinds = [cudnn.conv, cudnn.rnn, cuda.matmul, mkldnn.conv, mkldnn.matmul]
    before = [kind.fp32_precision for kind in kinds]
    with full_precision():
        assert not {"tf32", "bf16"} & {kind.fp32_precision for kind in kinds}, [kind.fp32_precision for kind in kinds]
    assert before == [kind.fp32_precision for kind in kinds], before
    sys.exit()
"""


def test_full_precision_is_full_and_leaves_what_it_found():
    settings = [
        "",  # as torch comes
        "torch.set_float32_matmul_precision('high')",
        "torch.backends.cuda.matmul.allow_tf32 = True",  # by an old name
        "torch.backends.cudnn.conv.fp32_precision = 'ieee'",  # by a new one
        "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",  # on the CPU
    ]
    run = subprocess.run([sys.executable, "-c", FULL_PRECISION, *settings], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
