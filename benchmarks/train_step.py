"""Cost of a W8A8 training step against the float step of the same model, in the same memory format.

    python benchmarks/train_step.py [gpt resnet20 resnet18 mobilenetv2] [--channels-last] [--sites [every]] [--compile]
        [--peers]

Per-channel weights and per-tensor activations, both with learned steps. Ratios are medians of interleaved rounds, in
processor time. "Plain torch" is without compiled kernels and without products of codes (`qat.kernels.configure`).
`--channels-last` puts all models into that memory format, which the MobileNetV2 has anyway; `--sites` adds the operands
of functions (default kinds, or every); `--compile` compares torch.compile(fullgraph=True) of all models; `--peers` adds
the frameworks of `peers.py` that are installed. Peak memory is that of a whole step, parameters and buffers included.
"""

import argparse
import copy
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from models import WORKLOADS, workload
from peers import PEERS, attempt, prepared
from rich.console import Console
from rich.table import Table
from timing import bytes_saved_for_backward, interleave, peak_memory
from torch import Tensor, nn

from qat import kernels
from qat.calibrate import calibrate
from qat.insert import apply_plan
from qat.kernels.memory import keep_freed
from qat.planning.planner import make_plan
from qat.policies.policy import QuantPolicy

COLUMNS = (
    "model", "", "CPU ms", "wall ms", "x float", "both compiled x float", "saved for backward x float",
    "peak memory x float",
)  # fmt: skip
PLAIN, COMPILED = "qat, plain torch", "qat, compiled kernels"


def inserted(model: nn.Module, x: Tensor, sites: str = "off") -> nn.Module:
    """Our W8A8 model, made in place of `model`, before calibration."""
    policy = QuantPolicy.from_dict(
        {
            "weight": {"bits": 8, "granularity": "channel"},
            "act": {"bits": 8},
            "sites": "off" if sites == "off" else {},
            "kinds": "all" if sites == "every" else None,
            "rules": {},
        }
    )
    plan, _ = make_plan(model, policy, lambda: model(x[:2]))
    apply_plan(model, plan)
    return model


def quantized(model: nn.Module, x: Tensor, sites: str = "off") -> nn.Module:
    """Our W8A8 training model, calibrated on `x`, made in place of `model`."""
    calibrate(inserted(model, x, sites), lambda: model(x))
    return model.train()


def step(model: nn.Module, x: Tensor, y: Tensor, mode: kernels.Mode = "never") -> Callable[[], None]:
    """One training step, which leaves no gradients behind."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def run() -> None:
        kernels.configure(mode)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def both_compiled(
    models: dict[str, nn.Module], x: Tensor, y: Tensor, seconds: float, notes: list[str]
) -> dict[str, str]:
    """Cells of the ratios of whole-model compiled steps, or why there is none."""
    steps, cells = {}, {}
    for name, model in models.items():
        run = step(torch.compile(model, fullgraph=True), x, y, "auto")
        try:
            run()
        except Exception as error:
            cells[name] = type(error).__name__
            notes.append(f"{name}, compiled: {' '.join(str(error).split())[:300]}")
        else:
            steps[name] = run
    return cells | {name: f"{t.ratio:.2f}" for name, t in interleave(steps, "float", seconds).items()}


def memory(model: nn.Module, x: Tensor, y: Tensor, mode: kernels.Mode) -> tuple[int, int]:
    """Bytes saved for backward, and bytes at the peak of a step."""
    run = step(model, x, y, mode)
    own = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    saved = bytes_saved_for_backward(lambda: F.cross_entropy(model(x), y))
    return saved, own + peak_memory(run)


def measure(name: str, args: argparse.Namespace, table: Table, notes: list[str]) -> None:
    """Adds one workload to the table."""
    model, x, y = workload(name)
    if args.channels_last and x.ndim == 4:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)  # pyright: ignore
    twin = quantized(copy.deepcopy(model), x, args.sites)
    models: dict[str, nn.Module] = {"float": model, PLAIN: twin, COMPILED: twin}
    missing: dict[str, str] = {}
    for peer in PEERS if args.peers else ():
        made = attempt(peer, lambda p, model=model, x=x: prepared(p, model, x), notes)
        if isinstance(made, str):
            missing[peer] = made
        else:
            models[peer] = made
    modes: dict[str, kernels.Mode] = {name: "always" if name == COMPILED else "never" for name in models}
    timings = interleave({k: step(m, x, y, modes[k]) for k, m in models.items()}, "float", args.seconds)
    whole = {}
    sizes = {k: memory(m, x, y, modes[k]) for k, m in models.items()}
    if args.compile:
        whole = both_compiled({k: m for k, m in models.items() if k != COMPILED}, x, y, args.seconds, notes)
    for k, t in timings.items():
        saved, peak = (a / b for a, b in zip(sizes[k], sizes["float"], strict=True))
        table.add_row(
            name, k, f"{t.cpu * 1e3:.0f}", f"{t.wall * 1e3:.0f}", f"{t.ratio:.2f}", whole.get(k, "-"),
            f"{saved:.2f}", f"{peak:.2f}",
        )  # fmt: skip
    for peer, why in missing.items():
        table.add_row(name, peer, *("-" for _ in range(2)), why, *("-" for _ in range(3)))
    table.add_section()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", default=list(WORKLOADS))
    parser.add_argument("--sites", nargs="?", default="off", const="default", choices=("off", "default", "every"))
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20.0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed()  # for all of them
    warnings.simplefilter("ignore")
    table, notes = Table(title=f"training step, W8A8, {args.threads} thread(s)"), []
    for i, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if i < 2 else "right")
    for name in args.workloads:
        measure(name, args, table, notes)
    console = Console(width=120)
    console.print(table)
    for note in notes:
        console.print(note, markup=False, highlight=False)


if __name__ == "__main__":
    main()
