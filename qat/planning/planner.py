"""Planning: a float model and a policy become a `Plan`, from one recorded forward pass; `qat.insert` carries it out.

A quantizer belongs to a *tensor*. All integer readers of a tensor share one quantizer where their specs agree. Where
they differ (a residual add at 8 bits beside a convolution at 4), the coarser reader reads what the finest grid left of
the tensor, as an integer engine does, which stores it once.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from qat.errors import UserError
from qat.layers import sites_changed
from qat.planning.addressable import CONVOLUTIONS, check_shapes_known, has_weight, is_norm, type_of
from qat.planning.decisions import Decisions, decide
from qat.planning.edges import activation_grids
from qat.planning.functions import ELEMENTWISE
from qat.planning.plan import Plan, SiteOperand, kind_of, owner_of
from qat.planning.probe import record
from qat.planning.recording import Recording
from qat.planning.weights import plan_weights
from qat.policies.engines import engine_of
from qat.policies.networks import Policy


def make_plan(model: nn.Module, policy: Policy, run: Callable[[], Any]) -> tuple[Plan, Recording]:
    """Decides every grid from one pass of `run()` (see `probe.record`); the model is left as it is.

    Raises:
        UserError: if a rule matches nothing or nothing can be quantized.
    """
    recording = record(model, run)
    check_shapes_known(model)
    _check_names(model, recording)
    decisions = decide(model, policy, recording)
    plan = Plan(policy=policy.settings, engine=policy.engine, round_bias=policy.round_bias)
    plan_weights(plan, decisions)
    plan.batch_norms = _batch_norms(plan, recording)
    plan.residuals = _residuals(plan, decisions)
    _plan_activations(plan, decisions, joined=policy.concat == "shared")
    _check_groups(plan, decisions)
    plan.operands = _parameter_operands(plan, decisions)
    plan.owners = _owners(plan, decisions)
    if not plan.weights and not plan.activations:
        raise UserError(
            "the policy leaves everything float: give quant.weight or quant.act settings, or a rule that does"
        )
    return plan, recording


def _check_names(model: nn.Module, recording: Recording) -> None:
    for site in [call.site for call in recording.functions if call.site]:
        owner, _, leaf = site.rpartition(".")
        if hasattr(model.get_submodule(owner), leaf):
            raise UserError(f"'{site}' names a functional site, but the model has an attribute of that name: rename it")


def _batch_norms(plan: Plan, recording: Recording) -> dict[str, str]:
    """For each layer with a grid whose output is read by one BatchNorm and nothing else, both called once: that."""
    times = Counter(call.name for call in recording.modules)
    producers = {
        call.output: call.name
        for call in recording.modules
        if has_weight(call.what)
        and call.output is not None
        and not isinstance(call.what, nn.Embedding | nn.EmbeddingBag | nn.Bilinear)
        and len(call.shape) == call.what.weight.ndim  # then dimension 1 is the channel for both
    }
    pairs = {
        producers[call.inputs[0]]: call.name
        for call in recording.modules
        if is_norm(call.what)
        and call.what.track_running_stats
        and call.inputs
        and call.inputs[0] in producers
        and recording.readers[call.inputs[0]] == 1
        and times[call.name] == times[producers[call.inputs[0]]] == 1
    }
    return {layer: norm for layer, norm in pairs.items() if plan.layers[layer].weight is not None}


def _residuals(plan: Plan, decisions: Decisions) -> dict[str, list[str]]:
    """Additions of two tensors with grids, one at least of which is the output of a layer that multiplies integers (of
    a BatchNorm that folds into it) and that nobody else reads.
    """
    recording, calls = decisions.recording, decisions.calls
    norms = {norm: layer for layer, norm in plan.batch_norms.items()}
    products: dict[Any, str] = {}
    for call in recording.modules:
        layer = norms.get(call.name, call.name)
        if call.output is None or recording.readers.get(call.output) != 1 or layer not in plan.layers:
            continue
        original = type_of(calls[layer][0].what)
        kind = "conv" if issubclass(original, CONVOLUTIONS) else "linear" if issubclass(original, nn.Linear) else ""
        if plan.layers[layer].weight is not None and decisions.act(layer) is not None:
            products[call.output] = kind
    found = {
        name: [products.get(key, "") for key in first.operands]
        for name, (first, *more) in calls.items()
        if first.kind == "add" and not more and decisions.act(name) is not None
    }
    return {name: kinds for name, kinds in found.items() if any(kinds) and len(kinds) == 2}


def _plan_activations(plan: Plan, decisions: Decisions, joined: bool) -> None:
    """Decides the grids of what layers and sites read, but for what an addition is given in its accumulator."""
    engine = engine_of(plan.engine)
    floating = {
        (name, operand)
        for name, products in plan.residuals.items()
        if (operand := engine.accumulated(products)) is not None
    }
    plan.activations, chains = activation_grids(decisions, joined, floating)
    for name, operands in chains.items():
        if layer := plan.layers.get(name):
            layer.input, layer.input_1 = operands if len(operands) == 2 else (operands[0], None)
        else:
            plan.sites[name] = operands


def _check_groups(plan: Plan, decisions: Decisions) -> None:
    """Raises before anything is trained if groups of what a layer or a site reads would not come out even."""
    shapes = decisions.recording.shapes
    ragged: dict[str, str] = {}
    for name, operand, chain in _chains(plan):
        known = [s for call in decisions.calls[name] if (s := shapes.get(call.operands[operand])) is not None]
        for spec in [plan.activations[label] for label in chain]:
            size, axis = spec.group_size, spec.group_axis or -1
            for shape in known:
                if size and (len(shape) < -axis or shape[axis] % size):
                    problem = f"does not divide axis {axis} of its input {list(shape)}"
                    ragged.setdefault(name, f"group_size={size} {problem}")
    if ragged:
        name, problem = next(iter(ragged.items()))
        matched = f"'{name}'" if len(ragged) == 1 else f"[{', '.join(f'{each!r}' for each in ragged)}]"
        raise UserError(
            f"'{name}': {problem}, so the last group would be ragged; leave it float with a rule such as "
            f"{{match: {matched}, weight: off, act: off}}"
        )


def _chains(plan: Plan) -> Iterator[tuple[str, int, list[str]]]:
    """Every operand with grids: of what, which one, and the grids it passes in turn."""
    operands = {name: layer.inputs for name, layer in plan.layers.items()} | plan.sites
    return ((name, i, chain) for name, chains in operands.items() for i, chain in enumerate(chains) if chain)


def _parameter_operands(plan: Plan, decisions: Decisions) -> dict[str, SiteOperand]:
    """The parameters that have the grid of an activation; see `Plan.operands`."""
    recording, calls = decisions.recording, decisions.calls
    found: dict[str, tuple[str, int]] = {}
    times: Counter[str] = Counter()
    for name, chains in plan.sites.items():
        first, *more = calls[name]
        paths = first.parameter_paths
        if first.kind not in ELEMENTWISE or first.parameter is None or any(c.parameter_paths != paths for c in more):
            continue
        index = paths.index(first.parameter)
        if chains[index]:
            found[name] = first.parameter, index
            times[first.parameter] += len(calls[name])
    readers = {name: recording.readers.get(calls[name][0].operands[index], 0) for name, (_, index) in found.items()}
    return {
        name: SiteOperand(parameter, index, alone=readers[name] == times[parameter])
        for name, (parameter, index) in found.items()
    }


def _owners(plan: Plan, decisions: Decisions) -> dict[str, list[str]]:
    """Modules that run sites become owners even where theirs stay float, or those around would count them as theirs.

    An owner counts the kinds that it has grids for, and no others: what it leaves float may come and go.
    """
    quantized = {*plan.sites, *(name for name, site in plan.parameters.items() if site.weight is not None)}
    kinds = {kind_of(site) for site in quantized}
    own: dict[str, set[str]] = {}
    for site in quantized:
        own.setdefault(owner_of(site), set()).add(kind_of(site))
    owners: dict[str, list[str]] = {}
    for name, orders in decisions.recording.site_orders().items():
        first, *others = ([kind for kind in order if kind in own.get(name, ())] for order in orders)
        different = next((order for order in others if order != first), None)
        if different is not None:
            raise UserError(sites_changed(name, decisions.model.get_submodule(name), first, different))
        if any(kind in kinds for order in orders for kind in order):
            owners[name] = first
    return owners
