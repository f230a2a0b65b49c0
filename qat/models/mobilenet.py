"""MobileNetV2 (Sandler et al., CVPR 2018, table 2) for small and large images: the network whose depthwise convolutions
make quantization-aware training at few bits hard.

Each block widens with a 1x1 convolution, filters every channel by itself and narrows again; a sum passes the input by
where shape and stride allow.
"""

from typing import Unpack

from torch import Tensor, nn

from qat.errors import require
from qat.models.classifier import Classifier, Training, check_channels

STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""Factor of widening, channels, blocks and stride of the first of them, of each stage."""
STRIDES = (8, 16, 32)


def conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


class InvertedResidual(nn.Module):
    """1x1 to more channels, 3x3 in each, 1x1 to few; plus the input."""

    def __init__(self, inputs: int, outputs: int, stride: int, widen: int) -> None:
        super().__init__()
        hidden = inputs * widen
        first = [*conv_bn(inputs, hidden, 1), nn.ReLU6()] if widen != 1 else []
        depthwise = [*conv_bn(hidden, hidden, 3, stride, groups=hidden), nn.ReLU6()]
        self.layers = nn.Sequential(*first, *depthwise, *conv_bn(hidden, outputs, 1))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] to [N, outputs, H/stride, W/stride]."""
        return x + self.layers(x) if self.residual else self.layers(x)


class MobileNetV2(Classifier):
    """MobileNetV2 of any width.

    Args:
        width: multiplier of the channels, which are then rounded to multiples of 8.
        stride: by how much the last features are smaller than the image: 32 as published, for images of 96 pixels and
            more; 16; or 8 for images of 32.
        in_channels: channels of the images.
        num_classes: width of the logits.
        training: see `Classifier`.

    Raises:
        UserError: an option is out of its range.
    """

    def __init__(
        self,
        width: float = 1.0,
        stride: int = 8,
        in_channels: int = 3,
        num_classes: int = 10,
        **training: Unpack[Training],
    ) -> None:
        super().__init__(num_classes, **training)
        require("width", width, width > 0, "a positive number")
        require("stride", stride, stride in STRIDES, f"one of {', '.join(map(str, STRIDES))}")
        require("in_channels", in_channels, in_channels >= 1, "at least 1")
        inputs = _rounded(32 * width)
        layers = [*conv_bn(in_channels, inputs, 3, 2 if stride == 32 else 1), nn.ReLU6()]
        for widen, channels, blocks, first in STAGES:
            outputs = _rounded(channels * width)
            for i in range(blocks):
                by = 1 if i or (channels == 24 and stride == 8) else first
                layers.append(InvertedResidual(inputs, outputs, by, widen))
                inputs = outputs
        last = _rounded(1280 * max(1.0, width))
        self.features = nn.Sequential(*layers, *conv_bn(inputs, last, 1), nn.ReLU6())
        self.head = nn.Linear(last, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, in_channels, H, W] to logits [N, num_classes]."""
        return self.head(self.features(x).mean((2, 3)))

    def check_input(self, x: Tensor) -> None:
        """Raises a UserError unless the images have `in_channels` channels."""
        check_channels(x, self.features[0].in_channels)  # pyright: ignore[reportArgumentType]


def _rounded(channels: float) -> int:
    """To a multiple of 8, at least 8, and not more than a tenth below `channels`."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * channels else nearest
