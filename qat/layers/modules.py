"""The quantized twins of torch's layers: each is the original computation on a quantized input and weight."""

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from qat.layers.base import QuantizedLayer


class QuantLinear(QuantizedLayer):
    serves = nn.Linear
    channel_axis = 0

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.quantized_input(x), self.quantized_weight(), self.quantized_bias())


class _QuantConv(QuantizedLayer):
    channel_axis = 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.quantized_input(x)
        return self._conv_forward(x, self.quantized_weight(), self.quantized_bias())  # pyright: ignore[reportAttributeAccessIssue]


class QuantConv1d(_QuantConv):
    serves = nn.Conv1d


class QuantConv2d(_QuantConv):
    serves = nn.Conv2d


class QuantEmbedding(QuantizedLayer):
    """Looks rows up in the quantized table; its input is indices, which need no grid."""

    serves = nn.Embedding
    channel_axis = 0

    def forward(self, indices: Tensor) -> Tensor:
        weight = self.quantized_weight()
        return F.embedding(
            indices, weight, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse  # pyright: ignore
        )  # fmt: skip


class _QuantPool(QuantizedLayer):
    """Average pooling of a quantized input: an integer engine sums codes, so it has to see them."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.quantized_input(x))  # pyright: ignore[reportAttributeAccessIssue]


class QuantAvgPool1d(_QuantPool):
    serves = nn.AvgPool1d


class QuantAvgPool2d(_QuantPool):
    serves = nn.AvgPool2d


class QuantAdaptiveAvgPool1d(_QuantPool):
    serves = nn.AdaptiveAvgPool1d


class QuantAdaptiveAvgPool2d(_QuantPool):
    serves = nn.AdaptiveAvgPool2d
