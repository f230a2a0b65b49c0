"""One functional call of an owner, with the grids of its operands; `qat.layers.sites` decides which call is which.

A site is a child of its owner, so policies, state_dict keys and messages name it like a layer: `layer1.0.add_0`,
`h.3.attn.matmul_1`, `head.linear_0`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qat.layers.experts import rows
from qat.layers.explicit_attention import explicit_attention
from qat.layers.shared import read
from qat.layers.sources import from_sources
from qat.layers.twin import TwinMixin, ours
from qat.planning.functions import Function
from qat.quantizers import Quantizer


class Site(TwinMixin, nn.Module):
    """A function call whose operands (or output) lie on grids.

    Attributes:
        explicit: Whether an attention, or a product that adds to a tensor, is computed in plain operations.
        output_axis: Which axis of a product with a parameter the output channels are along, counted from the end.
        weight_index: Index of the operand that the site takes from its own weight instead of from the caller: 1 for the
            second, if that is a parameter; `None` if there is none. In a converted model it may also be a parameter
            that is added or multiplied elementwise.

    Children: `input_quantizer_0` and on, one for each operand (`None`: it stays float), or `output_quantizer`;
    `probability_quantizer` of an attention, which is then computed explicitly; `weight_quantizer`, if the second
    operand is a parameter.

    Args:
        quantizers: One for each operand; for a site that quantizes what it returns, only the output's.
        output: Whether it does.
        probabilities: Grid of an attention's probabilities.
        weight: Quantizer of the second operand, if that is a parameter.
        parameter: The module that the weight is registered with, and its name there.
        stacked: Order of the last two axes of experts' weights; see `qat.layers.experts`.
        output_axis: See above.
    """

    weight_quantizer: Quantizer | None
    probability_quantizer: nn.Module | None
    output_quantizer: nn.Module

    def __init__(
        self,
        quantizers: list[nn.Module | None],
        output: bool = False,
        probabilities: nn.Module | None = None,
        weight: Quantizer | None = None,
        parameter: tuple[nn.Module, str] | None = None,
        stacked: str | None = None,
        output_axis: int = -1,
    ) -> None:
        super().__init__()
        self.operands = [f"input_quantizer_{i}" for i in range(len(quantizers))] if not output else []
        for name, quantizer in zip(self.operands or ["output_quantizer"], quantizers, strict=True):
            self.register_module(name, quantizer)
        self.register_module("probability_quantizer", probabilities)
        self.explicit = probabilities is not None
        self.register_module("weight_quantizer", weight)
        self.holder = parameter  # in a tuple, where it is no child
        self.weight_index = 1 if parameter else None
        self.stacked = stacked
        self.output_axis = output_axis

    @property
    def weight(self) -> Tensor:
        """The parameter that is its second operand (of experts: its rows)."""
        if self.holder is None:  # whoever lists attributes (`torch.jit`) goes on to the next
            raise AttributeError("weight")
        module, name = self.weight_place()
        if self.stacked is not None:
            return rows(module._parameters[name], self.stacked)  # pyright: ignore[reportArgumentType]
        return getattr(module, name)

    def weight_place(self) -> tuple[nn.Module, str]:
        """Where the parameter is."""
        assert self.holder is not None
        return self.holder

    def weight_within(self, whole: Tensor) -> Tensor:
        """A view of a tensor that is shaped as the parameter, with its axes in the order of the weight's."""
        return whole.transpose(-2, -1) if self.stacked == "in_out" else whole

    def forward(
        self, func: Callable[..., Any], function: Function, args: Any, kwargs: dict[str, Any], operands: list[Tensor]
    ) -> Any:
        """Calls `func` with its operands on their grids."""
        if not self.operands:
            result = func(*args, **kwargs)
            with ours():
                return self.output_quantizer(result)
        original = operands[0]
        with ours():
            # A quantizer keeps its input for the backward pass, so a function must not write over that.
            if function.in_place and torch.is_grad_enabled():
                operands = [original.clone(), *operands[1:]]
            through = [self._quantized(i, x) for i, x in enumerate(operands)]
        args, kwargs = function.with_operands(args, kwargs, through)
        if self.explicit and function.kind == "attention":
            return explicit_attention(*args, **kwargs, probabilities=self._probabilities)
        if self.explicit and function.accumulates and all(kwargs.get(factor, 1) == 1 for factor in ("alpha", "beta")):
            return (args[0] if args else kwargs["input"]) + through[0] @ through[1]
        if any(hasattr(x, "made") for x in through) and not torch.compiler.is_dynamo_compiling():
            result = from_sources(through, func, *args, **kwargs)
        else:
            result = func(*args, **kwargs)
        return original.copy_(result) if function.in_place else result

    def _quantized(self, index: int, x: Tensor) -> Tensor:
        if index == self.weight_index:
            return self.quantized_weight()
        quantizer = self._modules[self.operands[index]]
        return x if quantizer is None else read(quantizer, x)

    def quantized_weight(self) -> Tensor:
        """The parameter on its grid; outside training it is computed once per change of weight or grid."""
        quantizer, weight = self.weight_quantizer, self.weight
        if quantizer is None:
            return weight
        if self.training:
            return quantizer(weight)
        return self.once_per_change("weight", (weight,), (quantizer,), lambda: quantizer(weight))

    def _probabilities(self, x: Tensor) -> Tensor:
        return x if self.probability_quantizer is None else self.probability_quantizer(x)
