"""The weights that lie on grids, wherever they are: in layers, in parts of layers with several, in functional sites.

A weight is a parameter, some rows of one (a projection of attention), all of one in another order (experts), or it is
computed by a parametrization: then it is another tensor each time, and what is written to it is lost.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils import parametrize

from qat.layers.base import QuantizedLayer
from qat.layers.site import Site
from qat.modes import evaluating
from qat.quantizers import Quantizer


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight on its grid.

    Attributes:
        name: Module path of the layer, part or site that reads it.
        quantizer: Its grid, whose name is `<name>.weight_quantizer`.
        reader: What reads it.
    """

    name: str
    quantizer: Quantizer
    reader: QuantizedLayer | Site

    @property
    def tensor(self) -> Tensor:
        """Its values now; of a parametrization, those of evaluation (in training, spectral_norm moves at each look)."""
        module, name = self.reader.weight_place()
        computed = parametrize.is_parametrized(module, name)
        with evaluating(module.parametrizations[name]) if computed else nullcontext():  # pyright: ignore[reportIndexIssue, reportArgumentType]
            return self.reader.weight

    @property
    def parameter(self) -> Tensor | None:
        """The parameter that holds it, maybe among other weights; `None` if it is computed."""
        module, name = self.reader.weight_place()
        return module._parameters.get(name)

    @property
    def writable(self) -> bool:
        return self.parameter is not None

    def within(self, whole: Tensor) -> Tensor:
        """A view of its part of a tensor that is shaped as the parameter: of the parameter itself, or its gradient."""
        return self.reader.weight_within(whole)


def weight_readers(model: nn.Module) -> Iterator[QuantizedWeight]:
    """Every weight on a grid once for each layer, part and site that reads it."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer | Site):
            quantizer = module._modules.get("weight_quantizer")
            if isinstance(quantizer, Quantizer):
                yield QuantizedWeight(name, quantizer, module)


def quantized_weights(model: nn.Module) -> dict[Quantizer, QuantizedWeight]:
    """Every weight on a grid once, by its quantizer, as the first reads it that does."""
    found: dict[Quantizer, QuantizedWeight] = {}
    for weight in weight_readers(model):
        found.setdefault(weight.quantizer, weight)
    return found
