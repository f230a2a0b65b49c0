"""Two processes on one machine (gloo): sharded by FSDP2 (`ModelParallelStrategy`), and started by `ddp_spawn`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_module import Tiny

from qat.lightning import load_from_checkpoint

TESTS = Path(__file__).parent
SCRIPT = """
import sys
import pytorch_lightning as pl, torch
from pytorch_lightning.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from tiny_module import Tiny, loader, trainer

class Net(Tiny):
    def configure_model(self):
        mesh = self.device_mesh["data_parallel"]
        fully_shard(self.net.conv, mesh=mesh)
        fully_shard(self.net, mesh=mesh)

def full(state):
    return {k: (v.full_tensor() if hasattr(v, "full_tensor") else v).detach().clone() for k, v in state.items()}

class Look(pl.Callback):
    def on_train_start(self, trainer, module):
        self.before = full(module.state_dict())
    def on_train_end(self, trainer, module):
        content = {"before": self.before, "after": full(module.state_dict())}
        torch.save(content, f"{trainer.default_root_dir}/{kind}_{trainer.global_rank}.pt")

strategies = {
    "one": "auto", "spawn": "ddp_spawn", "fsdp2": ModelParallelStrategy(2, 1, save_distributed_checkpoint=False)
}

def fit(folder):
    pl.seed_everything(0, verbose=False)
    devices = 1 if kind == "one" else 2
    spec = {"bits": 4, "range": "minmax"}
    fitted = trainer(
        folder, Look(), policy={"weight": spec, "act": spec}, strategy=strategies[kind], devices=devices, max_epochs=2
    )
    # One global batch, whose order does not matter.
    fitted.fit((Net if kind == "fsdp2" else Tiny)(norm=False), loader(8, batch_size=8 // devices))
    if kind == "fsdp2":
        fitted.save_checkpoint(f"{folder}/fsdp2.ckpt")

*kinds, folder = sys.argv[1:]
kind = kinds[-1]  # of the processes that are started here
if __name__ == "__main__":
    torch.set_num_threads(1)
    for kind in kinds:
        fit(folder)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    (folder / "script.py").write_text(SCRIPT)
    ours = ("LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "PL_GLOBAL_SEED")
    environment = {k: v for k, v in os.environ.items() if k not in ours}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"}
    for kinds in (("one", "spawn"), ("fsdp2",)):
        command = [sys.executable, "script.py", *kinds, str(folder)]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
        (folder / f"{kinds[-1]}.txt").write_text(done.stderr)
    return folder


@pytest.mark.parametrize("kind", ["spawn", "fsdp2"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_two_processes_agree_with_each_other_and_with_one(when, kind, folder):
    one, first, second = (torch.load(folder / f"{name}.pt")[when] for name in ("one_0", f"{kind}_0", f"{kind}_1"))
    assert one.keys() == first.keys() == second.keys() and any(key.endswith("quantizer.scale") for key in one)
    for key, value in one.items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], value, rtol=1e-4, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


def test_a_module_that_is_left_without_quantizers_says_how_to_go_on(folder):
    said = "go on there with qat.load_from_checkpoint(Tiny, a checkpoint of this training)"
    assert (folder / "spawn.txt").read_text().count(said) == 1 and said not in (folder / "fsdp2.txt").read_text()


def test_a_sharded_checkpoint_loads_into_the_plain_module(folder):
    state = load_from_checkpoint(Tiny, folder / "fsdp2.ckpt").state_dict()
    after = torch.load(folder / "fsdp2_0.pt")["after"]
    assert all(torch.equal(state[key], after[key]) for key in after)
