"""Base class of the data modules here: splits, limits, augmentation, loaders; a subclass only reads the images.

Every random choice is reproducible. The split and the samples that a limit keeps come from a generator of their own,
seeded by `split_seed`, so that runs with different training seeds are compared on the same validation images. Order
and augmentation come from torch's global generator, which `seed_everything` sets.
"""

import math
from collections.abc import Sequence
from typing import Any, TypedDict

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from qat.data.batches import Collate, ImageDataset, Images, IndexDataset, Indices, Resident
from qat.errors import require
from qat.lightning.steps import precision_plugin

Loader = DataLoader[Any]  # batches: float32 [N, C, H, W], int64 [N]; or `Indices`


class Loading(TypedDict, total=False):
    """The options that every subclass passes on to `ImageDataModule`, which documents them."""

    train_limit: int | None
    val_limit: int | None
    test_limit: int | None
    crop_padding: int
    flip: bool
    split_seed: int
    num_workers: int
    on_device: bool


class ImageDataModule(pl.LightningDataModule):
    """Loaders over three `Images` in memory.

    Args:
        white: the stored pixel value that stands for 1.0.
        mean: per-channel mean on the scale [0, 1]; its length is the number of channels.
        std: per-channel standard deviation, likewise.
        batch_size: samples in a batch; under DDP, in a batch of each process.
        train_limit: train on so many samples, chosen at random once; None for all.
        val_limit: likewise for validation.
        test_limit: likewise for test and predict.
        crop_padding: random crops of training images, padded by so many pixels; 0 for none.
        flip: flip half of the training images horizontally.
        split_seed: seed of the split and of the limits.
        num_workers: processes that prepare the batches, on a machine whose GPU would wait for them; 0: none.
        on_device: keep the images where the model is, and make the batches there. A loader then yields `Indices`, from
            which Lightning's transfer makes a batch.

    Raises:
        UserError: an option is out of its range, or on `setup` a limit exceeds what there is.
    """

    def __init__(
        self,
        *,
        white: int,
        mean: Sequence[float],
        std: Sequence[float],
        batch_size: int,
        train_limit: int | None = None,
        val_limit: int | None = None,
        test_limit: int | None = None,
        crop_padding: int = 0,
        flip: bool = False,
        split_seed: int = 0,
        num_workers: int = 0,
        on_device: bool = False,
    ) -> None:
        super().__init__()
        limits = {"train": train_limit, "val": val_limit, "test": test_limit}
        for name, limit in limits.items():
            require(f"data.{name}_limit", limit, limit is None or limit >= 1, "at least 1, or null for all")
        require("data.batch_size", batch_size, batch_size >= 1, "at least 1")
        require("data.crop_padding", crop_padding, crop_padding >= 0, "0 or more pixels")
        require("data.num_workers", num_workers, num_workers >= 0, "0 or more processes")
        require("data.split_seed", split_seed, 0 <= split_seed < 2**32, f"a seed from 0 to {2**32 - 1}")
        finite = all(map(math.isfinite, mean))
        require("data.mean", list(mean), len(mean) in (1, 3) and finite, "one number per channel, 1 or 3 of them")
        positive = len(std) == len(mean) and all(0 < value < math.inf for value in std)
        require("data.std", list(std), positive, f"{len(mean)} positive numbers, as in data.mean")
        self.batch_size, self.limits, self.split_seed = batch_size, limits, split_seed
        alone = not (on_device and num_workers)
        require("data.on_device", on_device, alone, "false, as data.num_workers prepare batches")
        self.num_workers, self.on_device = num_workers, on_device
        self.channels = len(mean)
        self.plain = Collate(white, mean, std)
        self.augmented = Collate(white, mean, std, crop_padding=crop_padding, flip=flip)
        self.splits: dict[str, Images] = {}
        self.resident: list[Resident] = []
        if on_device:  # of the object, not the class, whose hook would keep Lightning from calling the model's own
            self.transfer_batch_to_device = self._make_batch

    def load(self) -> dict[str, Images]:
        """Reads the images and returns them as "train", "val" and "test"; all of them, without limits."""
        raise NotImplementedError

    def prepare_data(self) -> None:
        """Loads in one process first, so that under DDP only one downloads and decodes."""
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Loads and limits all three splits, once."""
        if not self.splits:
            self.splits = {name: self._limited(name, images) for name, images in self.load().items()}

    def train_dataloader(self) -> Loader:
        """Shuffled, augmented batches; the last may be smaller."""
        return self._loader("train", self.augmented, shuffle=True)

    def val_dataloader(self) -> Loader:
        """Validation batches in a fixed order, not augmented."""
        return self._loader("val", self.plain)

    def test_dataloader(self) -> Loader:
        """Test batches in a fixed order, not augmented."""
        return self._loader("test", self.plain)

    def predict_dataloader(self) -> Loader:
        """The test batches."""
        return self.test_dataloader()

    def _make_batch(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """A loader's batch on `device`; `Indices` become images in the trainer's precision."""
        batch = super().transfer_batch_to_device(batch, device, dataloader_idx)
        if not isinstance(batch, Indices):
            return batch
        images = self.resident[batch.resident](batch.indices)
        module = self.trainer and self.trainer.lightning_module
        return images if module is None else precision_plugin(module).convert_input(images)

    def _loader(self, split: str, collate: Collate, shuffle: bool = False) -> Loader:
        if self.on_device:
            images = self.splits[split]
            known = (i for i, r in enumerate(self.resident) if r.source is images and r.collate is collate)
            place = next(known, len(self.resident))
            if place == len(self.resident):
                self.resident.append(Resident(images, collate))
            indices = IndexDataset(place, len(images.labels))
            # By name: Lightning makes such loaders again, with samplers of its own.
            return DataLoader(indices, batch_size=self.batch_size, shuffle=shuffle, collate_fn=indices.collate)
        # New processes for each epoch: those that stay would draw on where the last epoch left their random numbers.
        return DataLoader(
            ImageDataset(self.splits[split]),
            batch_size=self.batch_size,
            shuffle=shuffle,
            collate_fn=collate,
            num_workers=self.num_workers,
            pin_memory=self.num_workers > 0 and torch.cuda.is_available(),
        )

    def _limited(self, name: str, images: Images) -> Images:
        limit, count = self.limits[name], len(images.labels)
        if limit is None or limit == count:
            return images
        require(
            f"data.{name}_limit", limit, limit < count, f"at most {count}, the number of {name} images, or null for all"
        )
        # At random, because files are often sorted by label.
        return images.take(torch.randperm(count, generator=torch.Generator().manual_seed(self.split_seed))[:limit])
