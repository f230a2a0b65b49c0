"""Which quantizers a schedule is for."""

from collections.abc import Sequence

from torch import nn

from qat.errors import UserError
from qat.insert import named_quantizers
from qat.layers import original_class
from qat.policies.patterns import matching
from qat.quantizers import Quantizer


def quantizers_of(model: nn.Module, who: str) -> dict[str, Quantizer]:
    """All quantizers by name.

    Raises:
        UserError: if there are none, in the name of the callback `who`.
    """
    found = dict(named_quantizers(model))
    if not found:
        raise UserError(
            f"{who}: {original_class(model).__name__} has no quantizers; "
            "QATCallback, which inserts them, must be among the callbacks"
        )
    return found


def select(model: nn.Module, match: str | Sequence[str], who: str) -> dict[str, Quantizer]:
    """The quantizers that `match` names.

    Args:
        model: A model with quantizers.
        match: Globs over their names (`*.conv1.*`), `@weight` for all of weights, `@act` for all of activations.
        who: The callback that asks, for messages.

    Raises:
        UserError: if one of the patterns matches nothing, with the nearest name.
    """
    found = quantizers_of(model, who)
    roles = {
        "@weight": [n for n, q in found.items() if q.is_weight],
        "@act": [n for n, q in found.items() if not q.is_weight],
    }
    chosen: set[str] = set()
    for pattern in [match] if isinstance(match, str) else match:
        chosen.update(matching(pattern, found, f"{who}: match", "quantizer", roles))
    return {name: q for name, q in found.items() if name in chosen}
