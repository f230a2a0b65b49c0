"""The 1797 handwritten digits that come with scikit-learn: real images, no download, an epoch in a second.

8x8 pixels with 17 grey levels (NIST digits, 4x4 blocks counted; Alpaydin and Kaynak 1998, UCI "optdigits" test set).
"""

from collections.abc import Sequence
from typing import Unpack

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from qat.data.batches import Images
from qat.data.module import ImageDataModule, Loading
from qat.errors import require

VAL_IMAGES, TEST_IMAGES = 180, 360


class Digits(ImageDataModule):
    """1257 training, 180 validation and 360 test images of shape [1, 8, 8], every class in proportion in each split.

    Args:
        batch_size: samples in a batch.
        mean: pixel mean on the scale [0, 1], a list of one.
        std: pixel standard deviation, likewise.
        loading: see `ImageDataModule`.
    """

    def __init__(
        self,
        batch_size: int = 64,
        mean: Sequence[float] = (0.3053,),
        std: Sequence[float] = (0.3760,),
        **loading: Unpack[Loading],
    ) -> None:
        super().__init__(white=16, mean=mean, std=std, batch_size=batch_size, **loading)
        require("data.mean", list(mean), len(mean) == 1, "one number: digits are grey")

    def load(self) -> dict[str, Images]:
        """Reads scikit-learn's copy and splits it, stratified."""
        pixels, labels = load_digits(return_X_y=True)
        images = Images(torch.tensor(pixels, dtype=torch.uint8).view(-1, 1, 8, 8), torch.tensor(labels))
        rest, test = train_test_split(
            range(len(labels)), test_size=TEST_IMAGES, stratify=labels, random_state=self.split_seed
        )
        train, val = train_test_split(rest, test_size=VAL_IMAGES, stratify=labels[rest], random_state=self.split_seed)
        return {
            name: images.take(torch.tensor(part)) for name, part in (("train", train), ("val", val), ("test", test))
        }
