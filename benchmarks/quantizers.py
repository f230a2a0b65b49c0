"""Speed of fake quantization, forward and forward+backward, against a ReLU and a copy of the same tensor and against
torch's own operations.

    python benchmarks/quantizers.py [--sizes 1e5 1e6 1e7] [--threads 1]

Ratios are medians of interleaved rounds in one process, in processor time.
"""

import argparse
import warnings

import torch
from rich.console import Console
from rich.table import Table
from timing import bytes_saved_for_backward, interleave
from torch import Tensor

from qat import kernels
from qat.quantizers import create
from qat.spec import QuantSpec

WEIGHT_ROWS = 64


def quantizer(granularity: str, x: Tensor) -> torch.nn.Module:
    spec = QuantSpec(bits=8, granularity=granularity, range="minmax").resolved(nonnegative=False, weight=True)
    module = create(spec, x.shape)
    module.calibrate(x.detach())
    return module


def candidates(x: Tensor, grad: Tensor, backward: bool) -> dict[str, object]:
    """What to time on one tensor."""
    scale, zero = torch.full((1,), 0.05, requires_grad=True), torch.zeros(1, requires_grad=True)
    scales, zeros = torch.full((len(x),), 0.05, requires_grad=True), torch.zeros(len(x), requires_grad=True)
    output = torch.empty_like(x)

    def run(function):
        def step() -> None:
            y = function()
            if backward:
                y.backward(grad)
                for leaf in leaves:
                    leaf.grad = None

        return step

    def in_mode(mode: str, module: torch.nn.Module):
        def call() -> Tensor:
            kernels.configure(mode)
            return module(x)

        return call

    tensor, channel = quantizer("tensor", x), quantizer("channel", x)
    leaves = [x, scale, zero, scales, zeros, tensor.scale, channel.scale]
    fakes = {
        "relu": lambda: torch.relu(x),
        "LSQ per tensor, compiled": in_mode("always", tensor),
        "LSQ per channel, compiled": in_mode("always", channel),
        "LSQ per tensor, eager": in_mode("never", tensor),
        "LSQ per channel, eager": in_mode("never", channel),
        "torch fake_quantize": lambda: torch.fake_quantize_per_tensor_affine(x, 0.05, 0, -128, 127),
        "torch learnable": lambda: torch._fake_quantize_learnable_per_tensor_affine(x, scale, zero, -128, 127, 1.0),
        "torch learnable per channel": lambda: torch._fake_quantize_learnable_per_channel_affine(
            x, scales, zeros, 0, -128, 127, 1.0
        ),
    }
    timed = {name: run(function) for name, function in fakes.items()}
    if not backward:
        timed["copy"] = lambda: output.copy_(x.detach())
    return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=float, nargs="+", default=[1e4, 1e5, 1e6, 1e7])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    console = Console(width=120)
    for size in map(int, args.sizes):
        x = torch.randn(WEIGHT_ROWS, size // WEIGHT_ROWS, requires_grad=True)
        grad = torch.randn_like(x)
        module = quantizer("tensor", x)
        saved = bytes_saved_for_backward(
            lambda m=module, x=x: m(x), inputs=(x, *module.parameters(), *module.buffers())
        )
        table = Table(
            title=f"{size:.0e} elements, {args.threads} thread(s); saved for backward beyond the input: {saved} bytes"
        )
        for column in ("", "forward ns/element", "x relu", "forward+backward ns/element", "x relu"):
            table.add_column(column, justify="right" if column else "left")
        both = [interleave(candidates(x, grad, backward), "relu", args.seconds) for backward in (False, True)]
        for name in both[0]:
            cells = [name]
            for timings in both:
                t = timings.get(name)
                cells += [f"{t.cpu / size * 1e9:.2f}", f"{t.ratio:.2f}"] if t else ["-", "-"]
            table.add_row(*cells)
        console.print(table)


if __name__ == "__main__":
    main()
