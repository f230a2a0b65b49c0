"""Speed of fake quantization, forward and forward+backward, against a ReLU and a copy of the same tensor and against
torch's own operations.

    python benchmarks/quantizers.py [--sizes 1e5 1e6 1e7] [--threads 1] [--peers]

Ratios are medians of interleaved rounds in one process, in processor time; a second table has time on the clock and the
most memory that one forward and backward holds beyond its input, as torch's own allocator counts it. `--peers` adds the
frameworks of peers.py that are installed: their own 8-bit fake quantization of a tensor, with a learned scale where
they have one (torchao, per channel; Brevitas), with a frozen range elsewhere (ModelOpt, quanto) or a moving one (PT2E).
"""

import argparse
import warnings
from collections.abc import Callable

import torch
from peers import PEERS, Operation, attempt, operation
from rich.console import Console
from rich.table import Table
from timing import Timing, bytes_saved_for_backward, interleave, peak_memory
from torch import Tensor, nn

from qat import kernels
from qat.grid.spec import QuantSpec
from qat.kernels.memory import keep_freed
from qat.quantizers import create

WEIGHT_ROWS = 64


def quantizer(granularity: str, x: Tensor) -> nn.Module:
    spec = QuantSpec(bits=8, granularity=granularity, range="minmax").resolved(nonnegative=False, weight=True)
    module = create(spec, x.shape).to(x.device)
    module.calibrate(x.detach())
    return module


def uncompiled(run: Callable[[], None]) -> Callable[[], None]:
    """`run` without kernels, which run compiled everywhere else: who is timed compiled pays for no switch."""

    def switched() -> None:
        kernels.configure("never")
        run()
        kernels.configure("always")

    return switched


def operations(x: Tensor, peers: bool, missing: dict[str, str]) -> dict[str, Operation]:
    """What to compare on one tensor, with the parameters that it learns.

    Args:
        x: The tensor.
        peers: Whether to add other frameworks.
        missing: Receives the peers that there are not, and why.
    """
    (scale, zero), (scales, zeros) = (
        [torch.full((n,), value, device=x.device, requires_grad=True) for value in (0.05, 0.0)] for n in (1, len(x))
    )

    tensor, channel = ((module, list(module.parameters())) for module in map(quantizer, ("tensor", "channel"), (x, x)))
    found: dict[str, Operation] = {
        "relu": (torch.relu, []),
        "LSQ per tensor, compiled": tensor,
        "LSQ per channel, compiled": channel,
        "LSQ per tensor, eager": tensor,
        "LSQ per channel, eager": channel,
        "torch fake_quantize": (lambda t: torch.fake_quantize_per_tensor_affine(t, 0.05, 0, -128, 127), []),
        "torch learnable": (
            lambda t: torch._fake_quantize_learnable_per_tensor_affine(t, scale, zero, -128, 127, 1.0),
            [scale, zero],
        ),
        "torch learnable per channel": (
            lambda t: torch._fake_quantize_learnable_per_channel_affine(t, scales, zeros, 0, -128, 127, 1.0),
            [scales, zeros],
        ),
    }
    for peer in PEERS if peers else ():
        made = attempt(peer, lambda p: operation(p, x), notes := [])
        if isinstance(made, str):
            missing[peer] = notes[0] if notes else f"{peer}: {made}"
        else:
            found[peer] = made
    return found


def timed(x: Tensor, grad: Tensor, op: Operation, backward: bool) -> Callable[[], None]:
    function, learned = op

    def run() -> None:
        y = function(x)
        if backward:
            y.backward(grad)
            for leaf in (x, *learned):
                leaf.grad = None

    return run


def saved(x: Tensor, op: Operation) -> str:
    """Cell of the bytes per element that are kept for backward beyond what is there before."""
    function, _ = op
    return f"{bytes_saved_for_backward(lambda: function(x)) / x.numel():.1f}"


def clock_and_memory(size: int, both: list[dict[str, Timing]], steps: dict[str, Callable[[], None]]) -> Table:
    """The table of what processor time does not show.

    Args:
        size: Number of elements.
        both: Timings of forward, and of forward and backward, by candidate.
        steps: Forward and backward of each candidate that has them.
    """
    table = Table(title=f"{size:.0e} elements: time on the clock, and memory")
    for column in ("", "forward ns/element", "x relu", "forward+backward ns/element", "x relu", "peak B/element"):
        table.add_column(column, justify="right" if column else "left")
    for name in both[0]:
        cells = [name]
        for timings in both:
            t, relu = timings.get(name), timings["relu"]
            cells += [f"{t.wall / size * 1e9:.2f}", f"{t.wall / relu.wall:.2f}"] if t else ["-", "-"]
        table.add_row(*cells, f"{peak_memory(steps[name]) / size:.1f}" if name in steps else "-")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=float, nargs="+", default=[1e4, 1e5, 1e6, 1e7])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--peers", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed()
    kernels.configure("always")
    warnings.simplefilter("ignore")
    console, missing = Console(width=120), {}
    for size in map(int, args.sizes):
        x = torch.randn(WEIGHT_ROWS, size // WEIGHT_ROWS, requires_grad=True)
        grad, output = torch.randn_like(x), torch.empty_like(x)
        table = Table(title=f"{size:.0e} elements, {args.threads} thread(s)")
        for column in ("", "forward ns/element", "x relu", "forward+backward ns/element", "x relu", "saved B/element"):
            table.add_column(column, justify="right" if column else "left")
        found = operations(x, args.peers, missing)
        both, runs = [], {}
        for backward in (False, True):
            runs = {name: timed(x, grad, op, backward) for name, op in found.items()}
            runs |= {name: uncompiled(run) for name, run in runs.items() if name.endswith("eager")}
            if not backward:
                runs["copy"] = lambda x=x, output=output: output.copy_(x.detach())
            both.append(interleave(runs, "relu", args.seconds))
        for name in both[0]:
            cells = [name]
            for timings in both:
                t = timings.get(name)
                cells += [f"{t.cpu / size * 1e9:.2f}", f"{t.ratio:.2f}"] if t else ["-", "-"]
            table.add_row(*cells, saved(x, found[name]) if name in found else "-")
        console.print(table)
        console.print(clock_and_memory(size, both, runs))
    for note in missing.values():
        console.print(note, markup=False, highlight=False)


if __name__ == "__main__":
    main()
