"""The table of docs/deploy-measured.md: models in the files of four runtimes, held against training and timed beside
float.

    python benchmarks/deploy.py DATA_DIR [MODEL ...] [--targets onnx,openvino,executorch,torch] [--samples 256]

DATA_DIR holds cifar10/, fashion_mnist/, text/tinyshakespeare.txt and the float weights pretrained/*.safetensors; the
MobileNetV2 and the ViT are trained on Fashion-MNIST for --steps steps here, once: their weights are kept in
~/.cache/qat. All are calibrated and not trained further: whether a file computes what the fake-quantized model does has
nothing to do with how good that is. Agreement is on test data.

Latency is at batch 1 on one thread, in turn with the float model's ONNX file in ONNX Runtime, and relative to it;
--seconds 0 leaves those of the last measurement. Rows are kept in docs/deploy.json; a model that is measured again
replaces its own.
"""

import argparse
import copy
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from models import ViT
from pages import DOCS, put
from presets import settings
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qat.calibrate import calibrate
from qat.config.exports import target_named
from qat.data import HFImages, Text
from qat.errors import UserError
from qat.export.bench import interleaved, rounds_in
from qat.export.manifest import files_bytes
from qat.export.onnx.export import export_onnx
from qat.export.onnx.runtime import OnnxRunner
from qat.export.target import Target
from qat.export.verify import Comparison, Verdict, check_codes, check_outputs, expected_integer_nodes
from qat.files import atomic
from qat.insert import apply_plan
from qat.models import GPT, MobileNetV2, ResNet
from qat.planning.plan import Plan
from qat.planning.planner import make_plan
from qat.policies.policy import QuantPolicy

CALIBRATION, BATCH = 256, 64
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass
class Case:
    """One model under one policy.

    Attributes:
        model: In float, in evaluation mode.
        quant: What `qat train` would be told.
        learn: Inputs to calibrate on.
        test: Inputs to compare on.
        weights: Where the weights come from.
    """

    model: nn.Module
    quant: tuple[str, ...]
    learn: Tensor
    test: Tensor
    weights: str


# -- the models --------------------------------------------------------------------------------------------------------


def loaded(loader: Any, samples: int) -> tuple[Tensor, Tensor]:
    """The first samples of a loader in one batch."""
    parts, count = [], 0
    for batch in loader:
        parts.append(batch)
        count += len(batch[0])
        if count >= samples:
            break
    x, y = (torch.cat(list(each)) for each in zip(*parts, strict=True))
    return x[:samples], y[:samples]


def images(
    given: argparse.Namespace, learn: int, **options: Any
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training and test images with their classes."""
    data = HFImages(train_limit=learn, test_limit=given.samples, crop_padding=0, flip=False, **options)
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    return [loaded(data.train_dataloader(), learn), loaded(data.test_dataloader(), given.samples)]


def resnet20(given: argparse.Namespace, quant: str) -> Case:
    model = ResNet(20, 3, 10)
    model.load_state_dict(load_file(given.data / "pretrained" / "resnet20_cifar10.safetensors"))
    cifar = {"root": str(given.data / "cifar10"), "image_column": "img", "mean": MEAN, "std": STD}
    (learn, _), (test, _) = images(given, CALIBRATION, **cifar)
    return Case(model.eval(), (f"experiment=cifar10/resnet20_{quant}",), learn, test, "pretrained")


def chargpt(given: argparse.Namespace) -> Case:
    model = GPT()
    model.load_state_dict(load_file(given.data / "pretrained" / "chargpt_shakespeare.safetensors"))
    data = Text(str(given.data / "text" / "tinyshakespeare.txt"), block=64, batch_size=64)
    data.setup("fit")
    data.setup("test")
    learn, test = loaded(data.train_dataloader(), CALIBRATION)[0], loaded(data.test_dataloader(), given.samples)[0]
    return Case(model.eval(), ("experiment=shakespeare/chargpt_w8a8",), learn, test, "pretrained")


def trained(given: argparse.Namespace, model: nn.Module, scale: int) -> Case:
    """A classifier of Fashion-MNIST's images, 32x32 and three times the same channel, enlarged `scale` times."""
    grey = {"root": str(given.data / "fashion_mnist"), "mean": (0.286,) * 3, "std": (0.353,) * 3}
    (learn, classes), (test, answers) = images(given, max(CALIBRATION, given.steps * BATCH), **grey)
    learn, test = (F.interpolate(F.pad(x, (2, 2, 2, 2)), scale_factor=scale) for x in (learn, test))
    kept = Path.home() / ".cache" / "qat" / f"deploy-{type(model).__name__}-{given.steps}.safetensors"
    if kept.is_file():
        model.load_state_dict(load_file(kept))
    else:
        fit(model, learn, classes, given.steps)
        kept.parent.mkdir(parents=True, exist_ok=True)
        with atomic(kept) as temporary:
            save_file(model.state_dict(), temporary)
    with torch.no_grad():
        right = (model.eval()(test).argmax(1) == answers).float().mean()
    return Case(model, ("quant=w8a8",), learn[:CALIBRATION], test, f"{given.steps} steps, {right:.1%}")


def fit(model: nn.Module, inputs: Tensor, classes: Tensor, steps: int) -> None:
    """Trains a classifier, each batch of another part of the data."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps)
    model.train()
    for step in range(steps):
        rows = torch.arange(step * BATCH, (step + 1) * BATCH) % len(inputs)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(inputs[rows]), classes[rows])
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"{type(model).__name__}, step {step}: loss {loss:.3f}", flush=True)


CASES: dict[str, Callable[[argparse.Namespace], Case]] = {
    "ResNet-20 W8A8": lambda given: resnet20(given, "w8a8"),
    "ResNet-20 W4A4": lambda given: resnet20(given, "w4a4"),
    "MobileNetV2 W8A8": lambda given: trained(given, MobileNetV2(stride=32), 2),
    "ViT W8A8": lambda given: trained(given, ViT(), 1),
    "char GPT W8A8": chargpt,
}


# -- files -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def quantized(case: Case, engine: str | None) -> tuple[nn.Module, Plan]:
    """The fake-quantized model by the rules of an engine."""
    model, first = copy.deepcopy(case.model), case.learn[:2]
    policy = QuantPolicy.from_dict(settings(*case.quant) | {"engine": engine})
    plan, _ = make_plan(model, policy, lambda: model(first))
    apply_plan(model, plan)
    calibrate(model, lambda: [model(part) for part in case.learn.split(64)])
    return model.eval(), plan


def proven(target: Target, path: Path, prepared: nn.Module, expected: list[Tensor], test: Tensor) -> Verdict:
    """What `qat verify` checks, but for the metric and the search for the first layer that diverges."""
    verdict = Verdict()
    check_codes(verdict, prepared, target.codes(path))
    for optimize in (True, False) if target.optimizes else (True,):
        runner = target.load(path, prepared, optimize=optimize)
        if optimize:
            target.check_kernels(verdict, prepared, runner)
        comparison = Comparison()
        for y, x in zip(expected, test.split(len(expected[0])), strict=True):
            comparison.update(y.numpy(), runner(x.numpy()))
        note = "" if optimize else " without optimizations"
        check_outputs(verdict, comparison, target.min_agreement, target.max_mean_steps, note)
    return verdict


def measured(name: str, given: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """A row for every target."""
    torch.manual_seed(0)
    case = CASES[name](given)
    export_onnx(case.model, case.learn[:2], folder / "float.onnx")
    runners: dict[str, Any] = {"float": OnnxRunner(folder / "float.onnx", threads=1)}
    models: dict[str, Any] = {}
    rows: dict[str, dict[str, Any]] = {}
    for wanted in given.targets.split(","):
        row = rows[wanted] = {"model": name, "weights": case.weights, "target": wanted}
        try:
            target: Target = target_named(wanted, {})
            told = target.engine or "ort"
            if told not in models:
                fake, plan = quantized(case, told)
                with torch.no_grad():
                    models[told] = fake, plan, [fake(part) for part in case.test.split(32)]
            fake, plan, expected = models[told]
            prepared, path = target.prepared(fake, plan), folder / target.file
            target.export(prepared, plan, case.learn[:2], path)
            verdict = proven(target, path, prepared, expected, case.test)
            runners[wanted] = target.load(path, prepared, threads=1)
            row |= {"size": files_bytes(path) / files_bytes(folder / "float.onnx"), **verdict.to_dict()}
            row["products"] = expected_integer_nodes(prepared)
        except UserError as error:
            row["reason"] = str(error)
        print(
            name,
            wanted,
            row.get("reason") or [(c["name"], c["passed"], c["detail"]) for c in row["checks"]],
            flush=True,
        )
    if not given.seconds:
        return list(rows.values())
    x = case.test[:1].numpy()
    times = interleaved(runners, x, rounds_in(given.seconds, runners, x))
    for wanted in runners.keys() - {"float"}:
        rows[wanted] |= {f"p{q}": float(_ratio(times[wanted], times["float"], q)) for q in (10, 50)}
    return list(rows.values())


def _ratio(times: np.ndarray, base: np.ndarray, q: int) -> float:
    return np.percentile(times, q) / np.percentile(base, q)


def _key(row: dict[str, Any]) -> tuple[str, str]:
    return row["model"], row["target"]


# -- the table ---------------------------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> str:
    head = ["model", "weights", "target", "size", "latency", "fastest tenth", "agreement", "steps off, mean (most)"]
    head += ["integer nodes", "verified"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [row["model"], row["weights"], f"`{row['target']}`"]
        if "reason" in row:
            cells += ["-"] * 6 + [row["reason"]]
        else:
            nodes = "-" if "integer_nodes" not in row else f"{row['integer_nodes']} of {row['products']}"
            failed = [f"{check['name']}: {check['detail']}" for check in row["checks"] if not check["passed"]]
            cells += [f"{row['size']:.2f}x", *(f"{row[q]:.2f}x" if q in row else "-" for q in ("p50", "p10"))]
            cells.append(f"{row['agreement']:.2%}")
            cells += [f"{row['mean_deviation_steps']:.3f} ({row['max_deviation_steps']:.2f})", nodes]
            cells.append(f"no: {failed[0]}" if failed else "yes")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=", ".join(map(repr, CASES)))
    parser.add_argument("--targets", default="onnx,openvino,executorch,torch")
    parser.add_argument("--samples", type=int, default=256, help="test samples")
    parser.add_argument("--steps", type=int, default=400, help="of training where there are no trained weights")
    parser.add_argument("--seconds", type=float, default=10, help="of timing, for each model; 0 for none")
    given = parser.parse_args()
    if unknown := set(given.models) - CASES.keys():
        parser.error(f"no such model: {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    file = DOCS / "deploy.json"
    kept = {_key(row): row for row in json.loads(file.read_text())} if file.is_file() else {}
    for name in given.models or CASES:
        with tempfile.TemporaryDirectory() as folder:
            for row in measured(name, given, Path(folder)):
                times = (
                    {} if given.seconds else {k: v for k, v in kept.get(_key(row), {}).items() if k in ("p10", "p50")}
                )
                kept[_key(row)] = row | times
        rows = sorted(kept.values(), key=lambda row: list(CASES).index(row["model"]))
        with atomic(file) as temporary:
            temporary.write_text(json.dumps(rows, indent=1) + "\n")
        put("deploy-measured.md", "verified", table(rows))


if __name__ == "__main__":
    main()
