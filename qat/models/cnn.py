"""A small convolutional net that has one of each thing that makes quantization interesting.

In 48 thousand parameters: a residual add (two tensors must agree on one grid), a strided conv, and a depthwise-
separable conv with nine weights per channel. On the digits it reaches 99%. Rounding its weights
afterwards costs half a point at 4 bits, two to three points at 3 bits, and at 2 bits leaves 68% with one
scale per channel and 15% with one per tensor (max range, one seed): there is something for training to win back.
"""

from typing import Unpack

import torch.nn.functional as F
from torch import Tensor, nn

from qat.errors import require
from qat.models.classifier import Classifier, Training, check_channels


class SmallCNN(Classifier):
    """Stem, residual block, stride-2 conv, depthwise-separable conv, global average pool, logits.

    Args:
        in_channels: channels of the images, which may have any size from 2x2 up; meant for 8x8 and 28x28.
        num_classes: width of the logits.
        width: channels of the stem; the later stages have 2x and 4x as many.
        training: see `Classifier`.
    """

    def __init__(self, in_channels: int = 1, num_classes: int = 10, width: int = 32, **training: Unpack[Training]):
        super().__init__(num_classes, **training)
        require("in_channels", in_channels, in_channels >= 1, "at least 1")
        require("width", width, width >= 1, "at least 1")
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False)
        self.bn4 = nn.BatchNorm2d(2 * width)
        self.depthwise = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width, bias=False)
        self.bn5 = nn.BatchNorm2d(2 * width)
        self.pointwise = nn.Conv2d(2 * width, 4 * width, 1, bias=False)
        self.bn6 = nn.BatchNorm2d(4 * width)
        self.linear = nn.Linear(4 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, in_channels, H, W] to logits [N, num_classes]."""
        x = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(y)) + x)
        x = F.relu(self.bn4(self.down(x)))
        x = F.relu(self.bn5(self.depthwise(x)))
        x = F.relu(self.bn6(self.pointwise(x)))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))

    def check_input(self, x: Tensor) -> None:
        """Raises a UserError unless the images have `in_channels` channels."""
        check_channels(x, self.conv1.in_channels)
