"""Transposed convolutions. Their weight is `[in, out / groups, ...]`: the output channel is axis 1, and the groups of a
grouped one lie behind each other on axis 0.

With one scale per channel, output channel `g * (out / groups) + j` has scale `j`, whatever its group `g`: the groups
share grids.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from qat.layers.base import QuantizedLayer


class _QuantConvTranspose(QuantizedLayer):
    channel_axis = 1
    function: ClassVar[Callable[..., Tensor]]

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        this: Any = self
        sizes = this.stride, this.padding, this.kernel_size, len(this.kernel_size), this.dilation
        more = this._output_padding(input, output_size, *sizes)  # of its shape alone

        def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return type(self).function(x, weight, bias, this.stride, this.padding, more, this.groups, this.dilation)

        return self.run(convolve, input)


class QuantConvTranspose1d(_QuantConvTranspose):
    serves = nn.ConvTranspose1d
    output_axis = -2
    function = staticmethod(F.conv_transpose1d)


class QuantConvTranspose2d(_QuantConvTranspose):
    serves = nn.ConvTranspose2d
    output_axis = -3
    function = staticmethod(F.conv_transpose2d)


class QuantConvTranspose3d(_QuantConvTranspose):
    serves = nn.ConvTranspose3d
    output_axis = -4
    function = staticmethod(F.conv_transpose3d)
