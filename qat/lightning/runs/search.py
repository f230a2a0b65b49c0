"""`qat sensitivity` and `qat search`: from a config to the float model, what is measured of it, and the chosen bits.

The folder keeps the float model (`float.safetensors`, as of a run), `sensitivity.json`, `latency.json` and pictures;
the same command finds it again and measures only what is missing.
"""

import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf
from rich.progress import Progress
from torch import nn

from qat.calibrate import calibrated
from qat.config.instantiate import instantiate
from qat.convert import conversion_refusal, convert
from qat.errors import UserError
from qat.export.onnx.export import export_onnx
from qat.export.packed import packed_bytes
from qat.files import make_folder, read_object, write_object
from qat.lightning.losses import BatchLosses
from qat.lightning.runs.checks import check
from qat.lightning.runs.float_cache import float_key
from qat.lightning.runs.float_stage import float_stage
from qat.lightning.runs.quiet import calm
from qat.lightning.runs.workspace import Workspace
from qat.lightning.steps import example_input, run_steps
from qat.measure.cost import COSTS
from qat.modes import evaluating
from qat.planning.plan import Plan
from qat.planning.planner import make_plan
from qat.report.search import front_table, save_front, save_sensitivity, search_table, sensitivity_table
from qat.run_files import PROGRESS
from qat.search.allocate import Problem, solve
from qat.search.costs import Files, Latencies, make_problem, predict
from qat.search.emit import outputs, trained_by, write
from qat.search.front import pareto_choices
from qat.search.latency import layer_latencies
from qat.search.measured import Measured
from qat.search.sensitivity import mean_loss, measure, missing
from qat.search.settings import Search
from qat.search.space import Pair, Space, kept_bits, make_space, with_bits


def search_key(cfg: DictConfig) -> str:
    """A hash of everything that sensitivities follow from."""
    parts = [float_key(cfg), OmegaConf.to_container(cfg.quant, resolve=True), cfg.search.samples]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]


def folder_of(cfg: DictConfig) -> Path:
    """Where to measure: `search.dir`, or a folder named after `search_key(cfg)`."""
    return Path(cfg.search.dir or f"logs/{cfg.name}/search/{search_key(cfg)}").absolute()


class SearchRun(Workspace):
    """The stages, on top of a run's own float stage."""

    def __init__(
        self, cfg: DictConfig, folder: Path, command: str, overrides: Sequence[str], config_dir: str | None
    ) -> None:
        self.measured = Measured(folder / "sensitivity.json", search_key(cfg))
        if (folder / PROGRESS).is_file():
            cfg.ckpt = "last"
        super().__init__(cfg, folder)
        self.callbacks = {}  # they are for training, which a search does not
        self.command, self.overrides, self.config_dir = command, overrides, config_dir
        self.settings: Search = instantiate(cfg.search)
        if self.policy.is_off:
            raise UserError("quant=off leaves everything float: a search starts from a quant that says which grids")
        front_points = None if self.settings.front is None else self.settings.points or 1
        if self.settings.output is not None:
            outputs(self.settings.output, front_points)

    def space(self) -> Space:
        run = run_steps(self.module, self.data.train_dataloader, samples=1)
        return make_space(self.module, self.policy, self.settings, run)

    def sensitivities(self, space: Space, by_loss: BatchLosses) -> Measured:
        """Measures what is not yet known, and shows it."""
        self.console.print("Sensitivity", style="bold")
        measured = self.measured
        probes = self.settings.probes
        shown = self.main and bool(self.cfg.trainer.get("enable_progress_bar", True))
        with Progress(console=self.console, transient=True, disable=not shown) as progress:
            task = progress.add_task("Measuring", total=missing(space, measured, probes))
            measure(space, measured, by_loss, probes, lambda: progress.advance(task))
        self.console.print(sensitivity_table(space, measured, self.console.width), crop=False)
        if space.parts:
            self.console.print(f"Not chosen: {kept_bits(space.parts)}", highlight=False)
        save_sensitivity(space, measured, self.folder / "sensitivity.png")
        return measured

    def problem(self, space: Space, measured: Measured, losses: BatchLosses) -> Problem:
        """The integer program; files are made only for the costs that are asked for."""
        wanted, files, widths = self.settings.costs, Files(), list(space.plans)
        if reason := conversion_refusal(space.plans[widths[-1]]):
            if limits := sorted(name for name in wanted if COSTS[name].needs != "shapes"):
                raise UserError(f"{limits[0]}: there is no integer form of this quant: {reason}; avg_bits and bops do")
        else:
            for width in {widths[0], widths[-1]}:
                made = self._weigh(space.plans[width], losses, exported="size" in wanted)
                files.packed[width] = made["packed"]
                if "size" in made:
                    files.size[width] = made["size"]
        latencies = self._latencies(space, losses) if "latency" in wanted else None
        return make_problem(space, measured, self.settings.by, files, latencies)

    def _converted(self, plan: Plan, losses: BatchLosses) -> nn.Module:
        return convert(calibrated(self.module, plan, lambda model: [None for _ in losses(model)]), plan)

    def _weigh(self, plan: Plan, losses: BatchLosses, exported: bool) -> dict[str, int]:
        """Bytes of the files that a plan makes of the float model."""
        integers = self._converted(plan, losses)
        sizes = {"packed": packed_bytes(integers, plan)}
        if exported:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "model.onnx"
                export_onnx(integers, example_input(self.module, self.data.train_dataloader), path)
                sizes["size"] = path.stat().st_size
        return sizes

    def _latencies(self, space: Space, losses: BatchLosses) -> Latencies:
        """Every pair in use, in a file of its own in which all layers have it (or of theirs the nearest)."""
        path, repeats = self.folder / "latency.json", self.settings.repeats
        known: dict[str, Any] = read_object(path) if path.is_file() else {}
        pairs = list(dict.fromkeys(pair for layer in space.layers for pair in layer.options))
        for pair in pairs:
            label = f"{pair[0]}x{pair[1]}"
            if known.get(label, {}).get("repeats") != repeats:
                self.console.print(f"Latency at {label}", style="dim")
                known[label] = self._measure_pair(space, pair, losses)
                write_object(path, known)
        at = {pair: known[f"{pair[0]}x{pair[1]}"] for pair in pairs}
        table = {(layer.name, p): at[p]["layers"][layer.name] for layer in space.layers for p in layer.options}
        return Latencies(table, sum(entry["rest"] for entry in at.values()) / len(at))

    def _measure_pair(self, space: Space, pair: Pair, losses: BatchLosses) -> dict[str, Any]:
        everywhere = {layer.name: (pair[0], pair[1] if layer.act else None) for layer in space.layers}
        plan = self._plan(space, everywhere)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            export_onnx(self._converted(plan, losses), example_input(self.module, self.data.train_dataloader), path)
            times, rest = layer_latencies(path, list(everywhere), self.settings.repeats)
        return {"layers": times, "rest": rest, "repeats": self.settings.repeats}

    def _plan(self, space: Space, choice: dict[str, Pair]) -> Plan:
        acts = {name: a for name, (_, a) in choice.items() if a is not None}
        policy = with_bits(space.policy, {name: w for name, (w, _) in choice.items()}, acts)
        return make_plan(self.module, policy, run_steps(self.module, self.data.train_dataloader, samples=1))[0]

    def choose(self, space: Space, problem: Problem, losses: BatchLosses) -> list[dict[str, Pair]]:
        """Solves, shows and writes: one allocation, or those of the front from the cheapest on."""
        settings = self.settings
        if settings.front is None:
            choices = [solve(problem, settings.budget)]
            self.console.print(search_table(space, problem, choices[0], settings.budget))
            self.console.print(self._losses(space, problem, choices[0], losses), highlight=False)
        else:
            choices = pareto_choices(problem, settings.front, settings.budget, settings.points)
            self.console.print(front_table(problem, choices))
            save_front(problem, choices, settings.front, settings.by, self.folder / "front.png")
        self._write(space, problem, choices)
        return choices

    def _losses(self, space: Space, problem: Problem, choice: dict[str, Pair], losses: BatchLosses) -> str:
        """A line with the predicted loss, one grid at a time, beside that of all together before any training."""
        before = self.measured.loss or 0.0
        model = calibrated(self.module, self._plan(space, choice), lambda model: mean_loss(model, losses))
        with evaluating(model):
            after = mean_loss(model, losses)
        harm = problem.total_harm(choice)
        predicted = "" if self.settings.by == "sqnr" else f"predicted {before + harm:.5g}, "
        return f"loss before training: float {before:.5g}, {predicted}measured {after:.5g}"

    def _write(self, space: Space, problem: Problem, choices: list[dict[str, Pair]]) -> None:
        settings = self.settings
        other = {key: self.cfg.quant[key] for key in ("calibration_samples", "scale_lr") if key in self.cfg.quant}
        other["module"] = None  # the policy itself says whose it is
        content = [{"costs": predict(problem, c), "harm": problem.total_harm(c), "pairs": c} for c in choices]
        self.write_json("search.json", {"by": settings.by, "budget": settings.budget, "choices": content})
        if settings.output is None:
            self.console.print("search.output=configs/quant/NAME.yaml writes it as a config to train with", style="dim")
            return
        paths = outputs(settings.output, None if settings.front is None else len(choices))
        for path, choice, entry in zip(paths, choices, content, strict=True):
            training = trained_by(path, self.overrides, self.config_dir)
            write(path, space.policy, choice, entry["costs"], other, self.command, training)
            self.console.print(f"wrote {path}: {training}", highlight=False, markup=False, soft_wrap=True)


def search(
    cfg: DictConfig,
    folder: Path,
    command: str,
    overrides: Sequence[str] = (),
    config_dir: str | None = None,
    only_measure: bool = False,
) -> None:
    """Measures, and chooses unless told not to.

    Args:
        cfg: The composed and resolved config, with its `search`.
        folder: From `folder_of`.
        command: The command line, for what is written.
        overrides: Those in it that training takes as well.
        config_dir: Its folder of further configs, if any.
        only_measure: Whether to stop after the sensitivities.

    Raises:
        UserError: for mistakes in the config, and for budgets that cannot be met.
    """
    with calm():
        pl.seed_everything(cfg.seed, workers=True, verbose=False)
        run = SearchRun(cfg, folder, command, overrides, config_dir)
        if not only_measure and not run.settings.costs:
            raise UserError("say what bits may cost: qat search packed=60kB (or size, avg_bits, bops, latency), "
                            "or search.front=packed")  # fmt: skip
        check(run)
        run.space()  # a pattern that matches nothing is found before the float model is trained
        mean_loss(run.module, BatchLosses(run.data.train_dataloader, samples=1))  # and so is a step without a loss
        if run.settings.output is not None:
            make_folder(Path(run.settings.output).parent, "search.output")
        run.progress.save()
        float_stage(run)
        losses = BatchLosses(run.data.train_dataloader, run.settings.samples)
        space = run.space()
        measured = run.sensitivities(space, losses)
        if not only_measure:
            run.choose(space, run.problem(space, measured, losses), losses)
        run.console.print(f"in {folder}", style="dim", highlight=False, soft_wrap=True)
