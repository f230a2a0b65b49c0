"""How far insertion reaches in models that nobody wrote for it: docs/coverage.md, one row for each model of `zoo`.

    python benchmarks/coverage.py [NAME ...] [--out docs/coverage.md]

`measure` does it for one model; tests/test_transformers.py asserts on the same numbers.
"""

import argparse
import copy
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
import zoo
from torch import Tensor, nn

from qat.audit import AuditRow, audit, coverage
from qat.calibrate import calibrate
from qat.export.files import atomic
from qat.functions import flat
from qat.insert import Plan, apply_plan, make_plan, named_quantizers
from qat.policy import QuantPolicy

POLICY = {"weight": {"bits": 8, "granularity": "channel"}, "act": {"bits": 8}, "kinds": "all"}
"""Of configs/quant/integer_only.yaml: every layer, and every function between them."""
FINE = {role: {"bits": 16, "range": "minmax", **POLICY[role]} | {"bits": 16} for role in ("weight", "act")}


@dataclass(frozen=True)
class Row:
    """What was measured of one model.

    Attributes:
        macs, params: Shares on integers, of multiply-accumulates and of parameters.
        gaps: What multiplies and stays float, with the reason.
        layers, sites: How many are quantized.
        scales: How many learned scales there are.
        dead, idle: Those that one training step gives no gradient; see `dead_scales`.
        error: Largest difference of the outputs with 16-bit grids, relative to the largest output.
        breaks: Graph breaks of `torch.compile`, of the float and of the quantized model.
        compiled: Whether the compiled model computes what the eager one does.
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
    dead: list[str]
    idle: list[str]
    error: float
    breaks: tuple[int, int]
    compiled: bool
    reloads: bool
    kept: float


def measure(name: str) -> Row:
    """Everything of one model; seconds on one core, most of them for `torch.compile`."""
    model, inputs = zoo.build(name)
    before = model.state_dict().keys()
    float_breaks, _ = traced(model, inputs)
    plan, rows = quantize(model, inputs, POLICY)
    macs, params = coverage(rows)
    kept = len(before & model.state_dict().keys()) / len(before)
    expected = outputs(model, inputs)  # before the training step, which moves the statistics of BatchNorms
    breaks, compiled = traced(model, inputs)
    scales, dead, idle = dead_scales(model, inputs)
    return Row(
        name=name,
        macs=macs,
        params=params,
        gaps=gaps(rows),
        layers=len(plan.layers),
        sites=len(plan.sites),
        scales=scales,
        dead=dead,
        idle=idle,
        error=fine_error(name),
        breaks=(float_breaks, breaks),
        compiled=same(expected, compiled, 1e-4),
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


def tensors(output: Any) -> Iterator[Tensor]:
    """The float tensors of a model's output; a cache of keys and values is none of it."""
    values = output.values() if isinstance(output, dict) else output
    return (t for t in flat(values) if isinstance(t, Tensor) and t.is_floating_point())


@torch.no_grad()
def outputs(model: nn.Module, inputs: zoo.Inputs) -> list[Tensor]:
    return list(tensors(model.eval()(**inputs)))


def traced(model: nn.Module, inputs: zoo.Inputs) -> tuple[int, list[Tensor]]:
    """Compiles as far as the graph, which is where a model breaks.

    Returns:
        The number of breaks, and the outputs of the graphs.
    """
    torch._dynamo.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        result = list(tensors(torch.compile(model.eval(), backend=backend)(**inputs)))
    return len(graphs) - 1, result


def dead_scales(model: nn.Module, inputs: zoo.Inputs) -> tuple[int, list[str], list[str]]:
    """One backward pass in training mode.

    Returns:
        How many learned scales there are; the names of the *dead*, whose gradient is missing, zero or not finite though
        their tensor is rounded and has a gradient itself, or that did not act at all; and of the *idle*, whose tensor
        lies on its grid as it is (the zeros and ones of a mask), or has no gradient in the float model either.
    """
    learned = {n: q for n, q in named_quantizers(model) if isinstance(q.scale, nn.Parameter)}
    rounded: dict[str, list[tuple[bool, Tensor]]] = {name: [] for name in learned}
    hooks = [q.register_forward_hook(partial(_note, rounded[name])) for name, q in learned.items()]
    generator = torch.Generator().manual_seed(0)
    model.train().zero_grad()
    results = [t for t in tensors(model(**inputs)) if t.requires_grad]
    sum((t * torch.randn(t.shape, generator=generator)).sum() for t in results).backward()  # pyright: ignore
    for hook in hooks:
        hook.remove()
    grads = {name: q.scale.grad for name, q in learned.items()}
    still = [name for name, grad in grads.items() if grad is None or not grad.isfinite().all() or not grad.any()]
    active = {
        n for n in still if not rounded[n] or any(r and y.grad is not None and y.grad.any() for r, y in rounded[n])
    }
    return len(learned), [n for n in still if n in active], [n for n in still if n not in active]


def _note(seen: list[tuple[bool, Tensor]], _: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
    if output.requires_grad:
        output.retain_grad()
    seen.append((bool((output != args[0]).any()), output))


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
Nothing in them knows of quantization. tests/test_transformers.py asserts what the table shows.

- *MACs*, *parameters*: shares on integers. Float parameters are those of norms, position tables and the like; what
  multiplies in float is named below the table.
- *scales (idle, dead)*: learned scales. *Dead* ones get no gradient from a training step though their tensor is rounded
  and has one; *idle* ones have a tensor that lies on its grid exactly (the scalar `logit_scale`), or that has no
  gradient in the float model either.
- *16-bit error*: largest difference from the float model's outputs, relative to the largest, with 16-bit grids.
- *graph breaks*: of `torch.compile`, beside the float model's in parentheses; 0 is `fullgraph=True`.
- *reload*: whether a new model that loads the plan and the state_dict gives the same bits.
- *keys*: share of the float state_dict's keys that are still there.

"""


def table(rows: list[Row]) -> str:
    """In Markdown."""
    lines = [
        "| model | MACs | parameters | layers + sites | scales (idle, dead) | 16-bit error | graph breaks | reload | "
        "keys |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        reload = "same" if r.reloads else "DIFFERENT"
        lines.append(
            f"| {r.name} | {r.macs:.2%} | {r.params:.1%} | {r.layers} + {r.sites} | {r.scales} ({len(r.idle)}, "
            f"{len(r.dead)}) | {r.error:.1e} | {r.breaks[1]} ({r.breaks[0]}) | {reload} | {r.kept:.0%} |"
        )
    named = [f"- {r.name}: {gap}" for r in rows for gap in r.gaps] or ["None."]
    return "\n".join([*lines, "", "Multiply-accumulates in float:", "", *named]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(zoo.MODELS)}; all of them by default")
    parser.add_argument("--out", type=Path, help="the file to write, beside printing")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for name in given.names or zoo.MODELS:
        found.append(measure(name))
        print(name, f"dead: {found[-1].dead}, idle: {found[-1].idle}, compiled: {found[-1].compiled}", file=sys.stderr)
    print(table(found))
    if given.out:
        with atomic(given.out) as temporary:
            temporary.write_text(HEAD.replace("VERSION", transformers.__version__) + table(found))


if __name__ == "__main__":
    main()
