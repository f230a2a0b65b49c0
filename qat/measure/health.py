"""How well a quantized layer is doing while it trains, and when something is wrong with it.

Beside the fit of each grid (`qat.measure.stats`: SQNR, clip rate, used codes), training shows

    drift         mean over its scales of |log2(scale / scale at the start)|: 1 means that they doubled or halved
    oscillation   share of a weight's codes that one optimizer step changes and the next changes back
    grad_norm     L2 norm of the gradient of its scales at an optimizer step

A layer has collapsed when all its codes are equal, when it clips more than a fifth of its values, or when a scale is so
small that only its floor keeps it above zero: then it hardly learns any more, and the loss may not show it for long.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from qat.errors import UserError
from qat.grid.functional import SCALE_FLOOR
from qat.layers.experts import rows as experts
from qat.measure.stats import QuantizerStats, Tally, summarize
from qat.planning.plan import Plan, SiteWeight
from qat.quantizers import create

MAX_CLIP_RATE = 0.2


@dataclass(frozen=True)
class Health:
    """One quantizer at one moment of training; `None` is not measured or, as an SQNR, exact.

    Attributes:
        name: Module path of the quantizer.
        layer: Name of the layer or site that reads its tensor.
        role: `weight` or `act`.
        spec: Short label of its grid.
        bits: Width of its codes.
        codes: How many different codes occurred.
        scale: The smallest of its scales.
        sqnr_db, clip_rate: See `qat.measure.stats`.
        drift, oscillation, grad_norm: See the module's docstring.
        scale_floor: The smallest scale of its format.
    """

    name: str
    layer: str
    role: str
    spec: str
    bits: int
    codes: int
    scale: float
    sqnr_db: float | None
    clip_rate: float
    drift: float | None = None
    oscillation: float | None = None
    grad_norm: float | None = None
    scale_floor: float = SCALE_FLOOR

    @classmethod
    def of(cls, stats: QuantizerStats, codes: int, **training: float | None) -> "Health":
        """A fit, and what training shows beside it."""
        return cls(
            stats.name, stats.layer, stats.role, stats.spec, stats.bits, codes, stats.scale_min, stats.sqnr_db,
            stats.clip_rate, **training, scale_floor=stats.scale_floor,
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def findings(self) -> list[str]:
        """Sentences about what has collapsed; empty if nothing has."""
        found = []
        if self.codes == 1:
            found.append("all codes are equal")
        if self.clip_rate > MAX_CLIP_RATE and self.bits > 1:  # one bit has nothing but ends
            found.append(f"{self.clip_rate:.0%} of its values are clipped")
        if self.scale <= self.scale_floor:
            found.append(f"a scale is at its floor ({self.scale:.2g})")
        return found


def worst_first(rows: Iterable[Health]) -> list[Health]:
    """Collapsed ones, then by the noise that they add: the lowest SQNR first."""
    return sorted(rows, key=lambda row: (not row.findings(), float("inf") if row.sqnr_db is None else row.sqnr_db))


def from_checkpoint(checkpoint: Mapping[str, Any], path: Any) -> tuple[list[Health], str | None, list[str]]:
    """The health of a trained model, from a checkpoint's containers and tensors alone.

    Args:
        checkpoint: See `qat.lightning.weights.read_checkpoint`.
        path: The file of the checkpoint, for messages.

    Returns:
        The rows; why there are only weights, measured now, where training has not recorded them (`QuantizerHealth`);
        and the layers that are left out, as a parametrization computes their weight, or an old plan does not say
        where it lies.

    Raises:
        UserError: if the checkpoint is of a model without quantizers.
    """
    why = "the checkpoint was written without the callback QuantizerHealth"
    if "callbacks" not in checkpoint:  # what a run ends with
        why = (
            "the model is calibrated and not trained, and activations are measured in training"
            if checkpoint.get("global_step") == 0
            else "the checkpoint holds no callbacks; those written in training do, QuantizerHealth's measurements too"
        )
    for key, state in (checkpoint.get("callbacks") or {}).items():
        if key.startswith("QuantizerHealth"):
            if state.get("rows"):
                return [Health(**row) for row in state["rows"]], None, []
            why = "training took too few steps for QuantizerHealth to measure activations"
    if "qat" not in checkpoint:
        raise UserError(f"checkpoint {path}: is of a float model, which has no quantizers to inspect")
    plan, state = Plan.from_dict(checkpoint["qat"]), checkpoint["state_dict"]
    rows = {layer: _row(layer, plan, state) for layer in plan.weights}
    return [row for row in rows.values() if row], why, [layer for layer, row in rows.items() if row is None]


def _row(layer: str, plan: Plan, state: Mapping[str, Tensor]) -> Health | None:
    place = plan.layers.get(layer) or plan.parameters[layer]
    weight = state.get(place.parameter or f"{layer}.weight")
    if weight is None:
        return None
    if isinstance(place, SiteWeight):
        weight = experts(weight, place.stacked) if place.stacked else weight
    elif place.rows:
        weight = weight.narrow(0, *place.rows)
    name, tally = f"{layer}.weight_quantizer", Tally()
    quantizer, prefix = create(plan.weights[layer], weight.shape, place.axis), f"{name}."
    own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if own["scale"].shape != quantizer.scale.shape:  # an old plan does not say where the weight lies
        return None
    quantizer.load_state_dict(own)
    tally.add(name, quantizer, weight)
    return Health.of(summarize(name, quantizer, tally, (layer,)), len(tally.codes))
