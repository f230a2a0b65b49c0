"""Weights that a parametrization computes (`torch.nn.utils.parametrizations`: weight_norm, spectral_norm, orthogonal).

What the layer multiplies with is quantized, so what is trained behind it gets its gradient through the quantizer.
Conversion keeps the result and drops the parametrization.
"""

from torch import Tensor, nn
from torch.nn.utils import parametrize

from qat.layers.base import QuantizedLayer
from qat.layers.twin import Inserted, become_twin, drop_mixins, original_class, ours


def is_computed(layer: nn.Module) -> bool:
    """Whether a parametrization makes the weight."""
    return parametrize.is_parametrized(layer, "weight")


class ComputedWeight(Inserted):
    """On top of a quantized layer: its weight is another tensor each time it is asked for, and never kept."""

    weight: Tensor

    def quantized_weight(self) -> Tensor:
        with ours():
            quantizer = self.weight_quantizer  # pyright: ignore[reportAttributeAccessIssue]
            return self.weight if quantizer is None else quantizer(self.weight)


def make_ordinary(layer: nn.Module, mixin: type[QuantizedLayer]) -> None:
    """Makes the weight that the parametrization computes now an ordinary parameter of the twin."""
    drop_mixins(layer, ComputedWeight)
    drop_mixins(layer, QuantizedLayer)
    weight = layer.weight
    computed = layer.parametrizations
    assert isinstance(weight, Tensor) and isinstance(computed, nn.ModuleDict)
    for name in computed:
        assert name == "weight", f"{original_class(layer).__name__}.{name} is computed"
    layer.__class__ = parametrize.type_before_parametrizations(layer)  # pyright: ignore[reportAttributeAccessIssue]
    del layer._modules["parametrizations"]
    layer.weight = nn.Parameter(weight.detach().clone())
    become_twin(layer, mixin)
