"""The networks of the benchmarks, written as plainly as they come: a GPT, ResNet-20, ResNet-18 and a MobileNetV2, which
they train, and a ViT, which they only export.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.models import MobileNetV2, ResNet


class Block(nn.Module):
    """Attention and an MLP, each behind its LayerNorm and beside a residual."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads, self.causal = heads, causal

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, time, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(y.transpose(1, 2).reshape(batch, time, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Width 256, 4 layers, 4 heads, 65 characters."""

    def __init__(
        self, width: int = 256, layers: int = 4, heads: int = 4, vocabulary: int = 65, time: int = 128
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(time, width)
        self.blocks = nn.Sequential(*(Block(width, heads, causal=True) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x))).flatten(0, 1)


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet18(nn.Module):
    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        widths = (64, 64, 128, 128, 256, 256, 512, 512)
        self.blocks = nn.Sequential(
            *(BasicBlock(widths[max(i - 1, 0)], w, 2 if i in (2, 4, 6) else 1) for i, w in enumerate(widths))
        )
        self.head = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class ViT(nn.Module):
    """For images of 32x32: patches of 4x4, width 192, 6 layers, 3 heads, the mean of the patches."""

    def __init__(self, width: int = 192, layers: int = 6, heads: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.positions = nn.Parameter(0.02 * torch.randn(64, width))
        self.blocks = nn.Sequential(*(Block(width, heads, causal=False) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(x)).mean(1))


def workload(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """The model with the statistics of its BatchNorms settled, one batch and its targets, by name."""
    model, x, y = _fresh(name)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():  # as if trained for a while: calibration in evaluation finds the ranges of training
        model(x)
    for norm in norms:
        norm.momentum = 0.1
    return model, x, y


def _fresh(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    if name == "gpt":
        return GPT(), torch.randint(65, (16, 128)), torch.randint(65, (16 * 128,))
    if name == "resnet20":
        return ResNet(20, 3, 10), torch.randn(128, 3, 32, 32), torch.randint(10, (128,))
    if name == "resnet18":
        return ResNet18(), torch.randn(16, 3, 112, 112), torch.randint(10, (16,))
    model, x = MobileNetV2(stride=32).to(memory_format=torch.channels_last), torch.randn(16, 3, 96, 96)
    return model, x.to(memory_format=torch.channels_last), torch.randint(10, (16,))


WORKLOADS = ("gpt", "resnet20", "resnet18", "mobilenetv2")
