"""Cost of a W8A8 training step against the float step of the same model, in the same memory format.

    python benchmarks/train_step.py [gpt resnet20 resnet18 mobilenetv2] [--sites [every]] [--compile]

Per-channel weights and per-tensor activations, both with learned steps. Ratios are medians of interleaved rounds, in
processor time. `--sites` adds the operands of functions (of the default kinds, or of every kind); `--compile` compares
torch.compile(fullgraph=True) of both models.
"""

import argparse
import copy
import resource
import warnings

import torch
import torch.nn.functional as F
from models import WORKLOADS, workload
from rich.console import Console
from rich.table import Table
from timing import bytes_saved_for_backward, interleave
from torch import Tensor, nn

from qat import kernels
from qat.calibrate import calibrate
from qat.insert import apply_plan, make_plan
from qat.policy import QuantPolicy


def quantized(model: nn.Module, x: Tensor, sites: str) -> nn.Module:
    policy = QuantPolicy.from_dict(
        {
            "weight": {"bits": 8, "granularity": "channel"},
            "act": {"bits": 8},
            "sites": "off" if sites == "off" else {},
            "kinds": "all" if sites == "every" else None,
            "rules": {},
        }
    )
    model = copy.deepcopy(model)
    plan, _ = make_plan(model, policy, lambda: model(x[:2]))
    apply_plan(model, plan)
    calibrate(model, lambda: model(x[:2]))
    return model.train()


def step(model: nn.Module, x: Tensor, y: Tensor, mode: str = "never"):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def run() -> None:
        kernels.configure(mode)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", default=list(WORKLOADS))
    parser.add_argument("--sites", nargs="?", default="off", const="default", choices=("off", "default", "every"))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20.0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    table = Table(title=f"training step, W8A8, {args.threads} thread(s)")
    for column in (
        "model",
        "float ms",
        "x float: plain torch",
        "x float: compiled kernels",
        "both compiled",
        "saved for backward x float",
    ):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name in args.workloads:
        model, x, y = workload(name)
        twin = quantized(model, x, args.sites)
        candidates = {"float": step(model, x, y), "eager": step(twin, x, y), "kernels": step(twin, x, y, "always")}
        timings = interleave(candidates, "float", args.seconds)
        saved = [
            bytes_saved_for_backward(lambda m=m, x=x, y=y: F.cross_entropy(m(x), y), inputs=(x, *m.parameters()))
            for m in (model, twin)
        ]
        whole = "-"
        if args.compile:
            both = {
                "float": step(torch.compile(model, fullgraph=True), x, y),
                "qat": step(torch.compile(twin, fullgraph=True), x, y),
            }
            whole = f"{interleave(both, 'float', args.seconds)['qat'].ratio:.2f}"
        table.add_row(
            name, f"{timings['float'].cpu * 1e3:.0f}", f"{timings['eager'].ratio:.2f}",
            f"{timings['kernels'].ratio:.2f}", whole, f"{saved[1] / saved[0]:.2f}",
        )  # fmt: skip
    console = Console(width=120)
    console.print(table)
    console.print(f"peak memory of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
