"""`qat sensitivity` and `qat search` as they are typed, and what training makes of the YAML."""

import json
import re
import shlex

import pytest
import yaml

from qat.cli import main

TINY = """model=mlp model.width=16 data.train_limit=192 data.val_limit=64 data.test_limit=128 float_epochs=2
    trainer.max_epochs=1 quant.calibration_samples=64 trainer.enable_progress_bar=false search.samples=128
    search.probes=1 search.repeats=5 search.weight_bits=[2,4,8] search.act_bits=[4,8] search.least=null""".split()  # noqa: SIM905
SEARCHLESS = [text for text in TINY if not text.startswith("search.")]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A folder in which everything has been measured, by `qat sensitivity`."""
    folder = tmp_path_factory.mktemp("search")
    assert main(["sensitivity", *TINY, f"search.dir={folder}"]) == 0
    return folder


@pytest.fixture
def search(measured, tmp_path):
    """Runs `qat search` on what was measured; configs of its own are in `tmp_path/configs`."""
    (tmp_path / "configs" / "quant").mkdir(parents=True)

    def run(*words: str) -> int:
        return main(["search", *TINY, f"search.dir={measured}", "--config-dir", str(tmp_path / "configs"), *words])

    return run


def test_sensitivities_are_measured_once_for_every_command(measured, search, capsys):
    content = json.loads((measured / "sensitivity.json").read_text())
    assert set(content["tensors"]) == {f"{n}.{p}" for n in ("fc1", "fc2", "linear") for p in ("weight", "input")}
    entry = content["tensors"]["fc1.weight"]
    assert set(entry["bits"]) == {"2", "4", "8"} and set(entry["bits"]["4"]) == {"loss_increase", "mse", "sqnr_db"}
    assert (measured / "sensitivity.png").read_bytes().startswith(b"\x89PNG")
    weights, times = (measured / "float.safetensors").stat().st_mtime_ns, json.dumps(content)
    assert search("avg_bits=4", "distill=self") == 0
    assert (measured / "float.safetensors").stat().st_mtime_ns == weights
    assert json.dumps(json.loads((measured / "sensitivity.json").read_text())) == times
    assert "avg_bits 4 bits of 4 bits" in " ".join(capsys.readouterr().out.split())


def test_the_yaml_trains_as_it_is_to_the_costs_that_were_predicted(search, tmp_path, capsys):
    output = tmp_path / "configs" / "quant" / "mine.yaml"
    assert search("packed=4.25kB", "size=4.2kB", "bops=60k", f"search.output={output}") == 0
    content = yaml.safe_load(output.read_text())
    chosen = [rule for name, rule in content["rules"].items() if name.startswith("searched_")]
    assert sorted(n for rule in chosen for n in rule["match"]) == ["fc1", "fc2", "linear"]
    assert len(chosen) > 1, "mixed precision"
    run = tmp_path / "run"
    words = ["train", "--config-dir", str(tmp_path / "configs"), *SEARCHLESS, "quant=mine"]
    words.remove("quant.calibration_samples=64")  # the YAML says so
    command = shlex.join(["qat", *words])
    assert f"wrote {output}: {command}" in capsys.readouterr().out
    assert f"# Train it with {command};" in output.read_text()
    assert main([*words, f"run_dir={run}"]) == 0
    report = json.loads((run / "report.json").read_text())
    bits = {layer["name"]: (layer["weight_bits"], layer["act_bits"]) for layer in report["layers"]}
    for rule in chosen:
        assert all(bits[n] == (rule["weight"]["bits"], rule["act"]["bits"]) for n in rule["match"])
    predicted = content["predicted"]
    assert report["predicted"] == predicted and report["bops"] == predicted["bops"] <= 60_000
    assert predicted["packed"] - 600 < report["packed_bytes"] <= predicted["packed"] <= 4250
    exported = report["stages"]["exported"]["bytes"]
    assert predicted["size"] - 600 < exported <= predicted["size"] + 100 and exported <= 4200
    shown = " ".join(capsys.readouterr().out.split())
    assert f"bops {report['bops'] / 1000:.3g}k (predicted {report['bops'] / 1000:.3g}k)" in shown


def test_measuring_shows_how_far_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as if the output were a terminal
    words = [text for text in TINY if not text.startswith("trainer.enable_progress_bar")]
    shown = {}
    for on in ("true", "false"):
        folder = f"search.dir={tmp_path / on}"
        assert main(["sensitivity", *words, f"trainer.enable_progress_bar={on}", folder]) == 0
        shown[on] = capsys.readouterr().out
    assert "Measuring" in shown["true"] and "100%" in shown["true"]
    assert "Measuring" not in shown["false"]


def losses_shown(text: str) -> list[float]:
    numbers = re.search(r"float ([\d.]+), predicted ([\d.]+), measured ([\d.]+)", " ".join(text.split()))
    assert numbers is not None
    return [float(number) for number in numbers.groups()]


def test_the_loss_is_predicted_from_what_was_measured_and_measured_of_the_whole_choice(measured, search, capsys):
    content = json.loads((measured / "sensitivity.json").read_text())
    found = {}
    for bits in (3, 8):
        assert (
            search(
                f"avg_bits={bits}",
            )
            == 0
        )
        found[bits] = losses_shown(capsys.readouterr().out)
        choice = json.loads((measured / "search.json").read_text())["choices"][0]["pairs"]
        harm = sum(
            content["tensors"][f"{layer}.{part}"]["bits"][str(width)]["loss_increase"]
            for layer, pair in choice.items()
            for part, width in zip(("weight", "input"), pair, strict=True)
            if width is not None
        )
        assert found[bits][:2] == pytest.approx([content["loss"], content["loss"] + harm], rel=1e-3)
    lost = {bits: abs(losses[2] - content["loss"]) for bits, losses in found.items()}
    assert lost[3] > 0 and lost[8] < lost[3] / 2


def test_a_searched_config_can_be_searched_again(search, tmp_path):
    quant = tmp_path / "configs" / "quant"
    assert search("avg_bits=8", f"search.output={quant / 'first.yaml'}") == 0
    again = f"search.dir={tmp_path / 'again'}"
    assert search("quant=first", "avg_bits=4", again, f"search.output={quant / 'second.yaml'}") == 0
    rules = yaml.safe_load((quant / "second.yaml").read_text())["rules"]
    names = [n for name, rule in rules.items() if name.startswith("searched_") for n in rule["match"]]
    assert sorted(names) == ["fc1", "fc2", "linear"], "the first search's rules are gone"


def test_the_front_is_one_call_and_a_yaml_for_each_point(measured, search, tmp_path, capsys):
    output = tmp_path / "configs" / "quant" / "front.yaml"
    assert search("search.front=packed", "search.points=4", "search.by=hessian", f"search.output={output}") == 0
    files = sorted(output.parent.glob("front_*.yaml"))
    sizes = [yaml.safe_load(path.read_text())["predicted"]["packed"] for path in files]
    choices = json.loads((measured / "search.json").read_text())["choices"]
    assert 2 <= len(files) <= 4 and sizes == sorted(sizes)
    assert [c["harm"] for c in choices] == sorted((c["harm"] for c in choices), reverse=True)
    assert (measured / "front.png").read_bytes().startswith(b"\x89PNG")


def test_latency_is_measured_on_the_runtime_once(measured, search):
    pairs = "search.pairs=[[4,8],[8,8]]"
    assert search("latency=1s", pairs) == 0
    known = json.loads((measured / "latency.json").read_text())
    assert set(known) == {"4x8", "8x8"}
    for entry in known.values():
        assert set(entry["layers"]) == {"fc1", "fc2", "linear"} and min(entry["layers"].values()) > 0
    before = (measured / "latency.json").read_bytes()
    assert search("latency=1s", pairs) == 0
    assert (measured / "latency.json").read_bytes() == before
    assert search("latency=1s", pairs, "search.repeats=6") == 0
    again = json.loads((measured / "latency.json").read_text())
    assert all(entry["repeats"] == 6 and entry["layers"] != known[pair]["layers"] for pair, entry in again.items())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        pytest.param(["packed=1kB"], "packed=1 kB cannot be met: the smallest feasible is 3", id="infeasible"),
        pytest.param([], "say what bits may cost: qat search packed=60kB", id="no-budget"),
        pytest.param(["packt=1kB"], "'packt' is neither a cost nor a config key; did you mean 'packed'", id="cost"),
        pytest.param(["search.bugdet.packed=1"], "unknown config key 'search.bugdet.packed'", id="key"),
        pytest.param(["packed=lots"], "packed=lots: must be a number", id="limit"),
        pytest.param(["packed=-5kB"], "packed=-5kB: must be above zero", id="below-zero"),
        pytest.param(["avg_bits=4", "quant=off", "search.dir=nowhere"], "quant=off leaves everything float", id="off"),
        pytest.param(["avg_bits=4", "search.output=x.yaml"], "must be a .yaml in a folder named quant", id="where"),
        pytest.param(
            ["avg_bits=4", "search.output=/proc/quant/x.yaml"], "search.output=/proc/quant: there is", id="proc"
        ),
        pytest.param(["avg_bits=4", "search.dir=/proc/x"], "error: /proc/x: there is no such folder", id="dir-in-proc"),
        pytest.param(["avg_bits=4", "quant.weight.bits=3"], "holds what was measured of another model", id="folder"),
        pytest.param(["avg_bits=4", "search.by=los"], "search.by='los'", id="by"),
    ],
)
def test_a_mistake_is_one_line(search, capsys, words, said):
    assert search(*words) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("qat: error: ") and said in error


def test_a_file_is_never_written_over(search, tmp_path, capsys):
    output = tmp_path / "configs" / "quant" / "mine.yaml"
    output.write_text("weight: {bits: 3}\n")
    assert search("avg_bits=4", f"search.output={output}") == 2
    assert "mine.yaml exists; choose another name" in capsys.readouterr().err
    assert output.read_text() == "weight: {bits: 3}\n"


def test_a_mistake_leaves_no_folder(tmp_path, capsys):
    folder = tmp_path / "new"
    assert main(["search", *TINY, f"search.dir={folder}", "avg_bits=4", "search.tie=[blocks]"]) == 2
    assert "search.tie: no layer matches 'blocks'" in capsys.readouterr().err and not folder.exists()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        pytest.param("automatic_optimization", False, "it optimizes by hand instead", id="by-hand"),
        pytest.param("training_step", lambda self, batch: None, "it returned NoneType", id="no-loss"),
    ],
)
def test_a_step_without_a_loss_is_found_before_anything_is_trained(name, value, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(f"qat.models.MLP.{name}", value)
    monkeypatch.setattr("qat.lightning.runs.search.float_stage", lambda this: pytest.fail("trained"))
    assert main(["sensitivity", *TINY, f"search.dir={tmp_path / 'new'}"]) == 2
    error = capsys.readouterr().err
    assert "MLP: its training_step must return the loss" in error and said in error
    assert not (tmp_path / "new").exists()


def test_sensitivity_takes_no_budget_and_training_no_search(tmp_path, capsys):
    assert main(["sensitivity", *TINY, "packed=4kB"]) == 2
    assert "budgets are for `qat search`" in capsys.readouterr().err
    assert main(["train", *SEARCHLESS, "search=default", f"run_dir={tmp_path / 'run'}"]) == 2
    assert "this config has a search" in capsys.readouterr().err


def test_help_lists_costs_and_settings(capsys):
    assert main(["search", "--help"]) == 0
    text = capsys.readouterr().out
    assert "avg_bits  bits of a weight" in text and "weight_bits: [2, 3, 4, 5, 6, 8]" in text
