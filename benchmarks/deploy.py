"""What exported files are worth: the table of docs/deploy.md, made with the commands that users have.

    python benchmarks/deploy.py --data DIR                        # everything; DIR holds cifar10/, text/, pretrained/
    python benchmarks/deploy.py --data DIR --models resnet20 --recipes w8a8 --targets onnx openvino
    python benchmarks/deploy.py --models resnet18 --recipes w8a8 --targets onnx --size 224

Each row is a run (`qat train`, one step: in effect a calibrated model), then for each target `qat export`, `qat verify`
and `qat bench`. ResNet-20 and the char GPT start from trained weights and are verified on their own test data, the
others train for one epoch on synthetic images and are verified on more of them. A target whose package is missing, or
whose format does not hold the model, has the reason in its row.
"""

import argparse
import contextlib
import io
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
TARGETS = {"onnx": "model.onnx", "openvino": "model.xml", "torch": "model.pt2", "executorch": "model.pte"}
ONE_STEP = (
    "trainer.max_epochs=1 trainer.limit_train_batches=1 trainer.limit_val_batches=1 trainer.enable_progress_bar=false "
    "float_model.lr=1e-3 model.lr=1e-6 export.min_agreement=0 export.max_metric_change=100"
)
SYNTHETIC = "data=synthetic data.size={size} float_epochs=1 quant={recipe}"
MODELS = {
    "resnet20": "experiment=resnet20_cifar10_w4a4 quant={recipe} data.root={data}/cifar10 data.test_limit={test} "
    "ckpt={data}/pretrained/resnet20_cifar10.safetensors",
    "chargpt": "experiment=shakespeare/chargpt_{recipe} data.path={data}/text/tinyshakespeare.txt "
    "ckpt={data}/pretrained/chargpt_shakespeare.safetensors",
    "mobilenetv2": f"model=mobilenetv2 {SYNTHETIC}",
    "vit": f"model=vit {SYNTHETIC}",
    "resnet18": f"model=resnet18 {SYNTHETIC}",
}
"""What `qat train` gets for each model."""
OTHERS = {("chargpt", "w4a4"): "w4a8"}
"""Recipes that a model has in the place of another."""
NUMBER = r"([\d.]+(?:e[+-]?\d+)?)"


@dataclass(frozen=True)
class Row:
    """One file of one run; `reason` stands in for the numbers where there are none.

    Attributes:
        size: Of the float ONNX file's.
        speed: Float latency over the file's, batch 1, with one thread and with two.
        agreement: Share of samples with the predictions of the fake-quantized model.
        nodes: Integer nodes of those expected.
        verified: Whether every check passed.
    """

    model: str
    recipe: str
    target: str
    size: str = ""
    speed: str = ""
    agreement: str = ""
    nodes: str = ""
    verified: str = ""
    reason: str = ""

    def line(self) -> str:
        cells = [self.model, self.recipe, self.target]
        if self.reason:
            return f"| {' | '.join(cells)} | {self.reason} |"
        return f"| {' | '.join([*cells, self.size, self.speed, self.agreement, self.nodes, self.verified])} |"


def qat(*arguments: str) -> tuple[int, str]:
    """Runs a command of qat in this process; returns its status and all that it said, in one line."""
    from qat.cli import main

    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            status = main(list(arguments))
        except SystemExit as end:
            status = int(end.code or 0)
    return status, " ".join(said.getvalue().split())


def train(name: str, recipe: str, run_dir: Path, arguments: argparse.Namespace) -> None:
    """Makes the run of a row.

    Raises:
        RuntimeError: if the command fails.
    """
    values = {"recipe": recipe, "data": arguments.data, "test": arguments.test, "size": arguments.size}
    words = [word.format(**values) for word in f"{MODELS[name]} {ONE_STEP}".split()]
    status, said = qat("train", "--config-dir", str(HERE / "configs"), *words, f"run_dir={run_dir}")
    if status not in (0, 1):  # 1: the verification of `train` fell short; that of the row says so
        raise RuntimeError(f"{name} {recipe}: {said[-300:]}")


def measure(name: str, recipe: str, target: str, run_dir: Path, seconds: int) -> Row:
    """Exports, verifies and times one file."""
    file = run_dir / TARGETS[target]
    status, said = qat("export", str(run_dir), f"target={target}")
    if status:
        return Row(name, recipe, target, reason=said[-200:])
    status, said = qat("verify", str(file), str(run_dir))
    if status == 2:
        return Row(name, recipe, target, reason=said[-200:])
    nodes, agreement = re.search(r"(\d+ of \d+) nodes", said), re.search(r"([\d.]+%) of predictions", said)
    bench = "bench", str(file), "threads=1,2", "batch=1", f"seconds={seconds}", f"out={run_dir / 'bench.png'}"
    _, table = qat(*bench)
    size = re.search(rf"{re.escape(file.name)} .*?{NUMBER}x", table)
    one, two = (re.search(rf"{re.escape(file.name)} {threads} 1 .*?{NUMBER}x", table) for threads in (1, 2))
    found = [m.group(1) if m else "-" for m in (size, one, two, agreement, nodes)]
    speed, verified = f"{found[1]}x, {found[2]}x", "no" if status else "yes"
    return Row(name, recipe, target, f"{found[0]}x", speed, found[3], found[4], verified)


def rows(arguments: argparse.Namespace) -> Iterator[Row]:
    """Measures what the command line asks for."""
    for name in arguments.models:
        for recipe in [OTHERS.get((name, recipe), recipe) for recipe in arguments.recipes]:
            with tempfile.TemporaryDirectory() as folder:
                run_dir = Path(folder) / "run"
                train(name, recipe, run_dir, arguments)
                for target in arguments.targets:
                    yield measure(name, recipe, target, run_dir, arguments.seconds)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table as Markdown, row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--recipes", nargs="+", default=["w8a8", "w4a4"])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--data", default="shared/data", help="folder with cifar10, text and pretrained")
    parser.add_argument("--test", default="2000", help="test images of CIFAR-10")
    parser.add_argument("--size", type=int, default=64, help="height and width of synthetic images")
    parser.add_argument("--seconds", type=int, default=5, help="of timing, for each file")
    arguments = parser.parse_args(argv)
    sys.path.insert(0, str(HERE))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])  # `bench` starts others
    print("| model | recipe | target | size of float | speed, 1 and 2 threads | agreement | integer nodes | verified |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for row in rows(arguments):
        print(row.line(), flush=True)


if __name__ == "__main__":
    main()
