"""What quantization costs beside arithmetic: Python calls, modules, evaluation of one sample, insertion, import.

    python benchmarks/overhead.py [--peers] [--layers 1000]

Calls and modules are those that quantization adds to a Linear, in training mode, of 8 rows and then by their number.
Evaluation is that of the model as prepared for training, at batch 1, in processor time against float: four
Linear(1024, 1024) on one row, where weights are all the work, and two networks. Insertion puts quantizers into a model
of `--layers` Linears, calibration on one batch makes it ready to train; peers do both at once. Import is what the parts
used here add to torch's own, median of three fresh processes.
"""

import argparse
import copy
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from statistics import median
from types import FrameType

import torch
from models import workload
from peers import PEERS, attempt, prepared
from rich.console import Console
from rich.table import Table
from timing import interleave
from torch import Tensor, nn
from train_step import inserted, quantized

from qat import kernels

COLUMNS = (
    "", "Python calls", "modules", "eval x float: 4 Linears", "GPT", "ResNet-20", "insertion s", "+ calibration s",
    "import s",
)  # fmt: skip
ROWS = (4, 64, 256, 512, 1024)
"""Below 2,048 elements nothing is compiled, products on codes are asked after from 32,768 on, rounded tensors are made
again in backward from 131,072 on, and codes are multiplied from 768 rows on.
"""
SOURCES = {
    "qat": "qat, qat.policies.policy, qat.insert, qat.calibrate",
    **{name: peer.module for name, peer in PEERS.items()},
}


def python_calls(model: Callable[[Tensor], object], x: Tensor) -> int:
    """Python functions entered by one forward, the second."""
    count = 0

    def profile(frame: FrameType, event: str, _: object) -> None:
        nonlocal count
        count += event == "call"

    model(x)
    sys.setprofile(profile)
    try:
        model(x)
    finally:
        sys.setprofile(None)
    return count


def make(name: str, model: nn.Module, x: Tensor, notes: list[str]) -> nn.Module | str:
    """The training model of `name`, or why there is none."""
    if name == "qat":
        return quantized(copy.deepcopy(model), x)
    return attempt(name, lambda peer: prepared(peer, model, x), notes)


def added(name: str, notes: list[str]) -> list[str]:
    """Cells of the Python calls and the modules that quantization adds to one Linear."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(256, 256)), torch.randn(8, 256)
    twin = make(name, model, x, notes)
    if isinstance(twin, str):
        return [twin, twin]
    calls = python_calls(twin, x) - python_calls(model, x)
    return [str(calls), str(len(list(twin.modules())) - len(list(model.modules())))]


def calls_by_rows() -> Table:
    """The Python calls that quantization adds to one Linear in training, before and after kernels are compiled."""
    table = Table("rows of 256", "plain torch", "compiled", title="Python calls, by the size of the input")
    model = nn.Sequential(nn.Linear(256, 256))
    for rows in ROWS:
        x = torch.randn(rows, 256)
        cells = [str(rows)]
        for mode in ("auto", "always"):
            kernels.configure(mode)
            cells.append(str(python_calls(quantized(copy.deepcopy(model), x), x) - python_calls(model, x)))
        table.add_row(*cells)
    kernels.configure()
    return table


def evaluation(names: list[str], model: nn.Module, x: Tensor, seconds: float, notes: list[str]) -> dict[str, str]:
    """Cells of the time of one sample in evaluation, in units of the float model's."""
    models, cells = {"float": model}, {}
    for name in names:
        twin = make(name, model, x, notes)
        if isinstance(twin, str):
            cells[name] = twin
        else:
            models[name] = twin
    for twin in models.values():
        twin.eval()
    with torch.no_grad():
        timings = interleave({name: lambda m=m: m(x[:1]) for name, m in models.items()}, "float", seconds)
    return cells | {name: f"{t.ratio:.2f}" for name, t in timings.items()}


def insertion(name: str, layers: int, notes: list[str]) -> list[str]:
    """Cells of the processor time to put quantizers into a float model, and to make it ready to train."""
    model, x = nn.Sequential(*(nn.Linear(16, 16) for _ in range(layers))), torch.randn(2, 16)

    def timed(prepare: Callable[[nn.Module, Tensor], nn.Module]) -> str:
        twin = copy.deepcopy(model)
        start = time.process_time()
        prepare(twin, x)
        return f"{time.process_time() - start:.2f}"

    if name == "qat":
        return [timed(inserted), timed(quantized)]
    return ["-", attempt(name, lambda peer: timed(peer.prepare), notes)]


def importing(module: str) -> str:
    """Cell of the processor time that importing `module` takes after torch."""
    code = f"import time, torch; t = time.process_time(); import {module}; print(time.process_time() - t)"
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True) for _ in range(3)]
    if any(run.returncode for run in runs):
        return "-"
    return f"{median(float(run.stdout.split()[-1]) for run in runs):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--layers", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=2.0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    names, notes = list(SOURCES) if args.peers else ["qat"], []
    linears = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(4)))
    networks = [(linears, torch.randn(8, 1024)), *(workload(name)[:2] for name in ("gpt", "resnet20"))]
    evaluations = [evaluation(names, model, x, args.seconds, notes) for model, x in networks]
    table = Table(title="beside arithmetic")
    for column in COLUMNS:
        table.add_column(column, justify="right" if column else "left")
    for name in names:
        table.add_row(
            name, *added(name, notes), *(cells[name] for cells in evaluations),
            *insertion(name, args.layers, notes), importing(SOURCES[name]),
        )  # fmt: skip
    console = Console(width=120)
    console.print(table)
    console.print(calls_by_rows())
    for note in dict.fromkeys(notes):
        console.print(note, markup=False, highlight=False)


if __name__ == "__main__":
    main()
