"""A run that was killed goes on to the same numbers, bit for bit."""

import csv
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from filelock import FileLock
from omegaconf import OmegaConf
from safetensors.torch import load_file

from qat.cli import main
from qat.errors import UserError
from qat.lightning import read_checkpoint
from qat.lightning.resume import SeedEpochs
from qat.lightning.runs.resume_settings import check_settled, settled

ROOT = Path(__file__).parents[1]
MODULE = '''
"""An MLP with dropout that kills its process, as the machine might, at a given step of a given stage."""
import os, signal
from torch import nn
from qat.models import MLP

class Mortal(MLP):
    def __init__(self, width: int = 16, lr: float = 0.1, weight_decay: float = 1e-4):
        super().__init__(width=width, lr=lr, weight_decay=weight_decay, optimizer="sgd")
        self.drop = nn.Dropout(0.2)

    def forward(self, x):
        return super().forward(self.drop(x))

    def training_step(self, batch, batch_idx):
        stage = "qat" if getattr(self, "quantization_plan", None) else "float"
        if os.environ.get("DIE_AT") == f"{stage} {self.global_step}":
            os.kill(os.getpid(), signal.SIGKILL)
        loss = super().training_step(batch, batch_idx)
        self.log("train/step_loss", loss)
        return loss
'''
# 4 steps an epoch; random crops, dropout and shuffling draw random numbers
OVERRIDES = """model._target_=mortal.Mortal ~model.in_features ~model.num_classes ~model.optimizer ~model.momentum
    ~model.warmup model=mlp model.width=16 model.lr=0.05 data.train_limit=128 data.batch_size=32 data.val_limit=32
    data.test_limit=64 data.crop_padding=1 float_epochs=3 trainer.max_epochs=4 trainer.log_every_n_steps=1
    trainer.enable_progress_bar=false quant.calibration_samples=64 export=none seed=7""".split()  # noqa: SIM905 - as one writes it on the command line


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Where the module is found and trusted, with one thread, so that sums are taken in one order."""
    folder = tmp_path_factory.mktemp("package")
    (folder / "mortal.py").write_text(MODULE)
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(folder))
    patch.setenv("QAT_TARGETS", "mortal")
    patch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{ROOT}")
    patch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    patch.undo()


@pytest.fixture(scope="module")
def uninterrupted(environment, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    assert main(["train", *OVERRIDES, f"run_dir={run_dir}"]) == 0
    return run_dir


def _curve(path: Path) -> list[dict[str, str]]:
    """The rows of a log without its empty cells, in order of steps."""
    with path.open(newline="") as file:
        rows = [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]
    return sorted(rows, key=lambda row: (int(row["step"]), sorted(row)))


KILLED = {
    "in-the-second-float-epoch": ("float 6", "float/metrics.csv"),
    "before-the-first-checkpoint-of-qat": ("qat 2", "csv/metrics.csv"),
    "in-the-third-qat-epoch": ("qat 10", "csv/metrics.csv"),
}
KILL = """
import os, signal, sys
from qat.cli import main
die_at, *argv = sys.argv[1:]
for die_at in die_at.split(","):
    child = os.fork()  # importing takes seconds
    if not child:
        os.environ["DIE_AT"] = die_at
        main(["train", *argv, f"run_dir={die_at.replace(' ', '-')}"])
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL, die_at
"""


@pytest.fixture(scope="module")
def killed(environment, tmp_path_factory) -> Path:
    """The folder of one run for each of `KILLED`."""
    folder, moments = tmp_path_factory.mktemp("killed"), [die_at for die_at, _ in KILLED.values()]
    command = [sys.executable, "-c", KILL, ",".join(moments), *OVERRIDES]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize(("die_at", "logged"), [pytest.param(*case, id=name) for name, case in KILLED.items()])
def test_a_killed_run_resumes_to_the_same_curve_and_weights(die_at, logged, uninterrupted, killed):
    run_dir = killed / die_at.replace(" ", "-")
    assert not (run_dir / "quantized.ckpt").exists()
    if die_at != "qat 2":
        assert len(_curve(run_dir / logged)) < len(_curve(uninterrupted / logged))

    assert main(["train", "ckpt=last", f"run_dir={run_dir}"]) == 0  # the overrides are those of the run
    for name in ("float/metrics.csv", "csv/metrics.csv"):
        assert _curve(run_dir / name) == _curve(uninterrupted / name)
    whole, resumed = (read_checkpoint(d / "quantized.ckpt")["state_dict"] for d in (uninterrupted, run_dir))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[k], resumed[k]) for k in whole)
    floats = [load_file(d / "float.safetensors") for d in (uninterrupted, run_dir)]
    assert all(torch.equal(floats[0][k], floats[1][k]) for k in floats[0])


def test_a_finished_run_resumes_to_the_same_report_and_trains_no_more(uninterrupted, capfd):
    before = (uninterrupted / "csv" / "metrics.csv").read_text()
    assert main(["train", "ckpt=last", f"run_dir={uninterrupted}"]) == 0
    assert _curve(uninterrupted / "csv" / "metrics.csv") and len(before.splitlines()) == len(
        (uninterrupted / "csv" / "metrics.csv").read_text().splitlines()
    )


EMA = "+callbacks.ema={_target_: pytorch_lightning.callbacks.EMAWeightAveraging, decay: 0.98}"


def test_a_run_that_was_killed_after_training_goes_on_with_its_averaged_weights(environment, tmp_path):
    run_dir, progress = tmp_path / "run", tmp_path / "run" / "progress.json"
    assert main(["train", *OVERRIDES, "float_epochs=1", "trainer.max_epochs=2", EMA, f"run_dir={run_dir}"]) == 0
    weights, remembered = (run_dir / "model.safetensors").read_bytes(), json.loads(progress.read_text())
    measured = remembered["stages"].pop("qat")
    del remembered["trained"]["limits"]["limit_train_batches"]  # as older versions noted them
    progress.write_text(json.dumps(remembered))
    assert main(["train", "ckpt=last", f"run_dir={run_dir}"]) == 0
    assert json.loads(progress.read_text())["stages"]["qat"] == measured and "best" in measured
    assert (run_dir / "model.safetensors").read_bytes() == weights

    assert main(["train", "ckpt=last", f"run_dir={run_dir}", "trainer.max_epochs=3"]) == 0
    assert {row["epoch"] for row in _curve(run_dir / "csv" / "metrics.csv") if "epoch" in row} == {"0", "1", "2"}


def test_a_run_that_is_going_on_is_not_resumed(uninterrupted, capfd):
    before = {path: path.read_bytes() for path in (uninterrupted / ".hydra").iterdir()}
    with FileLock(uninterrupted / ".running"):
        assert main(["train", "ckpt=last", f"run_dir={uninterrupted}"]) == 2
    assert f"run_dir={uninterrupted}: a run is going on in this folder" in capfd.readouterr().err
    assert before == {path: path.read_bytes() for path in (uninterrupted / ".hydra").iterdir()}


def test_another_seed_gives_another_curve(uninterrupted, tmp_path):
    assert main(["train", *OVERRIDES, "seed=8", f"run_dir={tmp_path / 'other'}"]) == 0
    assert _curve(tmp_path / "other" / "csv" / "metrics.csv") != _curve(uninterrupted / "csv" / "metrics.csv")


@pytest.mark.parametrize(
    ("change", "before"),
    [
        pytest.param("seed=8", "seed=7", id="seed"),
        pytest.param("data.batch_size=16", "data.batch_size=32", id="data"),
        pytest.param("model.lr=0.2", "model.lr=0.05", id="model"),
        pytest.param("quant.scale_lr=0.5", "quant.scale_lr=None", id="scales"),
        pytest.param("float_epochs=4", "float_epochs=3", id="finished stage"),
    ],
)
def test_a_resumed_run_keeps_to_what_it_began_with(change, before, uninterrupted, capfd):
    config = (uninterrupted / ".hydra" / "config.yaml").read_text()
    assert main(["train", "ckpt=last", f"run_dir={uninterrupted}", change]) == 2
    error = capfd.readouterr().err
    assert f"{change}: the run in {uninterrupted} has {before}, which a resumed one keeps" in error
    assert (uninterrupted / ".hydra" / "config.yaml").read_text() == config


def test_where_data_lies_may_change_when_a_run_is_resumed():
    of = {"seed": 0, "model": {"lr": 0.1}, "data": {"root": "/there", "num_workers": 0, "flip": True}}
    moved = {**of, "data": {"root": None, "num_workers": 3, "flip": True}}
    check_settled(settled(OmegaConf.create(moved)), settled(OmegaConf.create(of)), Path("run"))
    with pytest.raises(UserError, match=r"^data\.flip=False: the run in run has data\.flip=True"):
        flipped = {**moved, "data": {"root": None, "flip": False}}
        check_settled(settled(OmegaConf.create(flipped)), settled(OmegaConf.create(of)), Path("run"))


def test_every_process_and_every_epoch_draws_numbers_of_its_own_and_the_same_ones_again():
    def drawn(seed: int, epoch: int, rank: int) -> tuple[float, float, float]:
        at = SimpleNamespace(current_epoch=epoch, global_rank=rank, fit_loop=SimpleNamespace(_data_fetcher=None))
        SeedEpochs(seed).on_train_epoch_start(at, None)  # pyright: ignore
        return random.random(), np.random.rand(), torch.rand(()).item()

    every = {(s, e, r): drawn(s, e, r) for s in (0, 1) for e in (0, 1) for r in (0, 1)}
    ranks = [key for key in every if key[0] == 0]
    for generator in range(3):
        assert len({every[key][generator] for key in ranks}) == len(ranks)
    assert all(drawn(*key) == numbers for key, numbers in every.items())
