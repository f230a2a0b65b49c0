"""How much faster an exported W8A8 ResNet-18 is than the float file in ONNX Runtime (224x224, batch 1).

    python benchmarks/deploy_speed.py [--targets onnx,openvino,torch_inductor] [--threads 1,2] [--seconds 20] [--write]

All files run in turn. The ratio is given for medians and of the fastest tenth of the calls; on one thread of processor
time, which does not pass while others have the processor. Weights are random: speed does not depend on them.
`torch_inductor` compiles for some minutes.
"""

import argparse
import copy
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from models import workload
from pages import put
from small_models import quantized

from qat.config.exports import target_named
from qat.export.bench import interleaved, rounds_in
from qat.export.onnx.export import export_onnx
from qat.export.onnx.runtime import OnnxRunner

W8A8 = {"weight": {"bits": 8, "granularity": "channel"}, "act": {"bits": 8}}
WANTED = 3.0


class Files:
    """The float file, and those of targets.

    Args:
        folder: Where they are written.
        targets: By the names of their configs.
    """

    def __init__(self, folder: Path, targets: list[str]) -> None:
        self.model, _, _ = workload("resnet18")
        self.folder, self.models = folder, dict[str, Any]()
        self.x = torch.randn(4, 3, 224, 224)
        export_onnx(self.model.eval(), self.x[:2], folder / "float.onnx")
        self.targets = {name: target_named(name, {}) for name in targets}
        for name, target in self.targets.items():
            converted, plan = self._converted(target)
            target.export(converted, plan, self.x[:2], folder / name / target.file)

    def _converted(self, target: Any) -> Any:
        """By the rules of its engine."""
        engine = target.engine or "ort"
        if engine not in self.models:
            fake = copy.deepcopy(self.model)
            plan = quantized(fake, self.x, W8A8 | {"engine": engine})
            self.models[engine] = target.prepared(fake, plan), plan
        return self.models[engine]

    def open(self, threads: int) -> dict[str, Any]:
        """All of them as runners, `float` first."""
        torch.set_num_threads(threads)
        runners: dict[str, Any] = {"float": OnnxRunner(self.folder / "float.onnx", threads=threads)}
        for name, target in self.targets.items():
            runners[name] = target.load(self.folder / name / target.file, self.model, threads=threads)
        return runners


def main() -> None:
    """Prints a row for each number of threads and target, and what ONNX Runtime executes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default="onnx,openvino,torch_inductor")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--seconds", type=float, default=20, help="for each number of threads")
    parser.add_argument("--write", action="store_true", help="into docs/deploy-measured.md")
    given = parser.parse_args()
    x = np.random.default_rng(0).standard_normal((1, 3, 224, 224), np.float32)
    rows = ["| threads | file | median | fastest tenth |", "|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        files = Files(Path(folder), given.targets.split(","))
        for threads in map(int, given.threads.split(",")):
            runners = files.open(threads)
            if isinstance(runners.get("onnx"), OnnxRunner):
                print(f"kernels of onnx: {dict(runners['onnx'].kernels())}; float: {runners['onnx'].float_layers()}")
            clock = time.process_time if threads == 1 else time.perf_counter
            times = interleaved(runners, x, rounds_in(given.seconds, runners, x), clock)
            half, tenth = ({name: np.percentile(v, q) * 1e3 for name, v in times.items()} for q in (50, 10))
            for name in times:
                shown = (f"{t[name]:.2f} ms, {t['float'] / t[name]:.2f}x" for t in (half, tenth))
                rows.append(f"| {threads} | {name} | {' | '.join(shown)} |")
                print(rows[-1], f"(wanted: {WANTED:g}x)", flush=True)
    if given.write:
        put("deploy-measured.md", "speed", "\n".join(rows))


if __name__ == "__main__":
    main()
