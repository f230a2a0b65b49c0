"""Image classification sets in the layout of Hugging Face `datasets`, from the hub or from a folder of parquet files.

The images are decoded once, into one uint8 tensor per split that stays in memory: 60,000 of 28x28 grey pixels are 47
MB, the 60,000 of CIFAR-10 184 MB. Decoding takes PIL about 0.1 ms an image, seconds in all, so the tensors are kept
on disk as well (`qat.data.cache`), and later runs start in a fraction of a second.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor

from qat.data.batches import Images
from qat.data.cache import cached
from qat.data.decode import SPLITS, decode_split, load_splits
from qat.data.module import ImageDataModule, Loading
from qat.errors import UserError, require


class HFImages(ImageDataModule):
    """Train and test as they are published; validation is a random part of train.

    Args:
        name: data set on the hub, such as "uoft-cs/cifar10"; not read when `root` is given.
        root: folder with train*.parquet and test*.parquet, to work offline.
        image_column: column of encoded images; all must have the same size.
        label_column: column of integer labels.
        mean: per-channel mean on the scale [0, 1]. Its length, 1 or 3, decides whether images are read as grey or RGB.
        std: per-channel standard deviation, likewise.
        batch_size: samples in a batch; under DDP, in a batch of each process.
        val_fraction: fraction of the training images set apart for validation.
        cache_dir: folder for the decoded images; None to decode on every run.
        loading: see `ImageDataModule`.

    Raises:
        UserError: an option is out of its range; on `setup`, files, columns or the package `datasets` are missing.
    """

    def __init__(
        self,
        name: str | None = None,
        root: str | None = None,
        image_column: str = "image",
        label_column: str = "label",
        mean: Sequence[float] = (0.5,),
        std: Sequence[float] = (0.5,),
        batch_size: int = 128,
        val_fraction: float = 0.1,
        cache_dir: str | None = "~/.cache/qat",
        **loading: Unpack[Loading],
    ) -> None:
        super().__init__(white=255, mean=mean, std=std, batch_size=batch_size, **loading)
        require("data.val_fraction", val_fraction, 0 < val_fraction < 1, "a fraction between 0 and 1")
        if name is None and root is None:
            raise UserError(
                "data.name and data.root are null: set one, a data set on the hub or a folder of parquet files"
            )
        self.name, self.val_fraction = name, val_fraction
        self.root = Path(root).expanduser() if root is not None else None
        self.columns = (image_column, label_column)
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir is not None else None

    def load(self) -> dict[str, Images]:
        """Decodes both published splits, or reads them from the cache, and splits validation off train."""
        tensors = self._from_hub(str(self.name)) if self.root is None else self._from_folder(self.root)
        train, test = (Images(tensors[f"{split}.pixels"], tensors[f"{split}.labels"]) for split in SPLITS)
        count = len(train.labels)
        val_count = round(self.val_fraction * count)
        require("data.val_fraction", self.val_fraction, 0 < val_count < count, f"a part of the {count} training images")
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self.split_seed))
        return {"train": train.take(order[val_count:]), "val": train.take(order[:val_count]), "test": test}

    def _from_folder(self, root: Path) -> dict[str, Tensor]:
        where = f"data.root={root}"
        files = parquet_files(root)
        data_files = {split: [str(path) for path in paths] for split, paths in files.items()}
        sources = [path for paths in files.values() for path in paths]
        make = partial(self._decode, where, lambda: load_splits(where, "parquet", data_files))
        return cached(self.cache_dir, sources, [*self.columns, self.channels], make)

    def _from_hub(self, name: str) -> dict[str, Tensor]:
        where = f"data.name={name}"
        splits = load_splits(where, name)
        sources = [Path(file["filename"]) for split in splits.values() for file in split.cache_files]
        make = partial(self._decode, where, lambda: splits)
        return cached(self.cache_dir, sources, [name, *self.columns, self.channels], make)

    def _decode(self, where: str, load: Callable[[], Mapping[str, Any]]) -> dict[str, Tensor]:
        image, label = self.columns
        tensors = {}
        for name, split in load().items():
            pixels, labels = decode_split(where, split, image_column=image, label_column=label, channels=self.channels)
            tensors |= {f"{name}.pixels": pixels, f"{name}.labels": labels}
        return tensors


def parquet_files(root: Path) -> dict[str, list[Path]]:
    """The files train*.parquet and test*.parquet of a folder, sorted; a UserError where there are none."""
    if not root.is_dir():
        raise UserError(f"data.root={root}: there is no such folder")
    files = {split: sorted(root.glob(f"{split}*.parquet")) for split in SPLITS}
    for split, found in files.items():
        if not found:
            others = ", ".join(sorted(path.name for path in root.iterdir())[:8]) or "nothing"
            raise UserError(f"data.root={root}: no {split}*.parquet in this folder, which holds {others}")
    return files
