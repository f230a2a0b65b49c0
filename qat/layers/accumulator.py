"""Biases as integer engines add them: int32 codes at the accumulator's scale s_x * s_w (Jacob et al., CVPR 2018,
section 2.4).

With few bits that scale is coarse: at 4 bits a step of the accumulator is often a twentieth of an output step, so a
bias rounded to it moves a few percent of the outputs to another code. Evaluation therefore adds rounded biases, as the
exported file will, and measures what it will do. A BatchNorm behind a layer becomes part of that bias when it folds, so
its twin adds the rounding error of the folded bias. `round_bias=train` has training do the same, so that the network
learns to live with it: a BatchNorm then normalizes by the batch and adds the error that its running statistics would
have. `never` is for engines that add float biases.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qat.grid.functional import levels
from qat.grid.spec import QuantSpec
from qat.layers.chain import last_grid
from qat.layers.twin import Inserted, ours, stored_tensor
from qat.modes import recomputing
from qat.quantizers import Quantizer

INT32_MAX = 2**31 - 1
ACCUMULATED_BITS = 8
"""Most bits of codes whose products int32 adds up. At 16 bits the accumulator's scale is so fine that int32 could not
hold a bias of usual size; engines have wider ones there.
"""


def input_grid(input_quantizer: nn.Module | None) -> Quantizer | None:
    """The grid that a layer's multiplications see (the last, where its input passes several), if it is on."""
    last = last_grid(input_quantizer)
    return last if isinstance(last, Quantizer) and last.on else None


def accumulates(input: QuantSpec, weight: QuantSpec, static: bool) -> bool:
    """Whether the products of their codes add up in one int32 accumulator for each output channel, of one scale.

    Args:
        input, weight: The two grids.
        static: Whether neither is measured on each tensor (`Quantizer.static`).
    """
    integers = all(spec.integer and spec.width <= ACCUMULATED_BITS for spec in (input, weight))
    return static and integers and weight.granularity != "group"


def accumulator_scale(layer: Any) -> Tensor | None:
    """Scale of the layer's integer accumulator, float64 `(1,)` or `(channels,)`; `None` if it does not accumulate
    integers of one scale, or adds a float bias.
    """
    if layer.round_bias == "never":
        return None
    grid, weight = input_grid(layer.input_quantizer), layer.weight_quantizer
    if grid is None or weight is None or not weight.on or layer.inputs > 1:
        return None
    if not accumulates(grid.spec, weight.spec, static=grid.static and weight.static):
        return None
    return grid.step().double() * per_output(layer, weight.step()).double()


def per_output(layer: Any, scale: Tensor) -> Tensor:
    """A weight's scales `(1,)` or one per entry of its channel axis, as `(1,)` or one per output channel: the groups of
    a transposed convolution share theirs.
    """
    shared = layer.channel_axis == 1 and len(scale) > 1
    return scale.repeat(layer.groups) if shared else scale


def grids(layer: Any) -> tuple[Quantizer | None, Quantizer | None]:
    """The grids that `accumulator_scale(layer)` is made of; a converted layer's are frozen, and none of them."""
    last, weight = last_grid(layer._modules["input_quantizer"]), layer._modules["weight_quantizer"]
    return last if isinstance(last, Quantizer) else None, weight if isinstance(weight, Quantizer) else None


def bias_codes(bias: Tensor, scale: Tensor) -> Tensor:
    """`bias` in whole accumulator steps, clipped to int32; float64."""
    limit = torch.full_like(scale, INT32_MAX, dtype=torch.float64)
    return levels(bias.double(), scale.double(), -limit - 1, limit)


class RoundedBias(torch.autograd.Function):
    """`bias` in whole accumulator steps, with the gradient of `bias` itself."""

    @staticmethod
    def forward(ctx: Any, bias: Tensor, scale: Tensor) -> Tensor:
        return (bias_codes(bias, scale) * scale).to(bias.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def folded(norm: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Factor and bias that a BatchNorm (with running statistics) gives the layer before it.

    Returns:
        The factor of each output channel and the bias of both together, float64.
    """
    assert norm.running_mean is not None and norm.running_var is not None
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    factor = (variance + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight.double()
    shifted = -mean if bias is None else bias.double() - mean
    both = shifted * factor
    return factor, both if norm.bias is None else both + norm.bias.double()


class FoldingNorm(Inserted):
    """Twin of a BatchNorm that will fold: in evaluation its bias carries the rounding error of the folded bias.

    Attributes:
        host: The layer it folds into, in a tuple (it is no child of the norm).
        plain: Whether its class has the forward of torch's BatchNorms. A SyncBatchNorm has its own, which has to run.
        learned_error: The error that the last forward in training has added.
    """

    plain: ClassVar[bool]
    host: tuple[Any]
    bias: Tensor | None
    running_mean: Tensor
    learned_error: Tensor | None

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.plain = super().forward is _BatchNorm.forward  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, input: Tensor) -> Tensor:
        if self.training:
            y = super().forward(input)  # pyright: ignore[reportAttributeAccessIssue]
            if self.host[0].round_bias != "train":
                return y
            with ours():
                return _shifted(y, self._learned_error())
        this: Any = self
        layer = self.host[0]
        mean, variance = (stored_tensor(this, this._buffers, name) for name in ("running_mean", "running_var"))
        weight, bias = (stored_tensor(this, this._parameters, name) for name in ("weight", "bias"))
        tensors = mean, variance, weight, bias, stored_tensor(layer, layer._parameters, "bias")
        if not self.plain:
            y = super().forward(input)  # pyright: ignore[reportAttributeAccessIssue]
            with ours():
                return _shifted(y, self.once_per_change("error", tensors, grids(layer), self._rounding_error))
        this._check_input_dim(input)
        with ours():
            bias = self.once_per_change("bias", tensors, grids(layer), self._bias)
        return F.batch_norm(input, mean, variance, weight, bias, eps=this.eps)

    def _learned_error(self) -> Tensor | None:
        """The rounding error in training; where a checkpoint runs the last forward again, that of its first run, since
        the statistics have moved meanwhile.
        """
        if torch.compiler.is_compiling():  # nothing is to be written then
            return self._rounding_error()
        if not recomputing() or "learned_error" not in self.__dict__:
            self.learned_error = self._rounding_error()
        return self.learned_error

    def undo_twin(self) -> None:
        super().undo_twin()
        for name in ("host", "learned_error"):
            self.__dict__.pop(name, None)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in super().__getstate__().items() if k != "learned_error"}

    def _bias(self) -> Tensor | None:
        error, bias = self._rounding_error(), self.bias
        if error is None:
            return bias
        return error.to(self.running_mean.dtype) if bias is None else bias + error.to(bias.dtype)

    @torch.no_grad()
    def _rounding_error(self) -> Tensor | None:
        layer = self.host[0]
        own = accumulator_scale(layer)
        if own is None:
            return None
        factor, bias = folded(self, layer.bias)  # pyright: ignore[reportArgumentType]
        scale = own * factor.abs()
        # gamma = 0 leaves a constant channel, whose scale conversion keeps as it is.
        scale = torch.where(scale > 0, scale, own)
        return bias_codes(bias, scale) * scale - bias


def _shifted(y: Tensor, error: Tensor | None) -> Tensor:
    """`y` with what is to be added to each of its channels (axis 1)."""
    return y if error is None else y + error.to(y.dtype).view(-1, *[1] * (y.ndim - 2))
