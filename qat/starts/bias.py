"""Bias correction: rounding weights and inputs shifts the mean of a layer's outputs, and a shift can be taken back
(Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019, section 4.2).

    bias += E[float output] - E[quantized output]        per output channel, over the calibration batches

Layer by layer in the order of execution, each with those before it corrected. Where a BatchNorm folds into a layer, its
running mean takes the correction, as the folded bias would: it acts in evaluation and in the file, and training, which
normalizes by the batch, finds its own. Layers without either keep their shift, as do functions that multiply by a
parameter (`F.linear(x, self.w, self.b)`, experts): their bias, if any, is an argument that they may share.
"""

from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import UserError
from qat.layers import QuantizedLayer, original_class
from qat.layers.twin import ours
from qat.modes import evaluating
from qat.planning.plan import Plan
from qat.starts.base import Run, Start, in_float, replay


class CorrectBias(Start):
    """See the module's docstring.

    Raises:
        UserError: (in `refine`) if no quantized layer has a bias or a BatchNorm.
    """

    @torch.no_grad()
    def refine(self, model: nn.Module, run: Run, plan: Plan) -> None:
        modules = dict(model.named_modules())
        takes = {}
        for name, layer in plan.layers.items():
            norm = modules[plan.batch_norms[name]] if name in plan.batch_norms else None
            bias = norm.running_mean if norm is not None else getattr(modules[name], "bias", None)
            if layer.weight is not None and not isinstance(modules[name], nn.Embedding) and bias is not None:
                takes[name] = bias, -1 if norm is not None else 1
        if not takes:
            raise UserError(f"CorrectBias: no quantized layer of {original_class(model).__name__} has a bias")
        with evaluating(model):
            again = replay(model, run)
            with in_float(model):
                wanted = _means({name: modules[name] for name in takes}, again)
            for name in [name for name in wanted if name in takes]:
                bias, sign = takes[name]
                shift = wanted[name] - _means({name: modules[name]}, again)[name]
                bias.add_(sign * shift.to(bias.dtype))


def _means(layers: dict[str, nn.Module], run: Run) -> dict[str, Tensor]:
    """The mean output of each channel, float64, by layer in the order they ran."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def add(name: str, axis: int, _layer: nn.Module, _args: Any, output: Any) -> None:
        with ours():  # what a hook computes is no part of the forward around it
            rows = output.double().movedim(axis, 0).flatten(1)
            sums[name] = sums.get(name, 0) + rows.sum(1)
        counts[name] = counts.get(name, 0) + rows.shape[1]

    with ExitStack() as hooks:
        for name, layer in layers.items():
            assert isinstance(layer, QuantizedLayer)
            hooks.enter_context(layer.register_forward_hook(partial(add, name, layer.output_axis)))
        run()
    return {name: total / counts[name] for name, total in sums.items()}
