"""Whole batches out of one tensor, without Python work per sample.

`DataLoader` asks a data set that has `__getitems__` for all indices of a batch at once, so a batch is one gather on
the stored bytes, and the collate function sees [N, C, H, W] and augments and normalises it in a few tensor
operations. Unlike a loader that batches by itself, this leaves sampler and batch sampler to torch and Lightning:
shuffling, resuming and the DistributedSampler that Lightning injects for DDP work as they do for any map-style data
set. An augmented epoch of 45,000 CIFAR-10 images takes about a second on two cores, so worker processes are not
needed. A GPU that would wait for them can make the batches itself: `Resident`.

Shapes: N samples, C channels, H by W pixels.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset


class Images(NamedTuple):
    """A labelled set of images in memory."""

    pixels: Tensor  # uint8 [N, C, H, W]
    labels: Tensor  # int64 [N]

    def take(self, indices: Tensor) -> "Images":
        """The images at `indices` [M], in that order, copied."""
        return Images(self.pixels[indices], self.labels[indices])


class ImageDataset(Dataset[tuple[Tensor, Tensor]]):
    """`Images` as a map-style data set: one index gives one sample, a list of indices gives a batch."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images.pixels[index], self.images.labels[index]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        return self.images.take(torch.as_tensor(indices))


class Collate:
    """Turns a gathered uint8 batch into normalised float32, augmented if asked.

    Random numbers come from torch's global generator.

    Args:
        white: the stored value that stands for 1.0; pixels are (stored / white - mean) / std.
        mean: per channel, on the scale [0, 1].
        std: likewise.
        crop_padding: see `augment`; 0 is off.
        flip: see `augment`.
    """

    def __init__(
        self, white: int, mean: Sequence[float], std: Sequence[float], *, crop_padding: int = 0, flip: bool = False
    ) -> None:
        self.white, self.crop_padding, self.flip = white, crop_padding, flip
        self.mean = torch.tensor(mean).view(-1, 1, 1)
        self.std = torch.tensor(std).view(-1, 1, 1)

    def __call__(self, batch: Any) -> tuple[Tensor, Tensor]:
        """(uint8 [N, C, H, W], int64 [N]) to (float32 [N, C, H, W], int64 [N])."""
        x, y = batch  # torch types it as a list of samples; it is what `__getitems__` returned
        if self.crop_padding or self.flip:
            x = augment(x, crop_padding=self.crop_padding, flip=self.flip)
        return (x.float() / self.white - self.mean.to(x.device)) / self.std.to(x.device), y


class Indices(NamedTuple):
    """A batch that is still to be made."""

    resident: int  # which images, and how they are collated: the place in a list of `Resident`
    indices: Tensor  # int64 [N]


class IndexDataset(Dataset[int]):
    """Stands for the images of a `Resident` in a loader whose batches are `Indices`."""

    def __init__(self, resident: int, count: int) -> None:
        self.resident, self.count = resident, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index

    def collate(self, indices: Sequence[int]) -> Indices:
        return Indices(self.resident, torch.as_tensor(indices))


class Resident:
    """Images that lie where their indices are, and are gathered, augmented and normalised there.

    Random numbers come from torch's generator of that device.

    Attributes:
        source: The images as they were given; `images` are copies elsewhere, once somebody has asked for a batch there.
    """

    def __init__(self, images: Images, collate: Collate) -> None:
        self.source = self.images = images
        self.collate = collate

    def __call__(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """int64 [N] to (float32 [N, C, H, W], int64 [N]), on the device of `indices`."""
        if self.images.labels.device != indices.device:
            self.images = Images(*(tensor.to(indices.device) for tensor in self.images))
        return self.collate(self.images.take(indices))


def augment(x: Tensor, *, crop_padding: int, flip: bool) -> Tensor:
    """Random crop and horizontal flip, drawn anew for each image, as one gather.

    Each image is padded by `crop_padding` zero (black) pixels on every side and cropped back to its size at a uniform
    offset; with `flip`, its columns are then read backwards with probability 1/2.

    Args:
        x: [N, C, H, W], of any type.

    Returns:
        a new tensor of x's shape and type.
    """
    n, _, height, width = x.shape
    padded = torch.nn.functional.pad(x, [crop_padding] * 4)
    top, left = torch.randint(2 * crop_padding + 1, (2, n, 1), device=x.device)
    rows = top + torch.arange(height, device=x.device)  # [N, H]
    columns = torch.arange(width, device=x.device).expand(n, width)
    if flip:
        columns = torch.where(torch.rand(n, 1, device=x.device) < 0.5, columns.flip(1), columns)
    columns = left + columns  # [N, W]
    each = torch.arange(n, device=x.device).view(n, 1, 1)
    # The sliced channel axis between indexed ones goes last: [N, H, W, C].
    return padded[each, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
