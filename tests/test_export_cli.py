"""`qat export` and `qat verify FILE RUN_DIR`: any run or checkpoint becomes a file without its data, and is proven."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from omegaconf import OmegaConf
from small_models import quantized
from torch import nn

from qat.cli import main
from qat.cli.bench import Opener
from qat.config.configs import configs_dir
from qat.config.exports import target_named
from qat.errors import UserError
from qat.export.bench import Measured, Timing
from qat.export.manifest import write_manifest
from qat.export.target import Target
from qat.files import replace
from qat.models import MLP, CausalLM
from qat.planning.plan import Plan
from qat.report.bench import save_bench_plot, warnings

TINY = """model=mlp model.width=16 data.train_limit=64 data.val_limit=32 data.test_limit=64 float_epochs=1
    trainer.max_epochs=1 trainer.limit_train_batches=1 trainer.enable_progress_bar=false quant.calibration_samples=64
    export.min_agreement=0 export.max_metric_change=1""".split()  # noqa: SIM905 - as one writes it on the command line
LLAMA = {
    "model_type": "llama", "vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32,
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", *TINY, f"run_dir={run_dir}"]) == 0
    return run_dir


def words(capfd) -> str:
    captured = capfd.readouterr()
    return " ".join((captured.out + captured.err).split())


def forbidden(*_: object) -> None:
    raise AssertionError("the data was read")


def test_an_export_needs_no_data_and_writes_the_same_file_again(run, tmp_path, monkeypatch, capfd):
    for name in ("prepare_data", "setup", "train_dataloader", "test_dataloader"):
        monkeypatch.setattr(f"qat.data.Digits.{name}", forbidden)
    assert main(["export", str(run), "target=onnx", f"out={tmp_path / 'again.onnx'}"]) == 0
    assert (tmp_path / "again.onnx").read_bytes() == (run / "model.onnx").read_bytes()
    assert "again.onnx" in words(capfd)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.onnx", "again.onnx.json"], "and nothing temporary"


@pytest.mark.parametrize("target", ["onnx", "packed"])
def test_a_folder_gets_the_file_under_its_own_name(target, run, tmp_path):
    assert main(["export", str(run), f"target={target}", f"out={tmp_path}"]) == 0
    assert (tmp_path / target_named(target, {}).file).is_file()


@pytest.mark.parametrize(
    ("target", "out"), [("onnx", "new"), ("onnx", "new.1/"), ("packed", "a/new"), ("packed", "new.1/")]
)
def test_a_folder_that_is_not_there_is_made(target, out, run, tmp_path):
    assert main(["export", str(run), f"target={target}", f"out={tmp_path}/{out}"]) == 0
    assert (tmp_path / out / target_named(target, {}).file).is_file()


def test_a_checkpoint_of_the_run_is_exported_and_verified_as_itself(run, tmp_path, capfd):
    checkpoint, out = str(run / "checkpoints" / "last.ckpt"), str(tmp_path / "last.onnx")
    assert main(["export", checkpoint, "target=onnx", f"out={out}"]) == 0
    assert main(["verify", out, checkpoint]) == 0
    assert "last.onnx: verified: weight codes identical" in words(capfd)


@pytest.mark.parametrize("target", ["onnx", "packed"])
def test_a_checkpoint_s_file_lies_apart_from_the_run_s_own(target, run, tmp_path):
    copied, file = shutil.copytree(run, tmp_path / "copied"), target_named(target, {}).file
    before = (copied / file).read_bytes()
    assert main(["export", str(copied / "checkpoints" / "last.ckpt"), f"target={target}"]) == 0
    assert (copied / file).read_bytes() == before and (copied / "checkpoints" / "last" / file).is_file()
    assert main(["export", str(copied / "quantized.ckpt"), f"target={target}"]) == 0, "the run's own, written again"
    assert sorted(p.name for p in (copied / "checkpoints").iterdir() if p.is_dir()) == ["last"]


@pytest.mark.parametrize(
    ("target", "out", "mine"),
    [
        pytest.param("onnx", "mine.onnx", ["mine.onnx"], id="file"),
        pytest.param("onnx", "new.onnx", ["new.onnx.json"], id="manifest"),
        pytest.param("packed", "", ["model.safetensors"], id="weights-in-a-folder"),
        pytest.param("packed", "", ["manifest.json"], id="manifest-in-a-folder"),
    ],
)
def test_what_no_export_wrote_is_not_written_over(target, out, mine, run, tmp_path, capfd):
    for name in mine:
        (tmp_path / name).write_text("mine")
    for _ in range(2):
        assert main(["export", str(run), f"target={target}", f"out={tmp_path / out}"]) == 2
        assert f"{tmp_path / mine[0]}: is there already, and no manifest says that" in words(capfd)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == dict.fromkeys(mine, "mine")


def test_the_float_reference_of_a_run_is_not_written_over(run, capfd):
    before = (run / "float.onnx").read_bytes()
    assert main(["export", str(run), "target=onnx", f"out={run / 'float.onnx'}"]) == 2
    assert "float.onnx: is there already" in words(capfd) and (run / "float.onnx").read_bytes() == before


def test_a_run_is_not_begun_where_its_files_would_take_the_place_of_others(tmp_path, capfd):
    for name in ("model.onnx", "model.safetensors"):
        (tmp_path / name).write_text("mine")
        assert main(["train", *TINY, f"run_dir={tmp_path}"]) == 2
        assert f"{tmp_path / name}: is there already" in words(capfd)
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()


class FolderTarget(Target):
    """A target whose main file is a folder."""

    file, graph, integer = "weights", None, False

    def write(self, model: nn.Module, plan: Plan, example: torch.Tensor, folder: Path) -> None:
        (folder / self.file).mkdir()
        (folder / self.file / "config.json").write_text("{}")


def test_a_folder_that_is_there_is_written_into_and_only_an_earlier_export_is_replaced(
    run, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr("qat.cli.export.target_named", lambda name, settings: FolderTarget())
    mine, export = tmp_path / "mine", ["export", str(run), "target=folder"]
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")
    for _ in range(2):
        assert main([*export, f"out={mine}"]) == 0
    assert sorted(p.name for p in mine.iterdir()) == ["thesis.txt", "weights", "weights.json"]
    for _ in range(2):
        assert main([*export, f"out={tmp_path / 'new'}"]) == 0
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["config.json"], "the same command, the same folder"
    (tmp_path / "new" / "tokenizer.json").write_text("mine")
    capfd.readouterr()
    assert main([*export, f"out={tmp_path / 'new'}"]) == 2
    assert "new/tokenizer.json: is there already, and no manifest says that FolderTarget wrote it" in words(capfd)
    assert (tmp_path / "new" / "tokenizer.json").read_text() == "mine"


@pytest.mark.parametrize("out", ["new/", "a/b/new.onnx"])
def test_a_refused_export_makes_no_folder(out, run, tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise UserError("cannot be written")

    monkeypatch.setattr("qat.export.onnx.target.OnnxTarget.write", refuse)
    assert main(["export", str(run), "target=onnx", f"out={tmp_path}/{out}"]) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("moved", [0, 1], ids=["before", "after"])
def test_an_export_that_was_interrupted_is_made_again(moved, run, tmp_path, monkeypatch):
    def interrupted(made: Path, path: Path) -> None:
        if moved:
            replace(made, path)
        raise KeyboardInterrupt

    command = ["export", str(run), "target=onnx", f"out={tmp_path}/"]
    with monkeypatch.context() as patch:
        patch.setattr("qat.export.target.replace", interrupted)
        assert main(command) == 130
    assert main(command) == 0 and main(["verify", str(tmp_path / "model.onnx"), str(run)]) == 0


def test_a_run_of_two_gpus_is_verified_on_a_machine_without_any(run, tmp_path, capfd):
    copied = shutil.copytree(run, tmp_path / "copied")
    config = OmegaConf.load(copied / ".hydra" / "config.yaml")
    config.trainer.update({"accelerator": "gpu", "devices": 2, "strategy": "ddp", "precision": "16-mixed"})
    OmegaConf.save(config, copied / ".hydra" / "config.yaml")
    assert main(["verify", str(copied / "model.onnx"), str(copied)]) == 0
    assert "model.onnx: verified: weight codes identical" in words(capfd)


def test_the_packed_integers_are_verified_by_the_loader_that_users_have(run, capfd):
    assert main(["verify", str(run / "model.safetensors"), str(run)]) == 0
    assert "model.safetensors: verified: weight codes identical" in words(capfd)


def test_data_that_lie_elsewhere_now_are_named_to_verify(run, capfd):
    assert main(["verify", str(run / "model.onnx"), str(run), "data.on_device=true"]) == 0
    assert main(["verify", str(run), "data.mean=[0.5]"]) == 2  # other numbers than the run was measured on
    assert "data.mean=[0.5]: the run in" in words(capfd)
    for wrong in (["verify", str(run), "data.mean=["], ["export", str(run), "target=onnx", "min_agreement=["]):
        assert main(wrong) == 2
        assert f"{wrong[-1]}: this is no value" in words(capfd)
    assert main(["verify", str(run), "data.on_devic=true"]) == 2
    assert "data.on_devic=true: the run's data has no 'on_devic'; did you mean 'on_device'?" in words(capfd)


def test_a_run_from_before_its_config_had_a_val_metric_is_exported_and_verified(run, tmp_path):
    old = shutil.copytree(run, tmp_path / "old")
    path = old / ".hydra" / "config.yaml"
    lines = [line for line in path.read_text().splitlines() if not line.startswith("val_metric:")]
    path.write_text("\n".join(lines).replace("${val_metric}", "val/acc"))
    assert "val_metric" not in path.read_text()
    assert main(["export", str(old), "target=packed", f"out={tmp_path / 'packed'}"]) == 0
    assert main(["verify", str(old)]) == 0


@pytest.mark.parametrize(
    ("name", "text", "said", "command"),
    [
        pytest.param("report.json", '{"name"', "no JSON", "verify", id="report-cut"),
        pytest.param("report.json", "{}", "lacks 'stages'", "verify", id="report-empty"),
        pytest.param("progress.json", "[]", "holds a list, no object", "verify", id="progress-list"),
        pytest.param("progress.json", "{}", "lacks 'start'", "verify", id="progress-empty"),
        pytest.param(".hydra/config.yaml", "", "lacks 'name'", "export", id="config-empty"),
        pytest.param(".hydra/config.yaml", "name: [", "no YAML of a config", "export", id="config-cut"),
        pytest.param(".hydra/config.yaml", "5", "no YAML of a config", "verify", id="config-number"),
        pytest.param(".hydra/config.yaml", None, "lacks 'model'", "verify", id="config-without-model"),
    ],
)
def test_a_damaged_file_of_a_run_is_named_in_one_line(name, text, said, command, run, tmp_path, capfd):
    copied = shutil.copytree(run, tmp_path / "copied")
    path = copied / name
    path.write_text(path.read_text().partition("\nmodel:")[0] if text is None else text)
    assert main([command, str(copied), *(["target=onnx"] if command == "export" else [])]) == 2
    assert capfd.readouterr().err == f"qat: error: {path}: is damaged: {said}\n"


def test_a_run_that_left_groups_out_is_verified(run, tmp_path, capfd):
    copied = shutil.copytree(run, tmp_path / "copied")
    config = OmegaConf.load(copied / ".hydra" / "config.yaml")
    del config["export"], config["callbacks"]  # as export=null writes it
    OmegaConf.save(config, copied / ".hydra" / "config.yaml")
    assert main(["verify", str(copied)]) == 0
    assert "model.safetensors: verified" in words(capfd)


@pytest.mark.parametrize(
    ("written", "named"),
    [
        pytest.param("qat.export.onnx_files.OnnxTarget", True, id="a-file-of-the-run"),
        pytest.param("qat.export.onnx_files.OnnxTarget", False, id="all-that-the-run-wrote"),
        pytest.param("gone.Exporter", True, id="a-file-and-a-class-that-is-gone"),
    ],
)
def test_a_run_is_verified_whose_exporter_has_another_path_now(written, named, run, tmp_path, capfd):
    copied = shutil.copytree(run, tmp_path / "copied")
    config = OmegaConf.load(copied / ".hydra" / "config.yaml")
    config.export._target_ = written
    OmegaConf.save(config, copied / ".hydra" / "config.yaml")
    assert main(["verify", *([str(copied / "model.onnx")] if named else []), str(copied)]) == 0
    assert "verified" in words(capfd)


def test_manifests_name_targets_as_older_files_do():
    now = {path.stem: OmegaConf.load(path).get("_target_", "") for path in (configs_dir() / "export").glob("*.yaml")}
    assert {name: path.rpartition(".")[2] for name, path in now.items() if path} == {
        "compressed_tensors": "CompressedTensorsTarget", "executorch": "ExecuTorchTarget", "gguf": "GgufTarget",
        "litert": "LiteRtTarget", "onnx": "OnnxTarget", "onnx_openvino": "OpenVinoOnnx", "onnx_qnn": "QnnOnnx",
        "onnx_tensorrt": "TensorRtOnnx", "openvino": "OpenVinoTarget", "packed": "PackedTarget",
        "torch": "TorchTarget", "torch_inductor": "InductorTarget",
    }  # fmt: skip


def scale_up(tensors) -> None:
    tensor = tensors["fc2.weight_scale"]
    tensor.raw_data = (onnx.numpy_helper.to_array(tensor) * np.float32(1.5)).tobytes()


def test_a_file_that_falls_short_fails_with_the_layer_where_it_begins(run, tmp_path, capfd):
    path = tmp_path / "wrong.onnx"
    model = onnx.load(run / "model.onnx")
    scale_up({t.name: t for t in model.graph.initializer})
    onnx.save(model, path)
    write_manifest(tmp_path / "wrong.onnx.json", "OnnxTarget", [path], {path.name: path.name})
    assert main(["verify", str(path), str(run)]) == 1
    said = words(capfd)
    assert "NOT VERIFIED" in said and "layers: the first layer that diverges is 'fc2'" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param(["{run}"], "write qat export RUN_DIR target=NAME", id="no-target"),
        pytest.param(["{run}", "target=onx"], "target=onx: there is no such target; did you mean 'onnx'?", id="target"),
        pytest.param(["{run}", "target=none"], "target=none: there is no such target", id="none"),
        pytest.param(["{run}", "target=onnx", "min_agremeent=1"], "did you mean 'min_agreement'", id="setting"),
        pytest.param(
            ["{run}", "target=onnx", "min_agreement=2"], "error: min_agreement=2: must be between", id="value"
        ),
        pytest.param(
            ["{run}", "target=onnx", "out=x.tflite"],
            "this target writes files called *.onnx; a folder's name ends in /",
            id="suffix",
        ),
        pytest.param(["nowhere", "target=onnx"], "nowhere: no such file or directory", id="nowhere"),
        pytest.param(
            ["{run}", "target=onnx", "out=/proc/x/y.onnx"],
            "/proc/x/y.onnx: nothing can be written into /proc",
            id="proc",
        ),
        pytest.param(
            ["{run}", "target=packed", "out=/proc/x/"],
            "/proc/x: there is no such folder, and none",
            id="packed-in-proc",
        ),
        pytest.param(["{run}/csv/metrics.csv", "target=onnx"], "is damaged or no checkpoint", id="no-checkpoint"),
        pytest.param(["{run}/float.safetensors", "target=onnx"], "is of a float model", id="float"),
    ],
)
def test_a_mistake_is_one_line_with_status_2_and_nothing_written(arguments, said, run, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    before = sorted(p.name for p in run.iterdir())
    assert main(["export", *(text.format(run=run) for text in arguments)]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and said in lines[0], lines
    assert sorted(p.name for p in run.iterdir()) == before and list(tmp_path.iterdir()) == []


def test_a_file_may_have_a_name_like_a_setting(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(run), "target=onnx", "out=x=y.onnx"]) == 0
    assert main(["verify", "x=y.onnx", str(run), "min_agreement=0"]) == 0


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def swap(path: Path) -> None:
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "another", [], [])), path)


def another_version(path: Path) -> None:
    manifest = path.with_name(f"{path.name}.json")
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 2, "qat": "7.0"}))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        pytest.param(truncate, "does not match model.onnx.json: damaged, or of another model", id="truncated"),
        pytest.param(flip, "does not match model.onnx.json: damaged, or of another model", id="flipped"),
        pytest.param(swap, "does not match model.onnx.json: damaged, or of another model", id="swapped"),
        pytest.param(another_version, "has format 2 (made by qat 7.0); this version reads format 1", id="version"),
        pytest.param(lambda p: p.with_name(f"{p.name}.json").unlink(), "model.onnx.json: no such file", id="unstamped"),
        pytest.param(Path.unlink, "model.onnx: no such file", id="gone"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(damage, said, run, tmp_path, capfd):
    for name in ("model.onnx", "model.onnx.json"):
        shutil.copy(run / name, tmp_path)
    damage(tmp_path / "model.onnx")
    assert main(["verify", str(tmp_path / "model.onnx"), str(run)]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and said in lines[0], lines


# -- every runtime -----------------------------------------------------------------------------------------------------


def needs(target: str) -> None:
    """Skips where the target's optional package is missing, naming the extra."""
    try:
        target_named(target, {})
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> Callable[[str], Path]:
    """Exports the run to a target, once."""
    made: dict[str, Path] = {}

    def export(target: str) -> Path:
        needs(target)
        if target not in made:
            out = tmp_path_factory.mktemp(target) / target_named(target, {}).file
            assert main(["export", str(run), f"target={target}", f"out={out}"]) == 0
            made[target] = out
        return made[target]

    return export


@pytest.fixture
def exported_weights(tmp_path) -> Callable[[str], Path]:
    """Models with quantized weights and float inputs, for the formats that are for these."""

    def export(target: str, **settings: str) -> Path:
        needs(target)
        weight = {"bits": 4, "granularity": "group", "group_size": 32}
        if target == "compressed_tensors":
            model: Any = CausalLM(LLAMA)
            x, rules = torch.zeros(2, 8, dtype=torch.long), {"ends": {"match": ["*embed*", "@last"], "weight": "off"}}
        else:
            model, x, rules = MLP(width=32), torch.zeros(2, 1, 8, 8), {}
        if target == "gguf":
            weight |= {"scale": "float16", "narrow": False}
        plan = quantized(model, x, {"weight": weight, "act": None, "sites": None, "rules": rules})
        to = target_named(target, settings)
        to.export(to.prepared(model, plan), plan, x, tmp_path / to.file)
        return tmp_path / to.file

    return export


RUNNERS = ["onnx", "openvino", "torch", "executorch", "litert", "packed"]
WEIGHTS = [("onnx", {"weight_only": "matmulnbits"}), ("gguf", {}), ("compressed_tensors", {})]
SNIPPETS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "docs" / "deploy.md").read_text(), re.S)


def snippet(target: str, **settings: str) -> str:
    """How docs/deploy.md opens a file."""
    named = "load_packed" if target == "packed" else f'"{target_named(target, settings).file}"'
    [found] = [code for code in SNIPPETS if named in code]
    return found


def assert_it_loads(code: str) -> None:
    names: dict[str, Any] = {}
    exec(code, names)
    assert np.isfinite(np.asarray(names["logits"])).all() and names["logits"].shape[-1] in (10, 40)
    assert len(code.splitlines()) < 15


@pytest.mark.parametrize("target", [*RUNNERS, "torch_inductor"])
def test_the_documented_way_to_load_a_file_works_in_under_15_lines(target, exported, monkeypatch):
    monkeypatch.chdir(exported(target).parent)
    assert_it_loads(snippet(target))


@pytest.mark.parametrize(("target", "settings"), WEIGHTS, ids=[target for target, _ in WEIGHTS])
def test_the_documented_way_to_load_weights_works_in_under_15_lines(target, settings, exported_weights, monkeypatch):
    monkeypatch.chdir(exported_weights(target, **settings).parent)
    assert_it_loads(snippet(target, **settings))


def test_every_snippet_of_the_page_is_run():
    assert {snippet(name) for name in [*RUNNERS, "torch_inductor", *(name for name, _ in WEIGHTS)]} == set(SNIPPETS)


@pytest.mark.parametrize("target", ["litert", pytest.param("executorch", marks=pytest.mark.slow)])
def test_an_int8_runtime_verifies_its_file_on_the_test_set_and_refuses_a_damaged_one(
    target, run, exported, tmp_path, capfd
):
    shutil.copytree(exported(target).parent, tmp_path, dirs_exist_ok=True)
    path = tmp_path / exported(target).name
    assert main(["verify", str(path), str(run)]) == 0
    said = words(capfd)
    assert f"{path.name}: verified: weight codes identical" in said
    assert "2 of 3 layers run on integers (1 without an integer kernel: nothing quantizes the output)" in said
    for damage in (flip, truncate):
        damage(path)
        assert main(["verify", str(path), str(run)]) == 2
        lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("qat")]
        assert len(lines) == 1 and f"does not match {path.name}.json: damaged, or of another model" in lines[0]


# -- bench -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", RUNNERS)
def test_every_runtime_can_be_benchmarked(target, run, exported):
    path, opener = exported(target), Opener(run)
    opener.prepare(path)
    for threads in (1, 2):
        runner = opener.open(path, threads)
        outputs = [runner(opener.sample(batch)) for batch in (1, 16)]
        assert [y.shape for y in outputs] == [(1, 10), (16, 10)]
        assert set(runner.float_layers()) <= {"fc1", "fc2", "linear"}
    torch.set_num_threads(1)


@pytest.mark.slow
def test_bench_measures_every_file_against_float_in_a_table_and_a_chart(run, tmp_path, capfd):
    chart = tmp_path / "bench.png"
    assert main(["bench", str(run / "model.safetensors"), f"out={chart}", "seconds=0.3", "threads=1", "batch=1,3"]) == 0
    said = words(capfd)
    assert "samples/s" in said and "peak memory" in said
    assert "warning: " in said and "model.safetensors is" in said and "in float: fc1, fc2, linear" in said
    assert chart.read_bytes().startswith(b"\x89PNG") and chart.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param(["nowhere.onnx"], "nowhere.onnx: no such file", id="no-file"),
        pytest.param(["{run}/model.onnx", "thread=1"], "no setting 'thread'; did you mean 'threads'?", id="setting"),
        pytest.param(["{run}/model.onnx", "threads=0"], "threads=0: must be at least 1", id="no-threads"),
        pytest.param(["{run}/model.onnx", "batch=many"], "batch=many: must be whole numbers", id="words"),
        pytest.param(["{run}/report.png"], "no target writes such a file", id="no-export"),
        pytest.param(["{run}/model.onnx", "out=/dev/null/x.png"], "out=/dev/null: there is no such", id="no-folder"),
        pytest.param(["{run}/model.onnx", "out=/proc/x/y.png"], "error: out=/proc/x: there is no such", id="proc"),
        pytest.param(["{run}/model.onnx", "out={run}/quantized.ckpt"], "ckpt: is for the chart, a", id="chart"),
        pytest.param(["nowhere.onnx", "out={run}/CHART.JPEG"], "nowhere.onnx", id="a-chart-but-no-file"),
        pytest.param(["{run}/model.onnx", "out={run}/model.onnx"], "onnx: is for the chart, a .png", id="itself"),
        pytest.param(["{run}/model.onnx", "run=/"], "/ is not the folder of the run that the files", id="no-run"),
    ],
)
def test_a_mistake_in_bench_is_one_line_with_status_2(arguments, said, run, capfd):
    assert main(["bench", *(text.format(run=run) for text in arguments)]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and said in lines[0], lines


@pytest.mark.parametrize(("suffix", "begins"), [(".png", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<?xml")])
def test_a_chart_has_the_format_of_its_name(suffix, begins, tmp_path):
    base = Measured("float", 100, timings=[Timing(1, 1, 1.0, 2.0, 1000)])
    save_bench_plot([base, base], tmp_path / f"x{suffix}")
    assert (tmp_path / f"x{suffix}").read_bytes().startswith(begins)


def test_bench_goes_without_a_float_file_and_for_less_than_a_second(run, tmp_path, monkeypatch, capfd):
    copied = shutil.copytree(run, tmp_path / "copied")
    (copied / "float.onnx").unlink()
    monkeypatch.setattr("qat.export.bench.peak_memory", lambda arguments: None)
    arguments = [f"out={tmp_path / 'bench.png'}", "seconds=0.01", "threads=1", "batch=1"]
    assert main(["bench", str(copied / "model.onnx"), *arguments]) == 0
    said = words(capfd)
    assert "p50 ms" in said and "of float" not in said and "speed" not in said
    assert (tmp_path / "bench.png").is_file()


def test_a_slower_file_is_warned_of_with_its_float_layers_and_a_faster_one_is_not():
    base = Measured("float", 100, timings=[Timing(1, 1, 1.0, 2.0, 1000), Timing(16, 1, 9.0, 9.0, 1777)])
    slow = Measured("a.onnx", 50, None, [Timing(1, 1, 0.9, 1, 1111), Timing(16, 1, 18.0, 20, 888)], ["conv1"])
    fast = Measured("b.onnx", 50, None, [Timing(1, 1, 0.9, 1, 1111), Timing(16, 1, 9.1, 20, 1758)], ["conv1"])
    assert warnings([base, slow, fast]) == [
        "warning: a.onnx is 2.00x slower than float (batch 16, 1 thread); in float: conv1"
    ]
