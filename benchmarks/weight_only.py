"""Linear layers of a GPT with 4-bit weights and float inputs, in ONNX Runtime: bytes and time relative to float.

    python benchmarks/weight_only.py [--width 768] [--layers 2] [--seconds 5] [--write]

Two forms of the same integers: `qdq`, INT4 initializers behind DequantizeLinear and a float product, which every
runtime has, and `matmulnbits`, ONNX Runtime's operation for packed weights. Weights are random: no number depends on
them.
"""

import argparse
import copy
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from pages import put
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from small_models import quantized

from qat.convert import convert
from qat.export.bench import interleaved, rounds_in
from qat.export.manifest import files_bytes
from qat.export.onnx.export import export_onnx
from qat.export.onnx.runtime import OnnxRunner
from qat.export.onnx.target import OnnxTarget

GROUPS: tuple[int | None, ...] = (32, 128, None)
TOKENS = (1, 16, 128)


class Stack(nn.Module):
    """The products of GPT blocks, the attention between them left out."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        sizes = {"qkv": (width, 3 * width), "out": (width, width), "up": (width, 4 * width), "down": (4 * width, width)}
        self.blocks = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(*size) for name, size in sizes.items()}) for _ in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            q, k, v = block["qkv"](x).chunk(3, -1)
            x = x + block["out"](q + k + v)
            x = x + block["down"](F.gelu(block["up"](x)))
        return x


def files(width: int, layers: int, folder: Path) -> dict[str, Path]:
    """The float file, and one for every form and group size."""
    torch.manual_seed(0)
    model, x = Stack(width, layers).eval(), torch.randn(4, width)
    paths = {"float": folder / "float.onnx"}
    export_onnx(model, x, paths["float"])
    for group in GROUPS:
        fake = copy.deepcopy(model)
        grain = {"granularity": "channel"} if group is None else {"granularity": "group", "group_size": group}
        plan = quantized(fake, x, {"weight": {"bits": 4, "range": "minmax"} | grain, "act": None, "sites": None})
        converted = convert(fake, plan)
        for form in ("qdq", "matmulnbits"):
            name = f"{form}, {'a channel' if group is None else f'{group} weights'}"
            path = paths[name] = folder / name.replace(", ", "_").replace(" ", "_") / "model.onnx"
            OnnxTarget(weight_only=form).export(converted, plan, x, path)
            computed, wanted = OnnxRunner(path, threads=1)(x.numpy()), fake(x).detach().numpy()
            assert np.abs(computed - wanted).max() < 1e-4 * np.abs(wanted).max(), name
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=5, help="for each number of tokens")
    parser.add_argument("--write", action="store_true", help="into docs/deploy-measured.md")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        paths = files(given.width, given.layers, Path(folder))
        runners = {name: OnnxRunner(path, threads=1) for name, path in paths.items()}
        cells = {name: [f"{files_bytes(path) / files_bytes(paths['float']):.3f}x"] for name, path in paths.items()}
        for tokens in TOKENS:
            x = np.random.default_rng(0).standard_normal((tokens, given.width), np.float32)
            times = interleaved(runners, x, rounds_in(given.seconds, runners, x))
            for name, values in times.items():
                median, fast = (np.percentile(values, q) / np.percentile(times["float"], q) for q in (50, 10))
                cells[name].append(f"{median:.2f}x ({fast:.2f}x)")
    head = ["form, weights with one scale", "size", *(f"{n} token{'s' * (n > 1)}" for n in TOKENS)]
    rows = [head, ["---"] * len(head), *([name, *cells[name]] for name in paths if name != "float")]
    text = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    print(text)
    if given.write:
        put("deploy-measured.md", "weight-only", text)


if __name__ == "__main__":
    main()
