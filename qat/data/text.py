"""A text file as windows of characters, for language models over characters.

A sample is a window of `block` characters and the `block` characters one place further on: what comes next at every
position. The first part of the file is for training, the rest for evaluation. An epoch has as many training windows as
you say, each at a random place (a text has as many windows as characters, and an epoch through all of them says
nothing new); evaluation goes through the rest of the file once, in windows that do not overlap.

There is no third part: small texts have none to spare, and published losses are measured on this one. A "best"
checkpoint is therefore chosen on what it is reported on; the last one is not.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from qat.errors import UserError, nearest, require

Loader = DataLoader[tuple[Tensor, Tensor]]  # batches: int64 [N, block], int64 [N, block]


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Windows that do not overlap, each with what follows every character of it."""

    def __init__(self, codes: Tensor, block: int) -> None:
        self.codes, self.block = codes, block

    def __len__(self) -> int:
        return (len(self.codes) - 1) // self.block

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = self.__getitems__([index])
        return x[0], y[0]

    def starts(self, indices: Tensor) -> Tensor:
        """Where the windows of these indices [M] begin."""
        return indices * self.block

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        at = self.starts(torch.as_tensor(indices))[:, None] + torch.arange(self.block)
        return self.codes[at], self.codes[at + 1]


class RandomWindows(Windows):
    """`count` windows at places drawn anew each time, from torch's global generator."""

    def __init__(self, codes: Tensor, block: int, count: int) -> None:
        super().__init__(codes, block)
        self.count = count

    def __len__(self) -> int:
        return self.count

    def starts(self, indices: Tensor) -> Tensor:
        return torch.randint(len(self.codes) - self.block, indices.shape)


class Text(pl.LightningDataModule):
    """Loaders over the characters of one file; a character's code is its rank among those that occur.

    Args:
        path: the file, UTF-8.
        block: characters in a window.
        batch_size: windows in a batch; under DDP, in a batch of each process.
        train_windows: windows in an epoch of training.
        test_fraction: the last part of the file, for validation and test.

    Raises:
        UserError: an option is out of its range; on `setup`, there is no such file or it is too short.
    """

    def __init__(
        self,
        path: str | None = None,
        block: int = 64,
        batch_size: int = 12,
        train_windows: int = 1200,
        test_fraction: float = 0.1,
    ) -> None:
        super().__init__()
        if path is None:
            raise UserError("data.path is null: set it to a text file, data.path=FILE")
        for name, value in (("block", block), ("batch_size", batch_size), ("train_windows", train_windows)):
            require(f"data.{name}", value, value >= 1, "at least 1")
        require("data.test_fraction", test_fraction, 0 < test_fraction < 1, "a fraction between 0 and 1")
        self.path, self.block, self.batch_size = Path(path).expanduser(), block, batch_size
        self.train_windows, self.test_fraction = train_windows, test_fraction
        self.vocabulary = ""

    def prepare_data(self) -> None:
        """Finds out whether the file can be read."""
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Reads and splits the file, once."""
        if self.vocabulary:
            return
        text = self._read()
        self.vocabulary = "".join(sorted(set(text)))
        code_of = {character: code for code, character in enumerate(self.vocabulary)}
        codes = torch.tensor([code_of[character] for character in text])
        first = int((1 - self.test_fraction) * len(codes))
        self.train_codes, self.test_codes = codes[:first], codes[first:]
        for name, part in (("training", self.train_codes), ("test", self.test_codes)):
            if len(part) <= self.block:
                raise UserError(
                    f"data.path={self.path}: its {name} part has {len(part)} characters, "
                    f"too few for a window of data.block={self.block}"
                )

    def _read(self) -> str:
        if not self.path.is_file():
            siblings = [p.name for p in self.path.parent.iterdir()] if self.path.parent.is_dir() else []
            raise UserError(f"data.path={self.path}: no such file{nearest(self.path.name, siblings)}")
        try:
            return self.path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise UserError(f"data.path={self.path}: is no UTF-8 text") from None

    def train_dataloader(self) -> Loader:
        """Batches of windows at random places."""
        return self._loader(RandomWindows(self.train_codes, self.block, self.train_windows))

    def val_dataloader(self) -> Loader:
        """The test batches."""
        return self.test_dataloader()

    def test_dataloader(self) -> Loader:
        """The last part of the file in windows that do not overlap; a rest shorter than a window is left out."""
        return self._loader(Windows(self.test_codes, self.block), 8)

    def predict_dataloader(self) -> Loader:
        """The test batches."""
        return self.test_dataloader()

    def _loader(self, windows: Windows, factor: int = 1) -> Loader:
        """Evaluation keeps nothing for backward, so its batches can be larger by a factor."""
        return DataLoader(windows, batch_size=factor * self.batch_size, collate_fn=_whole)


def _whole(batch: Any) -> tuple[Tensor, Tensor]:
    """The collate function: `__getitems__` has returned a batch already."""
    return batch
