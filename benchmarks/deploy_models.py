"""LightningModules around the networks of `models.py`, a vision transformer, and images to run them on: what
`benchmarks/deploy.py` exports beside the models of the package."""

from typing import Any

import models
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.data.batches import Images
from qat.data.module import ImageDataModule
from qat.models.classifier import Classifier

CLASSES = 10


class _Wrapped(Classifier):
    def __init__(self, net: nn.Module, num_classes: int, **training: Any) -> None:
        super().__init__(num_classes, **training)
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class MobileNetV2(_Wrapped):
    def __init__(self, num_classes: int = CLASSES, optimizer: str = "adamw", lr: float = 1e-3) -> None:
        super().__init__(models.MobileNetV2(num_classes), num_classes, optimizer=optimizer, lr=lr)


class ResNet18(_Wrapped):
    def __init__(self, num_classes: int = CLASSES, optimizer: str = "adamw", lr: float = 1e-3) -> None:
        super().__init__(models.ResNet18(num_classes), num_classes, optimizer=optimizer, lr=lr)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ViT(Classifier):
    """Dosovitskiy et al. (2021) at the width of ViT-Small (384, 6 heads), 4 of its 12 blocks, patches of 8 pixels."""

    def __init__(self, num_classes: int = CLASSES, optimizer: str = "adamw", lr: float = 1e-3) -> None:
        super().__init__(num_classes, optimizer=optimizer, lr=lr)
        self.patches = nn.Conv2d(3, 384, 8, 8)
        self.positions = nn.Parameter(torch.randn(64, 384) * 0.02)
        self.blocks = nn.Sequential(*(_Block(384, 6) for _ in range(4)))
        self.norm, self.head = nn.LayerNorm(384), nn.Linear(384, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(x)).mean(1))


class Synthetic(ImageDataModule):
    """A pattern for each of ten classes under noise, as uint8 images `[3, size, size]`.

    Args:
        size: Height and width.
        train: Images for training.
        test: Images for validation, and as many for test.
    """

    def __init__(self, size: int = 64, train: int = 512, test: int = 256) -> None:
        super().__init__(
            white=255, mean=[0.5] * 3, std=[0.25] * 3, batch_size=32, train_limit=None, val_limit=None,
            test_limit=None, crop_padding=0, flip=False, split_seed=0,
        )  # fmt: skip
        self.size, self.counts = size, {"train": train, "val": test, "test": test}

    def load(self) -> dict[str, Images]:
        """Draws the images, the same each time."""
        generator = torch.Generator().manual_seed(0)
        coarse = torch.rand(CLASSES, 3, 8, 8, generator=generator)
        patterns = F.interpolate(coarse, (self.size, self.size), mode="bilinear")
        found = {}
        for name, count in self.counts.items():
            labels = torch.randint(CLASSES, (count,), generator=generator)
            noise = torch.randn(count, 3, self.size, self.size, generator=generator)
            found[name] = Images(((patterns[labels] + noise * 0.3) * 255).clamp(0, 255).to(torch.uint8), labels)
        return found
