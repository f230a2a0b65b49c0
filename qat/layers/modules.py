"""The quantized twins of torch's layers: each is the original computation on a quantized input and weight.

Their arguments have the names of the originals', which callers may use.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from qat.layers.base import QuantizedLayer
from qat.layers.twin import ours


class QuantLinear(QuantizedLayer):
    serves = nn.Linear
    channel_axis = 0

    def forward(self, input: Tensor) -> Tensor:
        return self.run(F.linear, input)


class _QuantConv(QuantizedLayer):
    channel_axis = 0

    def forward(self, input: Tensor) -> Tensor:
        return self.run(self._conv_forward, input)  # pyright: ignore[reportAttributeAccessIssue]


class QuantConv1d(_QuantConv):
    serves = nn.Conv1d


class QuantConv2d(_QuantConv):
    serves = nn.Conv2d


class QuantEmbedding(QuantizedLayer):
    """Looks rows up in the quantized table; its input is indices, which need no grid."""

    serves = nn.Embedding
    channel_axis = 0

    def forward(self, input: Tensor) -> Tensor:
        weight = self.quantized_weight()
        return F.embedding(
            input, weight, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse  # pyright: ignore
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
