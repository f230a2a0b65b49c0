"""Grids of weights: one for each weight, however many layers and sites share it. The first that multiplies by a weight
owns its grid.
"""

from typing import Any

from torch import nn

from qat.errors import UserError
from qat.grid.spec import QuantSpec
from qat.layers import BoundPart, is_computed, mixin_for
from qat.planning.addressable import has_weight
from qat.planning.decisions import Decisions
from qat.planning.functions import EXPERTS, FUNCTIONS
from qat.planning.plan import Plan, PlannedLayer, SiteWeight
from qat.planning.recording import Call


def plan_weights(plan: Plan, decisions: Decisions) -> None:
    """Fills in `weights`, and where they lie: `layers` (whose inputs are still to come) and `parameters`."""
    owners = _Owners(plan.weights)
    for name, (call, *_) in decisions.calls.items():
        if call.weight:
            plan.parameters[name] = _site(name, call, decisions, owners)
        elif call.site is None:
            plan.layers[name] = _layer(name, call.what, decisions, owners)


class _Owners:
    """Who owns the grid of each weight.

    Args:
        grids: The grid of each owner, which is filled in.
    """

    def __init__(self, grids: dict[str, QuantSpec]) -> None:
        self.grids = grids
        self.names: dict[Any, str] = {}

    def of(self, identity: Any, name: str, spec: QuantSpec) -> str:
        """The owner of a weight that `name` multiplies by: `name` itself if it is the first.

        Args:
            identity: Equal for what is one weight.
            name: A layer or a site.
            spec: What the policy decided for it.

        Raises:
            UserError: if it decided something else for the owner.
        """
        owner, grid = self.names.setdefault(identity, name), spec.resolved(nonnegative=False, weight=True)
        if self.grids.setdefault(owner, grid) != grid:
            raise UserError(
                f"'{name}' and '{owner}' are one weight, but the policy gives them different grids; "
                "add a rule that matches both"
            )
        return owner


def _site(name: str, call: Call, decisions: Decisions, owners: _Owners) -> SiteWeight:
    assert call.parameter is not None
    weight, spec = decisions.model.get_parameter(call.parameter), decisions.weight(name)
    owner = owners.of(id(weight), name, spec) if spec else None
    axis = (FUNCTIONS[call.what].channel_axis or 0) % weight.ndim
    if spec and spec.granularity == "group" and axis > 1 and call.kind != EXPERTS:
        raise UserError(
            f"'{name}': granularity=group needs a weight matrix, but '{call.parameter}' is a stack of them "
            f"{list(weight.shape)}; use granularity: channel or tensor there"
        )
    site = SiteWeight(call.parameter, axis, owner, alone=decisions.recording.only_sites_read(call.parameter))
    if call.kind == EXPERTS:
        transposed = call.operands[1][0] != id(weight)  # then the parameter is [experts, out, in]
        site.axis, site.stacked = 0, "out_in" if transposed else "in_out"
    return site


def _layer(name: str, layer: Any, decisions: Decisions, owners: _Owners) -> PlannedLayer:
    spec = decisions.weight(name) if has_weight(layer) else None
    owner = owners.of(_identity(layer), name, spec) if spec else None
    planned = PlannedLayer(owner, [])
    if owner == name:
        _place(planned, name, layer)
    weight = layer._parameters.get("weight")
    planned.read = bool(owner) and decisions.recording.read_by_functions(weight, f"{name}.weight")
    return planned


def _identity(layer: Any) -> Any:
    """Equal for layers that share their weight, of which there may be another tensor each time one asks."""
    if isinstance(layer, BoundPart):
        return layer.identity()
    return id(layer) if is_computed(layer) else id(layer.weight)


def _place(planned: PlannedLayer, name: str, layer: nn.Module) -> None:
    """Writes down where a weight lies."""
    mixin = mixin_for(layer)
    if isinstance(layer, BoundPart):
        parameter, first, count = layer.rows[0]
        planned.parameter = f"{name.rpartition('.')[0]}.{parameter}".lstrip(".")
        planned.rows = None if count is None else [first, count]
    elif mixin is not None:
        planned.axis = mixin.channel_axis or 0
