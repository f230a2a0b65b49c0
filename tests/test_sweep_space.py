"""Sweeps without training: what varies, what is optimized, what is refused, and what becomes of points."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from rich.console import Console
from sweeps import write_point, write_sweep

import qat.sweep.point as points
from qat.cli import main
from qat.cli.sweep import _values
from qat.config.configs import composed, configs_dir, finalize_config
from qat.config.instantiate import instantiate
from qat.errors import UserError
from qat.sweep import Dominated, GridSweep, Local, OptunaSweep, Slurm
from qat.sweep.objectives import check, dominates, undominated
from qat.sweep.point import Outcome, Point, finished, past, run_point, write_record
from qat.sweep.results import by_epoch, curves, read_sweep
from qat.sweep.space import Interval, from_yaml, grid
from qat.sweep.task import Task

ROOT = Path(__file__).parents[1]


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=200)


@pytest.fixture
def task(tmp_path, console):
    space = {"seed": ["0", "1"], "quant": ["w4a4", "w8a8"]}
    return Task(("model=mlp",), space, {"metric": "max"}, "test/acc", "max", 0, tmp_path / "sweep", console)


def _refused(capfd, *argv: str) -> str:
    assert main(["train", *argv]) == 2
    [line] = capfd.readouterr().err.splitlines()
    return line.removeprefix("qat: error: ")


# -- what varies -----------------------------------------------------------------------------------------------------


def test_a_grid_is_every_combination_with_the_last_key_fastest():
    space = from_yaml({"a": [1, 2, 2], "b": [True, None, "{bits: 4}"]})
    assert [tuple(p.values()) for p in grid(space)] == [
        (a, b) for a in ("1", "2") for b in ("true", "null", "{bits: 4}")
    ]


def test_an_interval_keeps_its_numbers():
    assert from_yaml({"lr": {"low": 0.01, "high": 1, "log": True}}) == {"lr": Interval(0.01, 1, True)}


@pytest.mark.parametrize(
    ("params", "said"),
    [
        pytest.param({"a": 3}, "sweep.params.a=3: must be a list of choices", id="no-list"),
        pytest.param({"a": []}, "must be a list of choices", id="empty"),
        pytest.param({"a": [{"bits": 4}]}, "write nested choices as text", id="nested"),
        pytest.param({"a": {"lo": 1, "high": 2}}, "sweep.params.a.lo: .* did you mean 'low'", id="typo"),
        pytest.param({"a": {"low": 2, "high": 1}}, "needs numbers low < high", id="upside-down"),
        pytest.param({"a": {"low": 0, "high": 1, "log": True}}, "above 0 with log", id="log-of-zero"),
    ],
)
def test_a_space_that_makes_no_sense_is_refused(params, said):
    with pytest.raises(UserError, match=said):
        from_yaml(params)


@pytest.mark.parametrize(
    ("text", "interval"),
    [
        ("interval(2,8)", Interval(2, 8)),
        ("tag(log, interval(start=1, end=100))", Interval(1, 100, True)),
        ("interval(2.0,8)", Interval(2.0, 8.0)),
        ("float(interval(2,8))", Interval(2.0, 8.0)),
        ("interval(0.01,1)", Interval(0.01, 1.0)),
    ],
)
def test_an_interval_of_the_command_line_is_one_of_whole_numbers_if_its_ends_are(text, interval):
    found = _values(OverridesParser.create().parse_override(f"a={text}"))
    assert found == interval and type(found.low) is type(found.high) is type(interval.low)


def test_a_grid_has_no_intervals():
    with pytest.raises(UserError, match=r"lr: a grid needs choices"):
        list(grid({"lr": Interval(0, 1)}))


# -- objectives ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objectives", "said"),
    [
        pytest.param({"metrc": "max"}, "did you mean 'metric'.*metric, size, packed, bops, latency", id="unknown"),
        pytest.param({"size": None}, "sweep.objectives.size=None: needs a direction", id="no-direction"),
        pytest.param({"metric": "min"}, "contradicts mode=max", id="against-mode"),
        pytest.param({}, "say what to optimize", id="none"),
    ],
)
def test_objectives_must_exist_and_say_their_direction(objectives, said):
    with pytest.raises(UserError, match=said):
        check(objectives, "test/acc", "max")


def test_the_front_holds_what_nobody_beats_ties_included():
    values = [(0.9, 10), (0.9, 10), (0.8, 5), (0.8, 6), (0.95, 20)]
    assert undominated(values, ["max", "min"]) == [0, 1, 2, 4]
    assert dominates((0.9, 5), (0.9, 6), ["max", "min"]) and not dominates((0.9, 5), (0.9, 5), ["max", "min"])


# -- mistakes on the command line ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        pytest.param(["-m", "sed=1,2"], "unknown config key 'sed'; did you mean 'seed'?", id="key"),
        pytest.param(
            ["-m", "model=mlp,mpl"], "model=mpl: there is no such option; did you mean 'mlp'?", id="last-value"
        ),
        pytest.param(["-m", "seed=0"], "nothing varies", id="nothing-varies"),
        pytest.param(["-m", "seed=0,1", "run_dir=x"], "a sweep has sweep.dir", id="run-dir"),
        pytest.param(["-m", "seed=0,1", "hydra/launcher=joblib"], "sweep/launcher=", id="hydra-launcher"),
        pytest.param(
            ["-m", "seed=0,1", "sweep.objectives.sise=min"],
            "unknown config key 'sweep.objectives.sise'",
            id="objective-override",
        ),
        pytest.param(["-m", "seed=0,1", "+sweep.objectives.sise=min"], "did you mean 'size'", id="objective"),
        pytest.param(
            ["-m", "seed=0,1", "sweep.objectives.metrik=min"],
            "did you mean 'sweep.objectives.metric'",
            id="default-objective",
        ),
        pytest.param(["-m", "seed=0,1", "sweep.objectives={sise: min}"], "did you mean 'size'", id="objectives"),
        pytest.param(
            ["-m", "seed=0,1", "export=none", "+sweep.objectives.size=min"], "no file to measure", id="no-file"
        ),
        pytest.param(["sweep=bits_gird"], "did you mean 'bits_grid'", id="sweep"),
        pytest.param(["-m", "seed=0,1", "sweep.launcher.n_jobs=0"], "n_jobs=0: must be at least 1", id="no-jobs"),
        pytest.param(
            ["-m", "quant.weight.bits=4,0"], "quant.weight: bits=0: format=int has", id="bits-of-the-last-point"
        ),
        pytest.param(["-m", "model.lr=interval(0.1,0.2)"], "a grid needs choices", id="interval"),
        pytest.param(["-m", "quant.weight.bits=interval(2.5,8)"], "a grid needs choices", id="interval-of-bits"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(argv, said, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said in _refused(capfd, *argv)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", sorted(p.stem for p in (configs_dir() / "sweep").glob("*.yaml")))
@pytest.mark.parametrize("launcher", sorted(p.stem for p in (configs_dir() / "sweep" / "launcher").glob("*.yaml")))
def test_every_sweep_is_built_with_every_launcher(option, launcher, tmp_path):
    chosen = [] if option.startswith("ray") else [f"sweep/launcher={launcher}"]
    cfg = composed([f"sweep={option}", *chosen])
    finalize_config(cfg, tmp_path)
    sweep = instantiate(cfg.sweep)
    assert check(cfg.sweep.objectives, cfg.metric, cfg.mode) == dict(cfg.sweep.objectives)
    if chosen:
        assert isinstance(sweep.launcher, {"local": Local, "slurm": Slurm}[launcher])


def test_the_wandb_sweep_varies_keys_that_exist_and_turns_into_our_command():
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    spec = yaml.safe_load((ROOT / "configs" / "wandb_sweep.yaml").read_text())
    values = {key: {"value": p.get("values", [p.get("min")])[0]} for key, p in spec["parameters"].items()}
    args = utils.create_sweep_command_args({"args": values})["args_no_hyphens"]
    assert args and spec["command"][-1] == "${args_no_hyphens}"
    fixed = [text for text in spec["command"] if "=" in text]
    cfg = composed([*fixed, *args])
    assert "WandbLogger" in cfg.logger._target_ and spec["metric"]["goal"] in ("maximize", "minimize")


# -- folders ---------------------------------------------------------------------------------------------------------


def test_another_sweep_in_the_same_folder_is_refused_and_the_same_one_resumes(task):
    with task.claimed("grid"):
        pass
    with (
        task.claimed("grid"),
        pytest.raises(UserError, match="a sweep is running in this folder"),
        task.claimed("grid"),
    ):
        pass
    other = Task(("model=cnn",), task.space, {"metric": "min"}, "test/acc", "min", 0, task.folder, task.console)
    with pytest.raises(UserError, match=r"holds another sweep \(command, objectives differ\)"), other.claimed("grid"):
        pass


def test_the_same_command_has_the_same_folder_and_another_has_another(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(GridSweep, "run", lambda self, task: task.console.print(f"at {task.folder}", soft_wrap=True))
    at = []
    for argv in (["-m", "seed=0,1"], ["-m", "seed=0,1", "sweep.launcher.n_jobs=2"], ["-m", "seed=0,2"]):
        assert main(["train", *argv]) == 0
        at.append(next(line for line in capfd.readouterr().out.splitlines() if line.startswith("at ")))
    assert at[0] == at[1] != at[2]


@pytest.mark.parametrize("sweep", ["-m", "sweep=bits_grid"])
def test_objectives_on_the_command_line_take_the_place_of_the_sweeps(sweep, tmp_path, monkeypatch):
    tasks = []
    monkeypatch.setattr(GridSweep, "run", lambda self, task: tasks.append(task))
    given = ["sweep.objectives={metric: max, latency: min}", "quant.weight.bits=4,8", f"sweep.dir={tmp_path}"]
    assert main(["train", sweep, *given]) == 0
    assert tasks[0].objectives == {"metric": "max", "latency": "min"}


def test_a_sweep_whose_config_files_were_edited_is_refused_under_the_part_that_changed(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(GridSweep, "run", lambda self, task: None)
    written = {
        "quant/a.yaml": "defaults: [w4a4]\n",
        "quant/b.yaml": "defaults: [w8a8]\n",
        "data/mine.yaml": "defaults: [digits]\nroot: ${oc.env:SOMEWHERE}\n",
    }
    for name, text in written.items():
        (tmp_path / "conf" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "conf" / name).write_text(text)
    argv = ["-m", "--config-dir", "conf", "data=mine", "quant=a,b", "seed=0,1", "sweep.dir=sweep"]
    monkeypatch.setenv("SOMEWHERE", "here")
    assert main(["train", *argv]) == 0
    for name, more in {"quant/b.yaml": "calibration_samples: 64\n", "data/mine.yaml": "batch_size: 7\n"}.items():
        path, part = tmp_path / "conf" / name, name.partition("/")[0]
        path.write_text(written[name] + more)
        said = f"the config files say something else of {part} than when this sweep began; name a folder of its own"
        assert said in _refused(capfd, *argv)
        path.write_text(written[name])
    monkeypatch.setenv("SOMEWHERE", "there")
    assert main(["train", *argv, "sweep.launcher.n_jobs=2"]) == 0, "where its data lie and how many at a time is free"


def test_points_are_numbered_by_what_varies_in_order_so_another_order_is_another_sweep(task):
    with task.claimed("grid"):
        pass
    turned = replace(task, space=dict(reversed(task.space.items())))
    with pytest.raises(UserError, match=r"holds another sweep \(params differ\)"), turned.claimed("grid"):
        pass


# -- points ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def program(monkeypatch):
    """Replaces `qat train` by a shell script, which finds the point's folder as `$1`."""

    def replace(script: str) -> None:
        monkeypatch.setattr(points, "_command", lambda point: ["sh", "-c", script, "sh", str(point.folder)])

    return replace


@pytest.fixture
def point(tmp_path):
    return Point(3, {"seed": "1"}, ("model=mlp", "ckpt=a.ckpt"), tmp_path / "point")


def test_a_point_is_done_when_it_left_a_report_and_is_not_run_again(point, program):
    program('echo run >> "$1/runs"; echo "{}" > "$1/report.json"')
    assert [run_point(point), run_point(point)] == [Outcome("done"), Outcome("done")]
    assert (point.folder / "runs").read_text() == "run\n" and finished(point.folder)


def test_a_failed_point_says_its_last_line_and_is_tried_again(point, program):
    program('echo run >> "$1/runs"; echo "qat: error: seed=1: no"; exit 2')
    assert [run_point(point), run_point(point)] == [Outcome("failed", "seed=1: no")] * 2
    assert (point.folder / "runs").read_text() == "run\n" * 2


@pytest.mark.parametrize(
    ("script", "said"),
    [
        pytest.param("echo 'Epoch 3: 40%'; kill -KILL $$", "killed by SIGKILL (out of memory?)", id="killed"),
        pytest.param("echo 'qat: error: no'; kill -SEGV $$", "killed by SIGSEGV", id="crashed"),
        pytest.param("echo 'Epoch 3: 40%'; exit 7", "ended with status 7: Epoch 3: 40%", id="other"),
        pytest.param(
            """printf 'Traceback (most recent call last):\\n  File "a.py", line 1\\n    f()\\nmy.Broken: too wide\\n'
            echo 'qat: corrected, it goes on with: qat train'; exit 1""",
            "my.Broken: too wide",
            id="exception",
        ),
    ],
)
def test_a_failed_point_says_what_ended_this_attempt(script, said, point, program):
    program("echo 'qat: error: seed=1: of an earlier attempt'; exit 2")
    run_point(point)
    program(script)
    assert run_point(point) == Outcome("failed", said)


DIVERGED = """echo '{"metric": "test/rel", "stages": {"qat": {"metric": NaN}}}' > "$1/report.json" """


def test_a_point_without_a_finite_metric_failed_and_its_report_is_of_the_last_attempt(point, program):
    program(DIVERGED)
    assert run_point(point) == Outcome("failed", "test/rel is nan") == past(point.folder)
    program("exit 3")
    assert run_point(point).error != "test/rel is nan" and not (point.folder / "report.json").exists()
    program('echo "{" > "$1/report.json"')
    assert run_point(point) == Outcome("failed", f"{point.folder / 'report.json'}: is damaged: no JSON")


def test_a_point_is_pruned_when_a_file_says_so(point, program):
    program('touch "$1/stop"; exec sleep 60')
    assert run_point(point) == Outcome("pruned") and finished(point.folder)


def test_a_half_finished_point_goes_on_from_its_checkpoint_and_a_new_one_starts_where_told(point):
    point.folder.mkdir()
    assert "ckpt=a.ckpt" in points._command(point)
    (point.folder / "progress.json").write_text("{}")
    command = points._command(point)
    assert "ckpt=last" in command and "ckpt=a.ckpt" not in command and f"run_dir='{point.folder}'" in command


def test_points_that_share_a_machine_share_its_cores(point, program, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    program('echo $OMP_NUM_THREADS > "$1/threads"; echo "{}" > "$1/report.json"')
    both = [point, Point(4, {}, (), tmp_path / "other")]
    assert sorted(p.number for p, _ in Local(n_jobs=2).run(both, tmp_path)) == [3, 4]
    assert (point.folder / "threads").read_text() == "4\n"


def test_a_sweep_of_one_point_says_so(task, program, console):
    program('echo "{}" > "$1/report.json"')
    GridSweep({}).run(replace(task, space={"seed": ["1"]}))
    assert console.file.getvalue().startswith("1 point, 0 of them finished")


def test_a_grid_runs_what_is_not_finished(task, program, console):
    program('echo "{}" > "$1/report.json"')
    task.point(1, {}).folder.mkdir(parents=True)
    write_record(task.point(1, {}), Outcome("done"))
    GridSweep({}).run(task)
    said = console.file.getvalue()
    assert "4 points, 1 of them finished" in said and said.count("to go") == 3


# -- pruning and results ---------------------------------------------------------------------------------------------


def test_only_a_point_that_costs_no_more_ends_another(tmp_path):
    bad = write_point(tmp_path, 0, {}, state=None, bits=4, bops=1000, curve=[0.2])
    cheap = write_point(tmp_path, 1, {}, bits=2, bops=500, curve=[0.4, 0.9], metric=0.9)
    dear = write_point(tmp_path, 2, {}, bits=8, bops=2000, curve=[0.9], metric=0.9)
    rule = Dominated(margin=0.1)
    assert rule.judge(bad, [cheap], "val/acc", "max")
    assert not rule.judge(bad, [dear], "val/acc", "max")
    assert not rule.judge(bad, [cheap], "val/acc", "min")
    assert not Dominated(margin=0.3).judge(bad, [cheap], "val/acc", "max")
    assert not Dominated(margin=0.1, after_epochs=2).judge(bad, [cheap], "val/acc", "max")


def test_a_point_that_diverged_is_worse_than_any_and_a_damaged_audit_ends_none(tmp_path):
    nan = write_point(tmp_path, 0, {}, state=None, bops=1000, curve=[float("nan")])
    good = write_point(tmp_path, 1, {}, bops=500, curve=[0.1], metric=0.1)
    damaged = write_point(tmp_path, 2, {}, bops=1, curve=[0.9], metric=0.9)
    (damaged / "audit.json").write_text("{")
    for mode in ("min", "max"):
        assert Dominated().judge(nan, [damaged, good], "val/acc", mode)
        assert not Dominated().judge(nan, [nan, damaged], "val/acc", mode)
        assert not Dominated().judge(good, [nan], "val/acc", mode)
        assert not Dominated().judge(damaged, [good], "val/acc", mode)


BAD = """printf '{"bops": 1000, "rows": [{"params": 100, "weight_bits": 8}]}' > "$1/audit.json"; mkdir "$1/csv"
printf 'epoch,val/acc,step\\n0,0.2,9\\n' > "$1/csv/metrics.csv"; exec sleep 60"""


@pytest.mark.parametrize(
    ("objectives", "pruner"),
    [
        pytest.param({"metric": "max", "packed": "min"}, lambda optuna: Dominated(margin=0.1), id="dominated"),
        pytest.param({"metric": "max"}, lambda optuna: optuna.pruners.ThresholdPruner(lower=0.5), id="optunas"),
    ],
)
def test_a_search_ends_points_that_its_pruner_gives_up(objectives, pruner, tmp_path, program, console):
    optuna = pytest.importorskip("optuna", reason="needs the extra `sweep`")
    write_point(tmp_path, 99, {}, bits=1, bops=100, curve=[0.9], metric=0.9)
    task = Task((), {"quant.weight.bits": ["8"]}, objectives, "test/acc", "max", 0, tmp_path, console)
    program(BAD)
    sweep = OptunaSweep(objectives, n_trials=1, pruner=pruner(optuna))
    sweep.check(task)
    sweep.run(task)
    sweep.run(task)
    [trial] = optuna.load_study(study_name="sweep", storage=f"sqlite:///{tmp_path / 'study.db'}").get_trials()
    assert trial.state.name == "PRUNED" and "pruned" in console.file.getvalue()


def test_two_searches_with_one_storage_have_a_study_each_and_go_on_with_it(tmp_path, program, console):
    pytest.importorskip("optuna", reason="needs the extra `sweep`")
    program('echo "{\\"stages\\": {\\"qat\\": {\\"metric\\": 0.5}}}" > "$1/report.json"')
    sweep = OptunaSweep({}, n_trials=2, storage=f"sqlite:///{tmp_path / 'all.db'}")
    tasks = [
        Task((), {key: ["1", "2", "3"]}, {"metric": "max"}, "acc", "max", 0, tmp_path / key / "same", console)
        for key in ("a", "b")
    ]
    for task in (*tasks, *tasks):
        with task.claimed("optuna"):
            sweep.run(task)
    for task in tasks:
        assert [set(r.params) for r in read_sweep(task.folder).results] == [set(task.space)] * 2
    said = console.file.getvalue()
    assert said.count("2 points, 0 of them finished") == said.count("2 points, 2 of them finished") == 2


def test_a_search_runs_a_point_that_failed_again_and_grows_by_none(tmp_path, program, console):
    optuna = pytest.importorskip("optuna", reason="needs the extra `sweep`")
    task = Task((), {"a": list("123456")}, {"metric": "max"}, "acc", "max", 0, tmp_path / "sweep", console)
    proposed = []
    for script in ("exit 1", DIVERGED, 'echo "{\\"stages\\": {\\"qat\\": {\\"metric\\": 0.5}}}" > "$1/report.json"'):
        program(script)
        with task.claimed("optuna"):
            OptunaSweep({}, n_trials=2).run(task)
        proposed.append([(r.number, r.params) for r in read_sweep(task.folder).results])
    assert len(proposed[0]) == 2 and proposed[0] == proposed[1] == proposed[2]
    assert [r.state for r in read_sweep(task.folder).results] == ["done", "done"]
    trials = optuna.load_study(study_name="sweep", storage=f"sqlite:///{task.folder / 'study.db'}").get_trials()
    assert [t.state.name for t in trials if "params" in t.user_attrs] == ["COMPLETE", "COMPLETE"]


@pytest.mark.parametrize("name", ["plain", "a?b", "a#b", "a b'c"])
def test_a_search_keeps_its_study_in_a_folder_of_any_name(name, tmp_path, program, console):
    pytest.importorskip("optuna", reason="needs the extra `sweep`")
    folder = tmp_path / name
    folder.mkdir()
    program('echo "{}" > "$1/report.json"')
    task = Task((), {"seed": ["1"]}, {"metric": "max"}, "test/acc", "max", 0, folder, console)
    OptunaSweep({}, n_trials=1).run(task)
    assert (folder / "study.db").is_file() and [path.name for path in tmp_path.glob("a*")] in ([], [name])


def test_optunas_pruners_do_not_rank_several_objectives(task):
    optuna = pytest.importorskip("optuna", reason="needs the extra `sweep`")
    several = replace(task, objectives={"metric": "max", "packed": "min"})
    with pytest.raises(UserError, match="MedianPruner compares one objective, and there are 2"):
        OptunaSweep({}, pruner=optuna.pruners.MedianPruner()).check(several)


def test_a_log_in_the_middle_of_a_line_is_read_up_to_there(tmp_path):
    folder = write_point(tmp_path, 0, {}, state=None, curve=[0.25, 0.5])
    path = folder / "csv" / "metrics.csv"
    path.write_text(path.read_text() + "2,0.7")
    assert by_epoch(folder, "val/acc") == {0: 0.25, 1: 0.5}
    assert curves(folder) == {"val/acc": [(9, 0.25), (19, 0.5)]}


def test_results_are_read_from_folders(tmp_path):
    sweep = read_sweep(write_sweep(tmp_path / "s"))
    assert [r.state for r in sweep.results] == ["done", "done", "done", "failed"]
    assert [r.number for r in sweep.front()] == [0, 2]
    assert sweep.results[0].values == {
        "metric": 0.8, "size": 1000, "packed": 300, "bops": 500, "latency": 0.25, "avg_bits": 2.0
    }  # fmt: skip


def test_a_folder_of_plain_runs_is_a_sweep_of_what_their_command_lines_said(tmp_path):
    folder = write_point(tmp_path, 0, {}, metric=0.5)
    (folder / ".hydra" / "overrides.yaml").write_text("- seed=1\n- run_dir=x\n")
    [result] = read_sweep(tmp_path).results
    assert result.params == {"seed": "1"} and result.state == "done"


def test_a_folder_without_runs_is_refused(tmp_path, capfd):
    assert main(["report", str(tmp_path)]) == 2
    assert "holds neither a sweep nor a finished run" in capfd.readouterr().err


def test_a_point_with_a_damaged_file_failed_and_the_others_count(tmp_path, capfd):
    folder = write_sweep(tmp_path / "s")
    record, report = (folder / "points" / name for name in ("0/point.json", "1/report.json"))
    record.write_text('{"number": 0')
    report.write_text("[]")
    (folder / "points" / "2" / ".hydra" / "config.yaml").write_text("seed: [")
    sweep = read_sweep(folder)
    assert [r.state for r in sweep.results] == ["failed", "failed", "done", "failed"]
    assert sweep.results[1].params == {"quant.weight.bits": "4"} and [r.number for r in sweep.front()] == [2]
    assert main(["report", str(folder)]) == 0
    said = capfd.readouterr().out
    assert f"point 0: {record}: is damaged: no JSON" in said
    assert f"point 1: {report}: is damaged: holds a list, no object" in said
    with pytest.raises(UserError, match=r"point\.json: is damaged"):
        finished(record.parent)
    (folder / "sweep.json").write_text("{}")
    assert main(["report", str(folder)]) == 2
    assert "sweep.json: is damaged: lacks 'objectives'" in capfd.readouterr().err


def test_a_damaged_run_in_a_folder_of_runs_failed_and_another_says_what_is_better(tmp_path, capfd):
    first = write_point(tmp_path, 0, {}, metric=0.5)
    (first / "report.json").write_text('{"stages": {"flo')
    second = write_point(tmp_path, 1, {}, metric=0.5)
    report = json.loads((second / "report.json").read_text())
    (second / "report.json").write_text(json.dumps(report | {"higher_is_better": False}))
    assert [r.state for r in read_sweep(tmp_path).results] == ["failed", "done"]
    assert read_sweep(tmp_path).objectives["metric"] == "min"
    (second / ".hydra" / "overrides.yaml").write_text("- [")
    assert main(["report", str(tmp_path)]) == 0
    assert "overrides.yaml: is damaged: no YAML of a config" in capfd.readouterr().out
