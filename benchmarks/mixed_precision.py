"""Uniform against searched and learned bit-widths at one fine-tuning budget: docs/results.md.

    python benchmarks/mixed_precision.py fashion OUT_DIR --data FASHION_MNIST_DIR [--write]
    python benchmarks/mixed_precision.py digits OUT_DIR [--write]

One float model is shared by all. Each budget is what a uniform preset takes (bytes of packed integers, bit operations);
`qat search` and `callbacks=learn_bits` get both as limits, so that what they choose is no larger and needs no more
arithmetic. Then everything is trained for the same steps with the same seeds. Killed and started again, it goes on.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from pages import put

from qat.cli import main as qat
from qat.sweep.results import Result, read_sweep

UNIFORM = {"w3a4": (3, 4), "w3a3": (3, 3), "w2a4": (2, 4)}
"""Bits of weights and of their inputs in all layers but the first and the last, which have 8."""
BASE = "w4a4"
"""The preset that choices start from: its grids, whatever their bits."""
FEWEST = 2
"""Bits that a weight may have at least."""
HEADER = 64
"""Bytes by which headers of equal content may differ (names of widths)."""
SEEDS = (0, 1, 2)
KINDS = ("uniform", "searched", "learned")


@dataclass(frozen=True)
class Task:
    """A model on data.

    Attributes:
        title: For the table.
        common: Of every command.
        starting: Of float training.
        tuning: Of fine-tuning.
    """

    title: str
    common: Sequence[str]
    starting: Sequence[str]
    tuning: Sequence[str]


TASKS = {
    "fashion": Task(
        "ResNet-20 on Fashion-MNIST: two epochs in float, 40 steps of 128 images of fine-tuning, 5,000 test images",
        ["model=resnet20", "model.in_channels=1", "data=fashion_mnist", "data.val_limit=1000", "data.test_limit=5000"],
        ["float_epochs=2", "trainer.precision=bf16-mixed"],
        ["trainer.max_epochs=1", "data.train_limit=5120", "model.lr=0.01"],
    ),
    "digits": Task(
        "The default CNN on digits: ten epochs in float, five of fine-tuning", [], [], ["trainer.max_epochs=5"]
    ),
}
HEAD = """    python benchmarks/mixed_precision.py ARGUMENTS --write

TITLE; float FLOAT. Mean over seeds 0 to 2, and range. *Uniform*: first and last layer at 8 bits.
*Searched* and *learned*: what `qat search` and `callbacks=learn_bits` choose with the uniform model's packed size and
bit operations as limits.

| budget | bits | packed | bit operations | PTQ | fine-tuned | range | average bits |
|---|---|---|---|---|---|---|---|
"""


def check(status: int) -> None:
    """Ends where a command did not end well."""
    if status:
        raise SystemExit(status)


class Comparison:
    """The stages, each skipped if an earlier call has finished it."""

    def __init__(self, task: Task, data: Path | None, out: Path) -> None:
        self.task, self.out = task, out.absolute()
        self.quant = self.out / "configs" / "quant"
        root = [] if data is None else [f"data.root='{data.absolute()}'"]
        self.common = [*task.common, *root, "trainer.enable_progress_bar=false"]
        self.quant.mkdir(parents=True, exist_ok=True)

    @property
    def start(self) -> list[str]:
        folder = str(self.quant.parent)
        return [*self.common, f"ckpt='{self.out / 'float' / 'float.safetensors'}'", "--config-dir", folder]

    def train_float(self) -> float:
        """The metric of the float model."""
        if not (self.out / "float" / "report.json").is_file():
            words = ["quant=off", *self.task.starting, f"run_dir='{self.out / 'float'}'"]
            check(qat(["train", *self.common, *words]))
        return read_sweep(self.out / "float").results[0].values["metric"]

    def sweep(self, kind: str, names: Sequence[str]) -> dict[str, list[Result]]:
        """Fine-tunes configs with every seed; the runs of each."""
        swept = [f"quant={','.join(names)}", f"seed={','.join(map(str, SEEDS))}", "export=none"]
        places = [f"sweep.dir='{self.out / kind}'", f"cache_dir='{self.out / 'cache'}'"]
        check(qat(["train", "-m", *self.start, *self.task.tuning, *swept, *places]))
        results = read_sweep(self.out / kind).results
        return {name: [r for r in results if r.params["quant"] == name] for name in names}

    def uniform(self) -> dict[str, list[Result]]:
        for name, (weight, act) in UNIFORM.items():
            text = f"defaults: [{BASE}, _self_]\nweight: {{bits: {weight}}}\nact: {{bits: {act}}}\n"
            (self.quant / f"uniform_{name}.yaml").write_text(text)
        runs = self.sweep("uniform", [f"uniform_{name}" for name in UNIFORM])
        return {name: runs[f"uniform_{name}"] for name in UNIFORM}

    def search(self, limits: Mapping[str, float], path: Path) -> None:
        words = [f"{cost}={limit:.0f}" for cost, limit in limits.items()]
        words += [f"quant={BASE}", "search.probes=0", f"search.dir='{self.out / 'search'}'", f"search.output='{path}'"]
        check(qat(["search", *self.start, *words]))

    def learn(self, limits: Mapping[str, float], path: Path) -> None:
        """As many steps as one fine-tuning; the model that comes of them is not used."""
        key = "callbacks.learn_bits"
        words = [f"{key}.budget.{cost}={limit:.0f}" for cost, limit in limits.items()]
        words += [f"{key}.budget.avg_bits=null", f"{key}.lr=0.1", f"{key}.until=0.9", f"{key}.output='{path}'"]
        places = [f"cache_dir='{self.out / 'cache'}'", f"run_dir='{self.out / path.stem}'", "export=none"]
        check(qat(["train", *self.start, *self.task.tuning, f"quant={BASE}", "callbacks=learn_bits", *words, *places]))

    def chosen(self, kind: str, budgets: Mapping[str, Sequence[Result]]) -> dict[str, list[Result]]:
        """The models whose bits were chosen within what each uniform one takes."""
        for name, runs in budgets.items():
            path = self.quant / f"{kind}_{name}.yaml"
            if not path.is_file():
                limits = {cost: runs[0].values[cost] for cost in ("packed", "bops")}
                limits["packed"] -= HEADER if UNIFORM[name][0] > FEWEST else 0
                (self.search if kind == "searched" else self.learn)(limits, path)
        runs = self.sweep(kind, [f"{kind}_{name}" for name in budgets])
        return {name: runs[f"{kind}_{name}"] for name in budgets}


def row(budget: str, kind: str, runs: Sequence[Result]) -> str:
    """One line of the table."""
    final = [r.values["metric"] for r in runs]
    ptq = mean(r.report["stages"]["ptq"]["metric"] for r in runs)
    packed, bops, average = (max(r.values[name] for r in runs) for name in ("packed", "bops", "avg_bits"))
    cells = [budget.upper(), kind, f"{packed / 1000:.2f} kB", f"{bops / 1e6:.2f} M", f"{ptq:.4f}", f"{mean(final):.4f}"]
    return f"| {' | '.join([*cells, f'{min(final):.4f} to {max(final):.4f}', f'{average:.2f}'])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--kinds", nargs="+", choices=KINDS[1:], default=KINDS[1:])
    parser.add_argument("--write", action="store_true", help="into docs/results.md")
    given = parser.parse_args()
    this = Comparison(TASKS[given.task], given.data, given.folder)
    reference = this.train_float()
    found = {"uniform": this.uniform()}
    found |= {kind: this.chosen(kind, found["uniform"]) for kind in given.kinds}
    lines = [row(name, kind, runs[name]) for name in UNIFORM for kind, runs in found.items()]
    kinds = "" if list(given.kinds) == list(KINDS[1:]) else f" --kinds {' '.join(given.kinds)}"
    arguments = f"{given.task} OUT_DIR" + (" --data DIR" if given.data else "") + kinds
    head = HEAD.replace("ARGUMENTS", arguments).replace("TITLE", this.task.title).replace("FLOAT", f"{reference:.4f}")
    text = head + "\n".join(lines)
    print(text)
    if given.write:
        put("results.md", f"mixed precision: {given.task}", text)


if __name__ == "__main__":
    main()
