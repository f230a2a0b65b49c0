"""Sweeps of real runs: killed and resumed, and on every engine."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qat.cli import main
from qat.sweep.results import read_sweep

ROOT = Path(__file__).parents[1]
TINY = """model=mlp model.width=16 data.train_limit=192 data.val_limit=64 data.test_limit=128 float_epochs=1
    trainer.max_epochs=1 quant.calibration_samples=64 trainer.enable_progress_bar=false""".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    """The float model of all tests here."""
    return f"cache_dir={tmp_path_factory.mktemp('cache')}"


# -- killed ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sweep_killed_in_the_middle_ends_where_undisturbed_runs_do(tmp_path, cache):
    base = [*TINY, "trainer.max_epochs=8", cache]
    for bits in (2, 8):
        assert main(["train", *base, f"quant.weight.bits={bits}", f"run_dir={tmp_path / 'whole' / str(bits)}"]) == 0
    killed = tmp_path / "killed"
    first, second = killed / "points" / "0", killed / "points" / "1"
    command = ["-m", *base, "quant.weight.bits=2,8", f"sweep.dir={killed}"]
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *command], cwd=tmp_path, stdout=subprocess.DEVNULL)
    _wait(lambda: (second / "checkpoints" / "last.ckpt").is_file(), process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    _wait(lambda: not _processes_of(second))
    finished, half = (first / "report.json").stat().st_mtime_ns, not (second / "report.json").exists()

    assert main(["train", *command]) == 0
    assert half and (first / "report.json").stat().st_mtime_ns == finished, "a finished point runs once"
    assert "ckpt=last" in (second / ".hydra" / "overrides.yaml").read_text(), "a half-finished one goes on"
    whole, resumed = read_sweep(tmp_path / "whole"), read_sweep(killed)
    keys = ("metric", "size", "packed", "bops")
    for a, b in zip(whole.results, resumed.results, strict=True):
        assert [a.values[k] for k in keys] == [b.values[k] for k in keys]
    assert [r.number for r in whole.front()] == [r.number for r in resumed.front()]
    assert all(r.verified for r in resumed.results) and (killed / "report.html").is_file()


def _wait(condition, process=None, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        assert process is None or process.poll() is None, "the sweep ended before it was killed"
        time.sleep(0.01)


def _processes_of(folder: Path) -> str:
    return subprocess.run(["pgrep", "-f", f"run_dir='{folder}'"], capture_output=True, text=True).stdout


# -- shared ----------------------------------------------------------------------------------------------------------


def test_points_share_one_float_model_of_the_same_parts_only(tmp_path):
    from qat.config.configs import composed, finalize_config
    from qat.lightning.runs.float_cache import FloatCache, float_key

    def config(*overrides: str):
        cfg = composed([f"cache_dir={tmp_path / 'cache'}", *overrides])
        finalize_config(cfg, tmp_path)
        return cfg

    same = ["quant=w8a8", "trainer.max_epochs=3", "model.lr=0.5", "export=none"]
    other = [
        "seed=1",
        "model=mlp",
        "data.train_limit=64",
        "float_epochs=2",
        "float_model.lr=0.2",
        "trainer.precision=bf16",
    ]
    (tmp_path / "weights.safetensors").write_text("weights")
    other.append(f"float_ckpt={tmp_path / 'weights.safetensors'}")
    key = float_key(config())
    assert [float_key(config(text)) == key for text in same + other] == [True] * len(same) + [False] * len(other)

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "float.safetensors").write_text("weights")
    cache = FloatCache(config(), None, main=True)
    assert cache.load(tmp_path / "again") is None
    with cache.locked():
        cache.save(tmp_path / "run", {"metric": 0.5})
    assert FloatCache(config(), None, main=True).load(tmp_path / "again") == {"metric": 0.5}
    assert (tmp_path / "again" / "float.safetensors").read_text() == "weights"
    (cache.folder / ".lock").unlink()
    with cache.locked():
        assert not (cache.folder / ".lock").exists(), "a folder that cannot be written to serves as well"


BASE = "from qat.models import MLP\nclass Base(MLP): scale = 1\n"
MODEL = "from edited_base import Base\nclass Own(Base): pass\ndef make(width: int): return Own(width)\n"


@pytest.mark.parametrize("name", ["Own", "make"])
def test_a_float_model_of_other_code_is_another_one(name, tmp_path, monkeypatch):
    from omegaconf import OmegaConf

    from qat.lightning.runs import float_cache

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("QAT_TARGETS", "edited_model,edited_base")
    parts = dict.fromkeys(("ckpt", "float_ckpt", "float_model", "float_epochs", "seed", "metric"))
    node = {"_target_": f"edited_model.{name}", "width": 8}
    cfg = OmegaConf.create({**parts, "model": {"wrapped": [node]}, "data": {}, "trainer": {}})

    def key(base: str, model: str) -> str:
        (tmp_path / "edited_base.py").write_text(base)
        (tmp_path / "edited_model.py").write_text(model)
        return float_cache.float_key(cfg)

    def other_process(base: str, model: str) -> str:
        float_cache._sources.cache_clear()
        for module in ("edited_model", "edited_base"):
            monkeypatch.delitem(sys.modules, module, raising=False)
        return key(base, model)

    before, edited = other_process(BASE, MODEL), BASE.replace("1", "2")
    assert key(edited, MODEL + "# edited") == before, "what this process runs is what it imported"
    assert before == other_process(BASE, MODEL) != other_process(BASE, MODEL + "# edited")
    assert (before == other_process(edited, MODEL)) == (name == "make"), "a class follows from its bases"


# -- engines ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_optuna_completes_a_search_to_its_total_and_continues_what_was_running(tmp_path, cache):
    optuna = pytest.importorskip("optuna", reason="needs the extra `sweep`")
    folder = tmp_path / "sweep"
    command = ["train", "sweep=optuna_pareto", *TINY, "export=none", cache, f"sweep.dir={folder}"]
    assert main([*command, "sweep.n_trials=1"]) == 0
    before = (folder / "points" / "0" / "report.json").stat().st_mtime_ns
    study = optuna.load_study(study_name="sweep", storage=f"sqlite:///{folder / 'study.db'}")
    interrupted = study.ask()  # as a kill leaves it
    params = {"quant.weight.bits": "3", "quant.act.bits": "4"}
    interrupted.set_user_attr("params", params)
    assert main([*command, "sweep.n_trials=2"]) == 0
    assert [r.params for r in read_sweep(folder).results][1] == params
    assert main([*command, "sweep.n_trials=2"]) == 0
    trials = study.get_trials()
    assert [t.state.name for t in trials] == ["COMPLETE", "COMPLETE"] and len(trials[0].values) == 3
    assert (folder / "points" / "0" / "report.json").stat().st_mtime_ns == before


@pytest.mark.slow
def test_slurm_jobs_run_points_through_submitit(tmp_path, cache):
    pytest.importorskip("submitit", reason="needs the extra `slurm`")
    launcher = ["sweep/launcher=slurm", "sweep.launcher.cluster=local", "sweep.launcher.n_jobs=2"]
    folder = tmp_path / "sweep"
    argv = ["train", "-m", *TINY, "export=none", cache, *launcher]
    assert main([*argv, "quant.weight.bits=2,4", f"sweep.dir={folder}"]) == 0
    assert [r.state for r in read_sweep(folder).results] == ["done", "done"]
    assert len(list((folder / "slurm").glob("*_submitted.pkl"))) == 2


@pytest.mark.slow
def test_ray_tune_runs_points_on_a_local_cluster_and_ranks_them_by_their_log(tmp_path, cache):
    pytest.importorskip("ray.tune", reason="needs the extra `ray`")
    folder = tmp_path / "sweep"
    argv = ["train", "sweep=ray_asha", *TINY, "export=none", cache, "model.lr=0.01", "quant.weight.bits=2,4"]
    assert main([*argv, f"sweep.dir={folder}"]) == 0
    assert [r.state for r in read_sweep(folder).results] in (["done", "done"], ["done", "pruned"], ["pruned", "done"])
    logs = [json.loads(line) for path in (folder / "ray" / "tune").glob("*/result.json") for line in path.open()]
    assert {log["config"]["number"] for log in logs if "val/acc" in log} == {0, 1}


@pytest.mark.slow
def test_ray_tune_runs_points_on_a_cluster_that_was_there_before(tmp_path, cache):
    pytest.importorskip("ray.tune", reason="needs the extra `ray`")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    folder = tmp_path / "sweep"
    argv = ["train", "sweep=ray_asha", *TINY, "export=none", cache, "model.lr=0.01", "quant.weight.bits=2,4"]
    try:
        assert main([*argv, f"sweep.address='{cluster.address}'", "sweep.keep=null", f"sweep.dir={folder}"]) == 0
        assert [r.state for r in read_sweep(folder).results] == ["done", "done"]
        assert cluster.head_node.live_processes(), "the cluster outlives the sweep"
    finally:
        cluster.shutdown()
