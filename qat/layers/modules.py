"""The quantized twins of torch's layers: each is the original computation on a quantized input and weight.

Their arguments have the names of the originals', which callers may use.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from qat.kernels.onednn import Geometry
from qat.layers.base import QuantizedLayer
from qat.layers.data import convolved, reads_data
from qat.layers.twin import ours


class QuantLinear(QuantizedLayer):
    serves = nn.Linear
    channel_axis = 0

    def forward(self, input: Tensor) -> Tensor:
        return self.run(F.linear, input)

    def geometry(self) -> tuple[()]:
        return ()


class _QuantConv(QuantizedLayer):
    channel_axis = 0

    def forward(self, input: Tensor) -> Tensor:
        function = self._conv_forward  # pyright: ignore[reportAttributeAccessIssue]
        learns = self.training and reads_data(self, input)
        return convolved(self, function, input) if learns else self.run(function, input)


class QuantConv1d(_QuantConv):
    serves = nn.Conv1d
    output_axis = -2


class QuantConv2d(_QuantConv):
    serves = nn.Conv2d
    output_axis = -3

    def geometry(self) -> Geometry | None:
        this: Any = self
        plain = this.padding_mode == "zeros" and type(this)._conv_forward is nn.Conv2d._conv_forward
        if not plain or isinstance(this.padding, str):
            return None
        return list(this.stride), list(this.padding), list(this.dilation), this.groups


class QuantConv3d(_QuantConv):
    serves = nn.Conv3d
    output_axis = -4


class QuantBilinear(QuantizedLayer):
    """`x1 W x2 + b`, both inputs on grids of their own; products of three codes have no integer kernel."""

    serves = nn.Bilinear
    channel_axis = 0
    inputs = 2

    input_quantizer_1: nn.Module | None

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        with ours():
            x2 = input2 if self.input_quantizer_1 is None else self.input_quantizer_1(input2)
        return self.run(lambda x1, weight, bias: F.bilinear(x1, x2, weight, bias), input1)


class QuantEmbedding(QuantizedLayer):
    """Looks rows up in the quantized table; its input is indices, which need no grid."""

    serves = nn.Embedding
    channel_axis = 0
    inputs = 0

    def forward(self, input: Tensor) -> Tensor:
        this: Any = self
        weight = self.quantized_weight()
        return F.embedding(
            input, weight, this.padding_idx, this.max_norm, this.norm_type, this.scale_grad_by_freq, this.sparse
        )


class QuantEmbeddingBag(QuantizedLayer):
    """Sums or averages rows of the quantized table."""

    serves = nn.EmbeddingBag
    channel_axis = 0
    inputs = 0

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        this: Any = self
        return F.embedding_bag(
            input, self.quantized_weight(), offsets, this.max_norm, this.norm_type, this.scale_grad_by_freq, this.mode,
            this.sparse, per_sample_weights, this.include_last_offset, this.padding_idx,
        )  # fmt: skip


class _QuantPool(QuantizedLayer):
    """Average pooling of a quantized input: an integer engine sums codes, so it has to see them."""

    def forward(self, input: Tensor) -> Tensor:
        x = self.quantized_input(input)
        with ours():  # the pooling in there is no site of the module around
            return super().forward(x)  # pyright: ignore[reportAttributeAccessIssue]


class QuantAvgPool1d(_QuantPool):
    serves = nn.AvgPool1d


class QuantAvgPool2d(_QuantPool):
    serves = nn.AvgPool2d


class QuantAdaptiveAvgPool1d(_QuantPool):
    serves = nn.AdaptiveAvgPool1d


class QuantAdaptiveAvgPool2d(_QuantPool):
    serves = nn.AdaptiveAvgPool2d
