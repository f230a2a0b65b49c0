"""How much faster an exported W8A8 ResNet-18 is than the float file in ONNX Runtime (224x224, batch 1).

    python benchmarks/deploy_speed.py [--seconds 20]

Both files run in turn. The ratio is given for medians and, for machines on which others work, of the fastest tenth of
the calls. Weights are random: speed does not depend on them.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from models import workload
from small_models import both

from qat.export.bench import time_interleaved
from qat.export.onnx import OnnxTarget, export_onnx
from qat.export.runtime import OnnxRunner
from qat.insert import Plan

W8A8 = {"weight": {"bits": 8, "granularity": "channel"}, "act": {"bits": 8}}
TARGET = 3.0


def files(folder: Path) -> tuple[Path, Path]:
    """Writes the float and the quantized file."""
    model, _, _ = workload("resnet18")
    x = torch.randn(4, 3, 224, 224)
    export_onnx(model.eval(), x[:2], folder / "float.onnx")
    _, converted = both(model, x, W8A8)
    OnnxTarget().write(converted, Plan(), x[:2], folder)
    return folder / "float.onnx", folder / "model.onnx"


def main() -> None:
    """Prints a row for one and for two threads, and what the runtime executes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20, help="for each row")
    arguments = parser.parse_args()
    x = np.random.default_rng(0).standard_normal((1, 3, 224, 224), np.float32)
    with tempfile.TemporaryDirectory() as folder:
        paths = files(Path(folder))
        runner = OnnxRunner(paths[1])
        print(f"kernels: {dict(runner.kernels())}; layers in float: {', '.join(runner.float_layers()) or 'none'}")
        for threads in (1, 2):
            runners = {path.stem: OnnxRunner(path, threads=threads) for path in paths}
            times = time_interleaved(runners, x, arguments.seconds)
            median, fast = ({name: np.percentile(values, q) * 1e3 for name, values in times.items()} for q in (50, 10))
            print(
                f"{threads} thread{'s' * (threads > 1)}: median {median['float']:.2f} and {median['model']:.2f} ms, "
                f"{median['float'] / median['model']:.2f}x; fastest tenth {fast['float']:.2f} and "
                f"{fast['model']:.2f} ms, {fast['float'] / fast['model']:.2f}x (wanted: {TARGET:g}x)",
                flush=True,
            )


if __name__ == "__main__":
    main()
