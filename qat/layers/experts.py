"""Experts of a mixture: the modules of `transformers` that keep all experts' weights in two parameters of three axes.

`experts(hidden_states, top_k_index, top_k_weights)` computes `down(gate(up(x)))` for each token and each of its
experts, by one of several implementations that may change between calls (`grouped_mm` reads a prompt, `batched_mm`
decodes on a GPU). So the grids are not put on function calls, as those of other functional sites are, but on what every
implementation reads: the argument, the two parameters (which are properties of the twin) and the result of
`_apply_gate`. The recording sees `grouped_mm`, hence the sites' names: `mlp.experts.grouped_mm_0` is the first product,
`..._1` the second.

Weights have a scale for each output of each expert; the input of a product has one grid for all experts, so one that no
token was sent to needs none of its own.
"""

from typing import Any

from torch import Tensor, nn

from qat.layers.twin import Inserted, original_class, ours


def is_experts(module: nn.Module) -> bool:
    """Whether a module has the parts that the twin puts grids on."""
    return hasattr(original_class(module), "_apply_gate") and {"gate_up_proj", "down_proj"} <= module._parameters.keys()


def rows(parameter: Tensor, stacked: str) -> Tensor:
    """All experts' weights below each other, `[experts * out, in]`.

    Args:
        parameter: `[experts, out, in]`, or `[experts, in, out]`.
        stacked: Which of the two: `out_in` or `in_out`.
    """
    return (parameter if stacked == "out_in" else parameter.transpose(-2, -1)).flatten(0, 1)


def _through_site(index: int, name: str) -> property:
    def read(self: Any) -> Tensor:
        parameter, site = self._parameters[name], self._modules.get(f"grouped_mm_{index}")
        if site is None or site.weight_quantizer is None:
            return parameter
        with ours():
            quantized = site.quantized_weight()
            if site.stacked == "out_in":
                return quantized.view(parameter.shape)
            return quantized.view(len(parameter), -1, parameter.shape[1]).transpose(-2, -1)

    return property(read)


class QuantExperts(Inserted):
    """Twin of an experts module, on top of its twin as an owner of sites."""

    gate_up_proj = _through_site(0, "gate_up_proj")
    down_proj = _through_site(1, "down_proj")

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(self._input(0, hidden_states), *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def _apply_gate(self, gate_up_out: Tensor) -> Tensor:
        return self._input(1, super()._apply_gate(gate_up_out))  # pyright: ignore[reportAttributeAccessIssue]

    def _input(self, index: int, x: Tensor) -> Tensor:
        site = self._modules.get(f"grouped_mm_{index}")
        if site is None:
            return x
        with ours():
            return site._quantized(0, x)
