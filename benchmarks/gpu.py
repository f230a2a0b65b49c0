"""Cost of fake quantization and of W8A8 training steps on a GPU.

    python benchmarks/gpu.py [--sizes 1e6 1e7 1e8] [--models gpt resnet18 mobilenetv2] [--compile] [--seconds 1]

Fake quantization is compared with a ReLU and a copy of the same tensor and with torch's own operations; a training step
with the float step of the same model in the same memory format, under bfloat16 autocast, with per-channel weights and
per-tensor activations, both with learned steps. Time is that of the clock over several calls in a row, the GPU waited
for at their end: what Python cannot keep up with counts. Ratios are medians of interleaved rounds. `--compile` compares
torch.compile(fullgraph=True) of both models, too.
"""

import argparse
import copy
import time
import warnings
from collections.abc import Callable, Mapping
from statistics import median

import torch
import torch.nn.functional as F
from models import GPT, ResNet18
from quantizers import operations, timed
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from train_step import quantized

from qat import kernels
from qat.kernels.launch import exact_division
from qat.models import MobileNetV2

ROUND = 0.02  # seconds of one candidate's calls in a round


def waited(function: Callable[[], object], calls: int) -> float:
    """Seconds of one of so many calls in a row."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def interleave(candidates: Mapping[str, Callable[[], object]], baseline: str, seconds: float) -> dict[str, list[float]]:
    """Median seconds of each candidate, and its median ratio to the baseline in the same round."""
    for function in candidates.values():
        for _ in range(5):
            function()
    calls = {name: max(1, int(ROUND / waited(function, 3))) for name, function in candidates.items()}
    rounds = max(5, int(seconds / ROUND / len(candidates)))
    times = [{name: waited(f, calls[name]) for name, f in candidates.items()} for _ in range(rounds)]
    return {name: [median(t[name] for t in times), median(t[name] / t[baseline] for t in times)] for name in candidates}


def fake_quantization(size: int, dtype: torch.dtype, seconds: float) -> Table:
    """What one tensor of so many elements costs."""
    x = torch.randn(64, size // 64, device="cuda", dtype=dtype, requires_grad=True)
    grad, output = torch.randn_like(x), torch.empty_like(x)
    table = Table(title=f"{size:.0e} elements, {dtype}")
    for column in ("", "forward us", "x relu", "forward+backward us", "x relu"):
        table.add_column(column, justify="right" if column else "left")
    found = operations(x, peers=False, missing={})
    if dtype != torch.float32:
        found = {name: op for name, op in found.items() if "learnable" not in name}
    both = []
    for backward in (False, True):
        runs = {name: timed(x, grad, op, backward) for name, op in found.items()}
        if not backward:
            runs["copy"] = lambda: output.copy_(x.detach())
        both.append(interleave(runs, "relu", seconds))
    for name in both[0]:
        cells = [times.get(name) for times in both]
        table.add_row(name, *(text for c in cells for text in ((f"{c[0] * 1e6:.0f}", f"{c[1]:.2f}") if c else "--")))
    return table


def workload(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A model, one batch and its targets, large enough to fill a GPU."""
    torch.manual_seed(0)
    if name == "gpt":
        tokens, targets = torch.randint(65, (16, 512)), torch.randint(65, (16 * 512,))
        return GPT(width=1024, layers=8, heads=16, time=512).cuda(), tokens.cuda(), targets.cuda()
    model, batch = (ResNet18(), 128) if name == "resnet18" else (MobileNetV2(stride=32), 128)
    x = torch.randn(batch, 3, 224, 224, device="cuda").to(memory_format=torch.channels_last)
    return model.cuda().to(memory_format=torch.channels_last), x, torch.randint(10, (batch,), device="cuda")  # pyright: ignore


def step(
    model: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, mode: kernels.Mode
) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def once() -> None:
        kernels.configure(mode)
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.cross_entropy(run(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return once


def peak(run: Callable[[], None]) -> int:
    """Bytes at the peak of a step, parameters included."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated()


def training(name: str, compiled: bool, seconds: float, table: Table) -> None:
    """Adds one model to the table."""
    model, x, y = workload(name)
    twin = quantized(copy.deepcopy(model), x)
    named: dict[str, tuple[nn.Module, kernels.Mode]] = {
        "float": (model, "never"),
        "qat, plain torch": (twin, "never"),
        "qat, compiled kernels": (twin, "always"),
    }
    eager = {k: step(m, m, x, y, mode) for k, (m, mode) in named.items()}
    results = interleave(eager, "float", seconds)
    peaks = {k: peak(run) for k, run in eager.items()}
    whole = {}
    if compiled:
        options = exact_division()
        models = {"float": model, "qat, compiled kernels": twin}
        runs = {k: step(m, torch.compile(m, fullgraph=True, options=options), x, y, "auto") for k, m in models.items()}
        whole = interleave(runs, "float", seconds)
    for k, (seconds_, ratio) in results.items():
        cells = [f"{whole[k][0] * 1e3:.1f}", f"{whole[k][1]:.2f}"] if k in whole else ["-", "-"]
        table.add_row(name, k, f"{seconds_ * 1e3:.1f}", f"{ratio:.2f}", *cells, f"{peaks[k] / peaks['float']:.2f}")
    table.add_section()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=float, nargs="*", default=[1e6, 1e7, 1e8])
    parser.add_argument("--models", nargs="*", default=["gpt", "resnet18", "mobilenetv2"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--seconds", type=float, default=1.0)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    console = Console(width=120)
    console.print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for size in map(int, args.sizes):
        for dtype in (torch.float32, torch.bfloat16):
            console.print(fake_quantization(size, dtype, args.seconds))
    table = Table(title="training step, W8A8, bfloat16 autocast")
    for i, column in enumerate(("model", "", "ms", "x float", "both compiled ms", "x float", "peak memory x float")):
        table.add_column(column, justify="left" if i < 2 else "right")
    for name in args.models:
        training(name, args.compile, args.seconds, table)
    console.print(table)


if __name__ == "__main__":
    main()
