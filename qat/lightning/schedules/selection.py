"""Which quantizers a schedule is for."""

from collections.abc import Sequence

from torch import nn

from qat.lightning.base import QuantizationCallback
from qat.policies.patterns import matching
from qat.quantizers import Quantizer


def select(model: nn.Module, match: str | Sequence[str], who: QuantizationCallback) -> dict[str, Quantizer]:
    """The quantizers that `match` names.

    Args:
        model: A model with quantizers.
        match: Globs over their names (`*.conv1.*`), `@weight` for all of weights, `@act` for all of activations.
        who: The callback that asks.

    Raises:
        UserError: if one of the patterns matches nothing, with the nearest name.
    """
    found = who.quantizers(model)
    roles = {
        "@weight": [n for n, q in found.items() if q.is_weight],
        "@act": [n for n, q in found.items() if not q.is_weight],
    }
    chosen: set[str] = set()
    with who.own_mistakes():
        for pattern in [match] if isinstance(match, str) else match:
            chosen.update(matching(pattern, found, "match", "quantizer", roles))
    return {name: q for name, q in found.items() if name in chosen}
