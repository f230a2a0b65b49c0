"""How far insertion reaches in models that nobody wrote for it: docs/coverage.md, one row for each model of `zoo`.

    python benchmarks/coverage.py [NAME ...] [--out docs/coverage.md]

`measure` does it for one model; tests/test_transformers.py asserts on the same numbers.
"""

import argparse
import copy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import zoo
from scale_gradients import scale_gradients, tensors
from torch import Tensor, nn

from qat.calibrate import calibrate
from qat.files import atomic
from qat.insert import apply_plan
from qat.planning.audit import AuditRow, audit, coverage
from qat.planning.plan import Plan
from qat.planning.planner import make_plan
from qat.policies.policy import QuantPolicy

POLICY = {"weight": {"bits": 8, "granularity": "channel"}, "act": {"bits": 8}, "kinds": "all"}
"""Of configs/quant/integer_only.yaml: every layer, and every function between them."""
MORE_BREAKS = {
    "DETR": "its encoder's layers look at their data in training and break in float, too; transformers wraps the twin "
    "of such a layer once more (for gradient checkpointing), and a break counts in every wrapper that it passes"
}
FINE = {role: {"bits": 16, "range": "minmax", **POLICY[role]} | {"bits": 16} for role in ("weight", "act")}


@dataclass(frozen=True)
class Row:
    """What was measured of one model.

    Attributes:
        macs, params: Shares on integers, of multiply-accumulates and of parameters.
        gaps: What multiplies and stays float, with the reason.
        layers, sites: How many are quantized.
        scales: How many learned scales there are.
        still: Those that one training step gives no gradient, and why.
        wrong: Those whose gradient is not its closed form.
        error: Largest difference of the outputs with 16-bit grids, relative to the largest output.
        breaks, breaks_in_training: Graph breaks of `torch.compile`, of the float and of the quantized model.
        compiled: Whether the compiled model computes what the eager one does, in both modes.
        reloads: Whether a state_dict brings a new model to the same outputs, bit for bit.
        kept: Share of the float model's state_dict keys that the quantized one has.
    """

    name: str
    macs: float
    params: float
    gaps: list[str]
    layers: int
    sites: int
    scales: int
    still: list[str]
    wrong: list[str]
    error: float
    breaks: tuple[int, int]
    breaks_in_training: tuple[int, int]
    compiled: bool
    reloads: bool
    kept: float


def measure(name: str) -> Row:
    """Everything of one model; seconds on one core, most of them for `torch.compile`."""
    model, inputs = zoo.build(name)
    before = model.state_dict().keys()
    float_breaks = [traced(model, inputs, train)[0] for train in (False, True)]
    plan, rows = quantize(model, inputs, POLICY)
    macs, params = coverage(rows)
    kept = len(before & model.state_dict().keys()) / len(before)
    breaks, results = zip(*(traced(model, inputs, train) for train in (False, True)), strict=True)
    expected = outputs(model, inputs), outputs(copy.deepcopy(model), inputs, train=True)
    scales = scale_gradients(model, inputs)
    return Row(
        name=name,
        macs=macs,
        params=params,
        gaps=gaps(rows),
        layers=len(plan.layers),
        sites=len(plan.sites),
        scales=len(scales),
        still=[f"{s.name}: {s.why}" for s in scales if s.still],
        wrong=[s.name for s in scales if not s.agrees or (s.still and s.why is None)],
        error=fine_error(name),
        breaks=(float_breaks[0], breaks[0]),
        breaks_in_training=(float_breaks[1], breaks[1]),
        compiled=all(same(a, b, 1e-4) for a, b in zip(expected, results, strict=True)),
        reloads=same(outputs(model, inputs), reloaded(name, plan, model, inputs), 0),
        kept=kept,
    )


def gaps(rows: list[AuditRow]) -> list[str]:
    """What multiplies and accumulates in float, and why."""
    return [f"{r.name}: {r.reason}" for r in rows if r.macs > r.integer_macs and not r.folds]


def quantize(model: nn.Module, inputs: zoo.Inputs, policy: dict[str, Any]) -> tuple[Plan, list[AuditRow]]:
    """Inserts and calibrates in place."""
    plan, recording = make_plan(model, QuantPolicy.from_dict(policy), lambda: model(**inputs))
    apply_plan(model, plan)
    calibrate(model, lambda: model(**inputs))
    return plan, audit(model, plan, recording)


@torch.no_grad()
def outputs(model: nn.Module, inputs: zoo.Inputs, train: bool = False) -> list[Tensor]:
    return list(tensors(model.train(train)(**inputs)))


def traced(model: nn.Module, inputs: zoo.Inputs, train: bool = False) -> tuple[int, list[Tensor]]:
    """Compiles as far as the graph, which is where a model breaks; in training mode with gradients, on a copy.

    Returns:
        The number of breaks, and the outputs of the graphs.
    """
    torch._dynamo.reset()
    breaks = torch._dynamo.utils.counters["graph_break"]
    breaks.clear()
    compiled = torch.compile((copy.deepcopy(model) if train else model).train(train), backend=_as_it_is)
    with torch.set_grad_enabled(train):
        result = [t.detach() for t in tensors(compiled(**inputs))]
    return sum(breaks.values()), result


def _as_it_is(graph: torch.fx.GraphModule, _: Any) -> Any:
    """A backend that runs the graph, out of sight of the modes that were active when it was made: they are in it."""

    def run(*args: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return graph.forward(*args)

    return run


def fine_error(name: str) -> float:
    model, inputs = zoo.build(name)
    before = outputs(model, inputs)
    quantize(model, inputs, {**POLICY, **FINE})
    after = outputs(model, inputs)
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(before, after, strict=True))


def reloaded(name: str, plan: Plan, model: nn.Module, inputs: zoo.Inputs) -> list[Tensor]:
    """The outputs of a new model, after the state of this one, and the plan as a checkpoint keeps it."""
    other, _ = zoo.build(name)
    apply_plan(other, Plan.from_dict(copy.deepcopy(plan.to_dict())))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    other.load_state_dict(model.state_dict())
    return outputs(other, inputs)


def same(a: list[Tensor], b: list[Tensor], tolerance: float) -> bool:
    """Whether they differ by no more than a share of the largest value."""
    pairs = zip(a, b, strict=True)
    return all(float((x - y).abs().max()) <= tolerance * float(x.abs().max()) for x, y in pairs)


HEAD = """# Coverage

Models of `transformers` (VERSION), built from configs with random weights, as `python benchmarks/coverage.py --out
docs/coverage.md` finds them under `quant=integer_only`: every layer and every function between layers on 8-bit grids.
Nothing in them knows of quantization. tests/test_transformers.py asserts what the table shows (graph breaks,
which take minutes, of most).

- *MACs*, *parameters*: shares on integers. Float parameters are those of norms, position tables and the like; what
  multiplies in float is named below the table.
- *scales (still)*: learned scales. The gradient that a training step gives each is its closed form, in every channel;
  *still* ones have none, for the reason below the table.
- *16-bit error*: largest difference from the float model's outputs, relative to the largest, with 16-bit grids.
- *graph breaks*: of `torch.compile` in evaluation and in training, beside the float model's in parentheses; 0 is
  `fullgraph=True`.
- *reload*: whether a new model that loads the plan and the state_dict gives the same bits.
- *keys*: share of the float state_dict's keys that are still there.

"""


def table(rows: list[Row]) -> str:
    """In Markdown."""
    lines = [
        "| model | MACs | parameters | layers + sites | scales (still) | 16-bit error | graph breaks | reload | keys |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        reload = "same" if r.reloads else "DIFFERENT"
        lines.append(
            f"| {r.name} | {r.macs:.2%} | {r.params:.1%} | {r.layers} + {r.sites} | {r.scales} ({len(r.still)}) | "
            f"{r.error:.1e} | {_breaks(r.breaks)}, {_breaks(r.breaks_in_training)} | {reload} | {r.kept:.0%} |"
        )
    gaps = [f"- {r.name}: {gap}" for r in rows for gap in r.gaps] or ["None."]
    still = [f"- {r.name}: {scale}" for r in rows for scale in r.still] or ["None."]
    more = [
        f"- {r.name}: {MORE_BREAKS.get(r.name, 'not known')}"
        for r in rows
        if r.breaks[1] > r.breaks[0] or r.breaks_in_training[1] > r.breaks_in_training[0]
    ] or ["None."]
    titles = "Multiply-accumulates in float:", "Scales without a gradient:", "More graph breaks than in float:"
    sections = (part for pair in zip(titles, (gaps, still, more), strict=True) for part in pair)
    return "\n".join([*lines, *(f"\n{s}\n" if isinstance(s, str) else "\n".join(s) for s in sections)]) + "\n"


def _breaks(pair: tuple[int, int]) -> str:
    return f"{pair[1]} ({pair[0]})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(zoo.MODELS)}; all of them by default")
    parser.add_argument("--out", type=Path, help="the file to write, beside printing")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for name in given.names or zoo.MODELS:
        found.append(measure(name))
        print(name, f"wrong: {found[-1].wrong}, compiled: {found[-1].compiled}", file=sys.stderr)
    print(table(found))
    if given.out:
        with atomic(given.out) as temporary:
            temporary.write_text(HEAD.replace("VERSION", transformers.__version__) + table(found))


if __name__ == "__main__":
    main()
