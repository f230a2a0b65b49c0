"""Two processes on one machine (gloo): the same scales in both, and the same as one process finds."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SCRIPT = """
import pytorch_lightning as pl, torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from qat.lightning import LearnBits, QATCallback
from qat.lightning.schedules import ReestimateBatchNorm
from qat.starts import AdaRound, CorrectBias

class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    def forward(self, x): return self.net(x)
    def training_step(self, batch, batch_idx): return nn.functional.cross_entropy(self(batch[0]), batch[1])
    def configure_optimizers(self): return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

class Sampled(Net):
    '''Gives each process samples of its own, which are larger from one to the next.'''
    def __init__(self):
        super().__init__()
        self.net.insert(1, nn.BatchNorm1d(16))
    def train_dataloader(self):
        x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.2, 3, 64)[:, None]
        data = TensorDataset(x, x[:, :3].argmax(1))
        return DataLoader(data, 8, sampler=DistributedSampler(data, shuffle=False))

class Widths(pl.Callback):
    def __init__(self, learn):
        self.learn, self.seen = learn, []
    def on_train_batch_end(self, trainer, *_):
        if self.learn.choice is None:
            self.seen.append({name: width.at for name, width in self.learn.learned.widths.items()})

class Look(pl.Callback):
    def __init__(self, path, *watched):
        self.path, self.watched = path, watched
    def on_train_start(self, trainer, module):
        self.before = {k: v.clone() for k, v in module.state_dict().items()}
    def on_fit_end(self, trainer, module):
        found = {"before": self.before, "after": module.state_dict()}
        if self.watched:
            learn, widths = self.watched
            found |= {"choice": learn.choice, "widths": widths.seen}
        torch.save(found, f"{self.path}_{trainer.global_rank}.pt")

def main(name, devices):
    pl.seed_everything(0)
    net = Net()
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    # One global batch: its order does not matter.
    loader = DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=64 // devices)
    spec = {"bits": 4 if name == "learned" else 8, "range": "minmax"}
    callbacks = [QATCallback({"weight": spec, "act": spec}, 64)]
    if name == "learned":
        callbacks.append(LearnBits({"avg_bits": 4}, weight_bits=[2, 4, 8], act_bits=[4, 8], least={}, lr=0.3, until=8))
        callbacks.append(Widths(callbacks[-1]))
    trainer = pl.Trainer(
        callbacks=[*callbacks, Look(f"{name}_{devices}", *callbacks[1:])], devices=devices, accelerator="cpu",
        max_epochs=12 if name == "learned" else 2, strategy="ddp_fork" if devices > 1 else "auto", logger=False,
        enable_progress_bar=False, enable_checkpointing=False,
    )
    trainer.fit(net, loader)

def sampled():
    pl.seed_everything(0)
    policy = {"weight": {"bits": 3}, "act": {"bits": 4}}
    starts = [AdaRound(steps=60, lr=0.1), CorrectBias()]
    trainer = pl.Trainer(
        callbacks=[QATCallback(policy, 32, starts=starts), ReestimateBatchNorm(4), Look("sampled_2")], devices=2,
        accelerator="cpu", max_epochs=1, strategy="ddp_fork", logger=False, use_distributed_sampler=False,
        enable_progress_bar=False, enable_checkpointing=False,
    )
    trainer.fit(Sampled())

torch.set_num_threads(1)
sampled()
for name in ("plain", "learned"):  # importing takes seconds, so all in one process and its forks
    for devices in (1, 2):
        main(name, devices)
"""


def _run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "PL_GLOBAL_SEED")
    }
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done


@pytest.fixture(scope="module")
def states(tmp_path_factory) -> dict[str, dict]:
    """What each process of one and of two found, as `NAME_DEVICES_RANK`."""
    folder = tmp_path_factory.mktemp("ddp")
    (folder / "script.py").write_text(SCRIPT)
    _run("script.py", cwd=folder)
    return {path.stem: torch.load(path) for path in folder.glob("*.pt")}


@pytest.mark.parametrize("name", ["plain", "sampled"], ids=["same-data", "own-sampler-with-starts"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_both_processes_have_identical_weights_scales_and_statistics(when, name, states):
    first, second = states[f"{name}_2_0"][when], states[f"{name}_2_1"][when]
    assert first.keys() == second.keys() and any(key.endswith("quantizer.scale") for key in first)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("when", ["before", "after"])
def test_two_processes_do_what_one_does_with_the_same_global_batch(when, states):
    one, two = states["plain_1_0"][when], states["plain_2_0"][when]
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-4, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")
    assert any(not torch.equal(states["plain_1_0"]["before"][key], one[key]) for key in one) == (when == "after")


def test_learned_widths_are_the_same_in_both_processes_and_those_of_one(states):
    one, first, second = (states[f"learned_{name}"] for name in ("1_0", "2_0", "2_1"))
    assert len(one["widths"]) == 8 and one["widths"][0] != one["widths"][-1]
    assert first["widths"] == second["widths"] and first["choice"] == second["choice"]
    assert all(torch.equal(first["after"][key], second["after"][key]) for key in first["after"])
    for a, b in zip(one["widths"], first["widths"], strict=True):
        assert b == pytest.approx(a, rel=1e-3)
    assert first["choice"] == one["choice"]


def test_a_distributed_run_from_the_command_line_writes_one_folder_and_prints_once(tmp_path):
    tiny = """model=mlp model.width=16 data.train_limit=128 data.batch_size=32 float_epochs=1 trainer.max_epochs=1
        trainer=ddp trainer.accelerator=cpu quant.calibration_samples=64 run_dir=run
        trainer.enable_progress_bar=false""".split()  # noqa: SIM905 - as one writes it on the command line
    done = _run(str(ROOT / "train.py"), *tiny, cwd=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert list(report["stages"]) == ["float", "ptq", "qat", "exported"] and report["verify"]["passed"]
    assert done.stdout.count("Quantization-aware training") == 1 and done.stdout.count("verified:") == 1
    assert report["verify"]["samples"] == 360, "the whole test set, each sample once"
    rows = list(csv.DictReader((tmp_path / "run" / "csv" / "metrics.csv").open()))
    assert max(int(row["step"]) for row in rows) + 1 == 2, "half of the 128 samples each, in batches of 32"
