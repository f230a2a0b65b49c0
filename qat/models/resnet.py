"""The CIFAR ResNets of He et al. (Deep Residual Learning, 2015, section 4.2), with parameter-free shortcuts (option A).

Depth 6n + 2: a stem, three stages of n blocks with 16, 32, 64 channels, a linear head. Where a stage halves the image
and doubles the channels, the shortcut takes every second pixel and pads zeros on both sides of the channels, so it
has no weights to quantize; the add sees one branch whose outer channels are exactly zero. Module names are those of
the common public checkpoints (akamaster/pytorch_resnet_cifar10), which therefore load with `load_state_dict`.
"""

from typing import Unpack

import torch.nn.functional as F
from torch import Tensor, nn

from qat.errors import require
from qat.models.classifier import Classifier, Training, check_channels


class BasicBlock(nn.Module):
    """conv-bn-relu-conv-bn, plus the shortcut, relu."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.pad = (channels - in_channels) // 2  # zero channels on either side of the shortcut

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] to [N, channels, H/stride, W/stride]."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.pad:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(y + x)


class ResNet(Classifier):
    """ResNet-20, -32, -44, -56, -110 for small images.

    Args:
        depth: 6n + 2 with n >= 1; n blocks in each of the three stages.
        in_channels: channels of the images; 3 for CIFAR-10, 1 for Fashion-MNIST.
        num_classes: width of the logits.
        training: see `Classifier`.

    Raises:
        UserError: the depth is not of the form 6n + 2.
    """

    def __init__(self, depth: int = 20, in_channels: int = 3, num_classes: int = 10, **training: Unpack[Training]):
        super().__init__(num_classes, **training)
        blocks, rest = divmod(depth - 2, 6)
        near = 6 * max(1, round((depth - 2) / 6)) + 2
        require("depth", depth, blocks >= 1 and rest == 0, f"6n + 2, such as 20 or 56; the nearest is {near}")
        require("in_channels", in_channels, in_channels >= 1, "at least 1")
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks)
        self.layer2 = _stage(16, 32, blocks)
        self.layer3 = _stage(32, 64, blocks)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)  # He et al., Delving Deep into Rectifiers, eq. 10

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, in_channels, H, W] to logits [N, num_classes]."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))

    def check_input(self, x: Tensor) -> None:
        """Raises a UserError unless the images have `in_channels` channels."""
        check_channels(x, self.conv1.in_channels)


def _stage(in_channels: int, channels: int, blocks: int) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, stride=1 if in_channels == channels else 2)
    return nn.Sequential(first, *(BasicBlock(channels, channels, stride=1) for _ in range(blocks - 1)))
