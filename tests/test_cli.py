"""The command line: a mistake is one line with the nearest right thing, costs no torch import, and leaves no file."""

import logging
import os
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
from omegaconf import DictConfig
from pytorch_lightning.utilities.exceptions import SIGTERMException

import qat
from qat.cli import main
from qat.config.overrides import key_of, value_of, written
from qat.errors import UserError
from qat.search.emit import trained_by
from qat.sweep.point import _command


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def runs(monkeypatch):
    """Replaces the training by a list of what it would have been called with."""
    calls: list[tuple[DictConfig, Path]] = []
    _replace_run(monkeypatch, lambda cfg, run_dir: calls.append((cfg, run_dir)))
    return calls


@pytest.fixture
def points(monkeypatch):
    """Replaces the running of a sweep's points by a list of them."""
    from qat.sweep import GridSweep
    from qat.sweep.grid import grid_points

    ran = []
    monkeypatch.setattr(GridSweep, "run", lambda self, task: ran.extend(grid_points(task)))
    return ran


def _replace_run(monkeypatch, run) -> None:
    fake = types.ModuleType("qat.lightning.runs.run")
    fake.run = run  # pyright: ignore
    monkeypatch.setitem(sys.modules, "qat.lightning.runs.run", fake)


def _error(capfd, *argv: str) -> str:
    """Runs a command that must fail as a mistake of the user, and returns its only line on stderr."""
    assert main(list(argv)) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("qat: error: ")
    return lines[0].removeprefix("qat: error: ")


def test_train_calls_run_with_the_resolved_config_and_hydras_output_directory(runs):
    assert main(["train", "model=mlp", "seed=3", "run_dir=here"]) == 0
    [(cfg, run_dir)] = runs
    assert run_dir == Path("here").absolute() and (run_dir / ".hydra" / "config.yaml").exists()
    assert cfg.seed == 3 and cfg.run_dir == cfg.trainer.default_root_dir == cfg.logger.save_dir == str(run_dir)
    assert "mlp" in cfg.model._target_.lower()


def test_a_folder_that_takes_no_log_file_is_one_line(runs, capfd):
    Path("run/train.log").mkdir(parents=True)
    assert _error(capfd, "train", "run_dir=run") == f"{Path('run/train.log').absolute()}: Is a directory"
    assert not runs


def test_runs_and_sweeps_go_below_logs_and_the_name(runs, points):
    assert main(["train", "name=mine"]) == 0
    assert main(["train", "-m", "name=mine", "seed=1,2"]) == 0
    [(_, single)] = runs
    first, second = points
    assert single.parent == Path("logs/mine/runs").absolute()
    assert (first.folder.name, second.folder.name) == ("0", "1")
    assert first.folder.parent == second.folder.parent
    assert first.folder.parents[2] == Path("logs/mine/sweeps").absolute()


def test_a_sweep_runs_in_a_folder_of_any_name(points, in_an_empty_folder):
    folder = in_an_empty_folder / "joe's" / 'a "b\\'
    assert main(["train", "-m", "seed=1,2", written("sweep.dir", str(folder)), "logger=wandb"]) == 0
    values = {key_of(text): value_of(text) for text in _command(points[0])[3:]}
    assert values["run_dir"] == str(folder / "points" / "0") and values["cache_dir"] == str(folder / "cache")
    assert values["logger.group"] == folder.name


def test_options_may_stand_among_overrides(points):
    assert main(["train", "seed=1", "-m", "float_epochs=1,2"]) == 0
    assert [point.params for point in points] == [{"float_epochs": "1"}, {"float_epochs": "2"}]
    assert all("seed=1" in point.command for point in points)


def test_the_task_sees_the_original_arguments_with_which_lightning_starts_other_ranks(monkeypatch):
    seen = []
    _replace_run(monkeypatch, lambda cfg, run_dir: seen.append(list(sys.argv)))
    monkeypatch.setattr(sys, "argv", ["/bin/qat", "train", "seed=1"])
    assert main() == 0
    assert seen == [["/bin/qat", "train", "seed=1"]] and sys.argv == ["/bin/qat", "train", "seed=1"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        pytest.param(["trian"], "unknown command 'trian'; did you mean 'train'?", id="command"),
        pytest.param(["train", "--multrun"], "unknown option '--multrun'; did you mean '--multirun'", id="option"),
        pytest.param(["train", "sed=1"], "unknown config key 'sed'; did you mean 'seed'?", id="key"),
        pytest.param(["train", "modle=mlp"], "unknown config key 'modle'; did you mean 'mode' or 'model'?", id="group"),
        pytest.param(
            ["train", "model=mpl"], "model=mpl: there is no such option; did you mean 'mlp'?", id="group-option"
        ),
        pytest.param(
            ["train", "callbacks.distill.alpha=0.5"],
            "callbacks.distill.alpha: no callback 'distill' is on: distill=self",
            id="callback-that-is-off",
        ),
        pytest.param(["train", "start.equalize.rounds=3"], "no start 'equalize' is on: start=equalize", id="no-start"),
        pytest.param(["train", "max_epochs=3"], "did you mean 'trainer.max_epochs'?", id="key-without-its-parent"),
        pytest.param(["train", "quant.target=ort"], "'quant.target'; did you mean 'quant.engine'?", id="key-of-before"),
        pytest.param(["train", "trainer.max_epoch=3"], "did you mean 'trainer.max_epochs'", id="nested-key"),
        pytest.param(["train", "trainer.zzz=3"], "'trainer.zzz'; choose from accelerator, ", id="nothing-near"),
        pytest.param(["train", "hydra.run.dri=x"], "did you mean 'hydra.run.dir'", id="hydra-key"),
        pytest.param(
            ["train", "callbacks=learn_bits", "callbacks.learn_bits.least={fc: 8}"],
            "config key 'callbacks.learn_bits.least': from here, a mapping changes values that are there and adds "
            "none; to replace it as a whole, write '~callbacks.learn_bits.least' '+callbacks.learn_bits.least={...}'",
            id="mapping-with-new-names",
        ),
        pytest.param(
            ["train", "callbacks=anneal", "callbacks.anneal.schedule={0: 8, 3: 4}"],
            "config key 'callbacks.anneal.schedule' is a list, which no mapping can replace: "
            "write callbacks.anneal.schedule=[...]",
            id="mapping-for-a-list",
        ),
        pytest.param(["train", "~sed"], "unknown config key 'sed'; did you mean 'seed'?", id="deletion"),
        pytest.param(["train", "+sed=1"], "config key 'sed' is read by nothing; did you mean 'seed'?", id="added-key"),
        pytest.param(["train", "seed=[1"], "cannot read the override 'seed=[1'", id="syntax"),
        pytest.param(
            ["train", "name=größe ü"],
            """'name=größe ü': its value needs quotes within those of the shell: 'name="größe ü"'""",
            id="letters",
        ),
        pytest.param(["train", "name=a=b"], """shell: 'name="a=b"'""", id="a-second-equals-sign"),
        pytest.param(["train", "name=a,b"], """write name=[a,b] (a list) or 'name="a,b"' (a text)""", id="a-comma"),
        pytest.param(["train", "seed=1,2"], "add -m to run each of them", id="sweep-without-m"),
        pytest.param(
            ["train", "seed=${nothing}"], "config key 'seed': Interpolation key 'nothing'", id="interpolation"
        ),
        pytest.param(
            ["train", "name=${nothing}"], "Interpolation key 'nothing' not found", id="interpolation-in-run-dir"
        ),
        pytest.param(["train", "seed=???"], "config key 'seed' needs a value: seed=...", id="missing-value"),
        pytest.param(["train", "-m", "seed=1,2", "modle=mlp"], "did you mean 'mode' or 'model'?", id="key-in-a-sweep"),
        pytest.param(
            ["train", "-m", "model=mlp,mpl"], "model=mpl: there is no such option", id="one-option-of-a-sweep"
        ),
        pytest.param(["train", "-m", "run_dir=a", "seed=1,2"], "sweep.dir", id="one-run-dir-for-a-sweep"),
        pytest.param(["train", "--cfg", "job", "sed=1"], "did you mean 'seed'?", id="printing-the-config"),
        pytest.param(["train", "-m", "--cfg", "job", "seed=0,1"], "-m runs, and --cfg shows", id="showing-a-sweep"),
        pytest.param(
            ["train", "hydra.mode=MULTIRUN", "seed=0,1", "--info", "defaults"], "--info shows", id="info-of-a-sweep"
        ),
        pytest.param(["train", "--help", "sed=1"], "did you mean 'seed'?", id="help-with-a-wrong-key"),
        pytest.param(["train", "--config-dir", "nowhere"], "nowhere", id="config-dir"),
        pytest.param(["verify", "nowhere"], "nowhere is not a directory", id="verify"),
        pytest.param(["export"], "write qat export RUN_DIR target=NAME [out=FILE|FOLDER]", id="export-of-nothing"),
        pytest.param(["inspect", "a", "b"], "write qat inspect [--json] CKPT", id="inspect-of-two"),
        pytest.param(["inspect", "a", "--jsn"], "unknown option '--jsn'; did you mean '--json'", id="inspects-option"),
        pytest.param(["report"], "write qat report SWEEP_DIR", id="report-of-nothing"),
        pytest.param(["bench"], "write qat bench FILE...", id="bench-of-nothing"),
        pytest.param(["bench", "a.onnx", "seconds=1,2"], "seconds=1,2: must be one number", id="two-durations"),
        pytest.param(["bench", "a.onnx", "seconds=ab"], "seconds=ab: must be one number, seconds=2", id="duration"),
        pytest.param(["bench", "a.onnx", "seconds=0"], "seconds=0: must be above 0", id="no-duration"),
        pytest.param(["bench", "a.onnx", "seconds=nan"], "seconds=nan: must be above 0", id="nan-seconds"),
        pytest.param(["train", "~quant.scale_lr"], "is null already, and stays", id="deletion-of-null"),
        pytest.param(["train", "run_dir=/dev/null/x"], "/dev/null/x: Not a directory", id="run-dir-below-a-file"),
        pytest.param(["train", f"run_dir={'n' * 300}"], "nnn: File name too long", id="long-run-dir"),
        pytest.param(["train", "run_dir=/proc/x"], "run_dir=/proc/x: there is no such folder, and none", id="proc"),
        pytest.param(
            ["train", "-m", "seed=1,2", "sweep.dir=/proc/x"], "sweep.dir=/proc/x: there is no such", id="sweep-in-proc"
        ),
        pytest.param(["train", "run_dir=null"], "run_dir=null: a run writes into a folder", id="no-run-dir"),
        pytest.param(["train", "model=größe"], "cannot read the override 'model=größe'", id="letters-of-a-group"),
        pytest.param(["train", "++run_dir=''"], "++run_dir='': a run writes into a folder", id="empty-run-dir"),
        pytest.param(["train", "model=null"], "'model' is left out, and there is no run without it", id="no-model"),
        pytest.param(["train", "~data"], "'data' is left out, and there is no run without it", id="no-data"),
        pytest.param(["train", "quant=null"], "(quant=off leaves everything float)", id="no-quant"),
        pytest.param(["train", "~hydra"], "~hydra: without it, run_dir would be read by nothing", id="no-hydra"),
        pytest.param(["train", "-m", "model=null,cnn"], "'model' is left out", id="a-point-without-a-model"),
        pytest.param(["search", "trainer=null", "avg_bits=4"], "'trainer' is left out", id="a-search-of-nothing"),
        pytest.param(["search", "search=null", "avg_bits=4"], "no `qat search` without it", id="a-search-without-one"),
        pytest.param(["sensitivity", "search=null"], "no `qat sensitivity` without it", id="sensitivity-without-one"),
        pytest.param(["train", "-m", "sweep=null", "seed=1"], "nothing varies", id="a-sweep-of-nothing"),
        pytest.param(
            ["train", "logger=false"], "logger=false: there is no such option; choose from csv, none", id="no-name"
        ),
        pytest.param(["train", "-m", "logger=false,csv"], "logger=False: there is no such option", id="no-name-of-two"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing_written(argv, said, runs, capfd, in_an_empty_folder):
    assert said in _error(capfd, *argv)
    assert not runs
    assert list(in_an_empty_folder.iterdir()) == []


OPTIONAL = ["start", "callbacks", "distill", "logger", "export", "sweep", "search", "experiment", "debug"]


@pytest.mark.parametrize("group", OPTIONAL)
@pytest.mark.parametrize("text", ["{}=null", "~{}"])
def test_a_group_is_left_out_by_null_as_by_a_tilde(text, group, runs):
    assert main(["train", text.format(group)]) == 0
    [(cfg, _)] = runs
    assert cfg[group] is None


def test_null_also_leaves_out_what_an_experiment_chose(runs, in_an_empty_folder):
    (in_an_empty_folder / "own" / "experiment").mkdir(parents=True)
    text = "# @package _global_\ndefaults:\n  - override /start: [equalize, adaround]\n  - override /sweep: bits_grid\n"
    (in_an_empty_folder / "own" / "experiment" / "mine.yaml").write_text(text)
    assert main(["train", "--config-dir", "own", "experiment=mine", "start=null", "sweep=null"]) == 0
    assert runs[0][0].start is None and runs[0][0].sweep is None


def test_a_point_may_leave_a_group_out(points):
    assert main(["train", "-m", "start=null,equalize", "export=null", "sweep=null"]) == 0
    assert all("export=[]" in point.command for point in points)
    assert [point.params for point in points] == [{"start": "null"}, {"start": "equalize"}]


def test_a_users_own_config_folder_is_searched_for_suggestions(runs, capfd, in_an_empty_folder):
    (in_an_empty_folder / "own" / "experiment").mkdir(parents=True)
    (in_an_empty_folder / "own" / "experiment" / "theirs.yaml").write_text("# @package _global_\nname: theirs\n")
    assert "did you mean 'theirs'?" in _error(capfd, "train", "--config-dir", "own", "experiment=thiers")
    assert main(["train", "--config-dir", "own", "experiment=theirs"]) == 0
    assert runs[0][0].name == "theirs"


@pytest.mark.parametrize("folder", ["own", "it's another"])
def test_the_command_that_trains_what_a_search_wrote_finds_all_configs(folder, runs, in_an_empty_folder):
    quant = "defaults:\n  - w8a8\nweight: {bits: 3}\n"
    for path, text in (("own/model/theirs", "_target_: qat.models.MLP\n"), (f"{folder}/quant/mine", quant)):
        (in_an_empty_folder / path).parent.mkdir(parents=True)
        (in_an_empty_folder / f"{path}.yaml").write_text(text)
    command = trained_by(Path(folder, "quant", "mine.yaml"), ["model=theirs", "data.mean=[0.5]"], "own")
    assert main([*shlex.split(command)[1:], "run_dir=run"]) == 0
    assert main(["train", "ckpt=last", "run_dir=run"]) == 0
    for cfg, _ in runs:
        assert (cfg.model, cfg.quant.weight.bits, cfg.data.mean) == ({"_target_": "qat.models.MLP"}, 3, [0.5])


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        pytest.param(
            ["data.flip=true"], "Digits takes it and the YAML does not set it: +data.flip=true", id="left-out"
        ),
        pytest.param(["data.flpi=true"], "did you mean '+data.flip'?", id="misspelled"),
        pytest.param(["data.batch=1"], "did you mean 'data.batch_size'?", id="near-a-key-that-is-there"),
        pytest.param(
            ["data.flip=true", "data.num_workers=1", "sed=1", "modle=cnn"],
            "Digits takes it and the YAML does not set it: +data.flip=true",
            id="further-mistakes",
        ),
    ],
)
def test_a_setting_that_a_yaml_leaves_out_is_known_by_its_class(overrides, said, runs, capfd, in_an_empty_folder):
    (in_an_empty_folder / "own" / "data").mkdir(parents=True)
    (in_an_empty_folder / "own" / "data" / "theirs.yaml").write_text("_target_: qat.data.Digits\nbatch_size: 8\n")
    error = _error(capfd, "train", "--config-dir", "own", "data=theirs", *overrides)
    assert error == f"unknown config key '{overrides[0].partition('=')[0]}'; {said}"


def _refuse(cfg, run_dir) -> None:
    raise UserError("quant.rules.stem matches no layer")


def test_a_user_error_in_the_task_is_one_line_and_removes_the_run_directory(monkeypatch, capfd, in_an_empty_folder):
    _replace_run(monkeypatch, _refuse)
    assert _error(capfd, "train", "run_dir=a/b/c") == "quant.rules.stem matches no layer"
    assert list(in_an_empty_folder.iterdir()) == []


@pytest.mark.parametrize("before", [pytest.param([], id="empty"), pytest.param(["last.ckpt"], id="with-a-checkpoint")])
def test_a_directory_that_was_there_before_stays(before, monkeypatch, capfd, in_an_empty_folder):
    mine = in_an_empty_folder / "mine"
    mine.mkdir()
    for name in before:
        (mine / name).write_text("x")
    _replace_run(monkeypatch, _refuse)
    _error(capfd, "train", "run_dir=mine")
    assert mine.is_dir() and all((mine / name).exists() for name in before)


def test_a_user_error_after_something_was_written_keeps_it(monkeypatch, capfd):
    def write_then_refuse(cfg, run_dir):
        (run_dir / "float.ckpt").write_text("x")
        raise UserError("too late")

    _replace_run(monkeypatch, write_then_refuse)
    _error(capfd, "train", "run_dir=mine")
    assert Path("mine/float.ckpt").exists()


def test_a_bug_keeps_its_traceback(monkeypatch):
    def fail(cfg, run_dir):
        raise ZeroDivisionError("a bug")

    _replace_run(monkeypatch, fail)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        main(["train"])


def _interrupt(cfg, run_dir) -> None:
    raise KeyboardInterrupt


def _interrupt_as_lightning_does(cfg, run_dir) -> None:
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        sys.exit(1)


def _terminate_as_lightning_does(cfg, run_dir) -> None:
    raise SIGTERMException


SIGNALS = [(_interrupt, 130), (_interrupt_as_lightning_does, 130), (_terminate_as_lightning_does, 143)]


@pytest.mark.parametrize(("stop", "status"), SIGNALS)
def test_what_a_signal_ends_has_the_status_that_shells_give_it(stop, status, monkeypatch):
    _replace_run(monkeypatch, stop)
    assert main(["train"]) == status


@pytest.mark.parametrize(("stop", "status"), SIGNALS)
def test_an_interrupted_run_says_how_to_go_on_with_it(stop, status, monkeypatch, capfd):
    def begin(cfg, run_dir):
        (run_dir / "progress.json").write_text("{}")
        stop(cfg, run_dir)

    _replace_run(monkeypatch, begin)
    assert main(["train", "run_dir=here"]) == status
    assert f"qat train ckpt=last run_dir={Path('here').absolute()}" in capfd.readouterr().err


@pytest.mark.parametrize("folder", ["here", "joe's, a=b größe", 'a "b\\'])
def test_the_printed_command_goes_on_with_what_the_run_was_given(folder, runs, monkeypatch, capfd, in_an_empty_folder):
    (in_an_empty_folder / "own" / "experiment").mkdir(parents=True)
    (in_an_empty_folder / "own" / "experiment" / "theirs.yaml").write_text("# @package _global_\nname: theirs\n")

    def begin(cfg, run_dir):
        (run_dir / "progress.json").write_text("{}")
        raise KeyboardInterrupt

    _replace_run(monkeypatch, begin)
    given = ["--config-dir", "own", "experiment=theirs", "seed=3", "float_epochs=2"]
    assert main(["train", *given, written("run_dir", folder)]) == 130
    qat, *argv = shlex.split(capfd.readouterr().err.partition("it goes on with: ")[2].splitlines()[0])
    _replace_run(monkeypatch, lambda cfg, run_dir: runs.append((cfg, run_dir)))
    monkeypatch.chdir("/")
    assert qat == "qat" and main([*argv, "seed=4"]) == 0
    [(cfg, run_dir)] = runs
    assert run_dir == in_an_empty_folder / folder
    assert (cfg.name, cfg.seed, cfg.float_epochs, cfg.ckpt) == ("theirs", 4, 2, "last")


def test_a_run_whose_overrides_call_the_engine_target_as_older_ones_do_is_resumed(runs):
    assert main(["train", "run_dir=here", "quant.engine=ort"]) == 0
    written_then = Path("here/.hydra/overrides.yaml")
    written_then.write_text(written_then.read_text().replace("quant.engine=", "++quant.target="))
    assert main(["train", "ckpt=last", "run_dir=here"]) == 0
    assert [cfg.quant.engine for cfg, _ in runs] == ["ort", "ort"]


def test_a_mistake_leaves_the_config_of_a_run_that_is_there_as_it_was(runs, monkeypatch, capfd):
    assert main(["train", "run_dir=here", "seed=3"]) == 0
    before = {path: path.read_bytes() for path in Path("here/.hydra").iterdir()}
    _replace_run(monkeypatch, _refuse)
    _error(capfd, "train", "run_dir=here", "seed=4")
    assert before and {path: path.read_bytes() for path in Path("here/.hydra").iterdir()} == before


def test_a_config_with_a_sweep_is_not_run_as_one_run(tmp_path, capfd):
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\ndefaults:\n  - override /sweep: bits_grid\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    said = _error(capfd, "train", "--config-dir", str(tmp_path), "experiment=mine")
    assert "add -m to run the sweep" in said and not (tmp_path / "logs").exists()


def test_m_runs_the_sweep_that_a_config_has(tmp_path, points):
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\ndefaults:\n  - override /sweep: bits_grid\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    assert main(["train", "-m", "--config-dir", str(tmp_path), "experiment=mine"]) == 0
    assert len(points) == 8 and points[0].command[:2] == ("--config-dir", str(tmp_path))


def test_lightnings_advertisements_are_not_printed(monkeypatch, capfd):
    def talk(cfg, run_dir):
        log = logging.getLogger("lightning_utilities.core.rank_zero")
        log.info("💡 Tip: For seamless cloud logging, install something")
        log.info("Restoring states")

    _replace_run(monkeypatch, talk)
    assert main(["train", "run_dir=here"]) == 0
    for text in (capfd.readouterr().out, Path("here/train.log").read_text()):
        assert "Restoring states" in text and "Tip" not in text


@pytest.mark.parametrize(
    ("argv", "status"),
    [
        pytest.param(["--help"], 0, id="help"),
        pytest.param(["train", "--help"], 0, id="train-help"),
        pytest.param(["train", "--cfg", "job"], 0, id="cfg"),
        pytest.param(["train", "--cfg", "job", "--resolve"], 0, id="cfg-resolved"),
        pytest.param(["trian"], 2, id="wrong-command"),
        pytest.param(["train", "--multrun"], 2, id="wrong-option"),
        pytest.param(["train", "sed=1"], 2, id="wrong-key"),
        pytest.param(["train", "-m", "model=mlp,mpl"], 2, id="wrong-option-in-a-sweep"),
        pytest.param(["verify", "nowhere"], 2, id="verify-nothing"),
    ],
)
def test_what_needs_no_training_imports_no_torch(argv, status):
    code = (
        "import sys\nfrom qat.cli import main\n"
        "try:\n    status = main(sys.argv[1:])\nexcept SystemExit as stop:\n    status = stop.code or 0\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\nsys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert "torch was imported" not in done.stderr


def test_help_without_a_command_names_the_commands(capfd):
    assert main([]) == 2
    assert "train" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("command", "said"), [("bench", "files and settings"), ("report", "a folder of `qat train -m`, or one of runs")]
)
def test_help_says_what_a_command_takes(command, said, capfd):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert said in " ".join(capfd.readouterr().out.split())


COMPLETE = """qat() { "$PYTHON" -c 'import sys; from qat.cli import main; sys.exit(main())' "$@"; }
eval "$(qat train --shell-completion install=bash)"
COMP_LINE="$1"; COMP_POINT=${#1}; COMP_WORDBREAKS="$2"; _qat; echo "${COMPREPLY[*]}" """


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash on this machine")
@pytest.mark.parametrize(
    ("line", "breaks", "choices"),
    [
        pytest.param("qat se", "=", "sensitivity search", id="command"),
        pytest.param("qat train quant=w8", " ", "quant=w8a8", id="option"),
        pytest.param("qat search packed=60kB quant=w8", "=", "w8a8", id="option-behind-the-equals-sign"),
        pytest.param("qat train -m seed=0,1 trainer.max_ep", "=", "trainer.max_epochs=", id="key"),
        pytest.param("qat report lo", "=", "", id="file"),
    ],
)
def test_bash_completes_commands_options_and_keys(line, breaks, choices):
    environment = {**os.environ, "PYTHON": sys.executable}
    argv = ["bash", "-c", COMPLETE, "bash", line, breaks]
    done = subprocess.run(argv, capture_output=True, text=True, env=environment)
    assert done.stdout.split() == choices.split() and not done.stderr


def test_completion_of_another_shell_is_refused_in_one_line(capfd):
    assert "there is one for bash" in _error(capfd, "train", "--shell-completion", "install=zsh")


def test_version_is_the_packages(capfd):
    assert main(["--version"]) == 0
    assert capfd.readouterr().out == f"qat {qat.__version__}\n"


def test_public_names_load_on_first_use_and_unknown_ones_do_not_exist():
    assert qat.UserError is UserError
    assert set(qat.__all__) <= set(dir(qat))
    with pytest.raises(AttributeError, match="nothing"):
        _ = qat.nothing
