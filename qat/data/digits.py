"""The 1797 handwritten digits that come with scikit-learn: real images, no download, an epoch in a second.

8x8 pixels with 17 grey levels (NIST digits, 4x4 blocks counted; Alpaydin and Kaynak 1998, UCI "optdigits" test set).
"""

from collections.abc import Sequence

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from qat.data.batches import Images
from qat.data.module import ImageDataModule, require

VAL_IMAGES, TEST_IMAGES = 180, 360


class Digits(ImageDataModule):
    """1257 training, 180 validation and 360 test images of shape [1, 8, 8], every class in proportion in each split.

    Args:
        batch_size: samples in a batch.
        mean: pixel mean on the scale [0, 1], a list of one.
        std: pixel standard deviation, likewise.
        train_limit: train on so many samples; None for all. Likewise `val_limit` and `test_limit`.
        crop_padding: random crops of training images, padded by so many pixels; 0 for none.
        flip: flip half of the training images horizontally.
        split_seed: seed of the split and of the limits.
        num_workers: processes that prepare the batches; 0: none.
        on_device: keep the images where the model is, and make the batches there.
    """

    def __init__(
        self,
        batch_size: int = 64,
        mean: Sequence[float] = (0.3053,),
        std: Sequence[float] = (0.3760,),
        train_limit: int | None = None,
        val_limit: int | None = None,
        test_limit: int | None = None,
        crop_padding: int = 0,
        flip: bool = False,
        split_seed: int = 0,
        num_workers: int = 0,
        on_device: bool = False,
    ) -> None:
        super().__init__(
            white=16,
            mean=mean,
            std=std,
            batch_size=batch_size,
            train_limit=train_limit,
            val_limit=val_limit,
            test_limit=test_limit,
            crop_padding=crop_padding,
            flip=flip,
            split_seed=split_seed,
            num_workers=num_workers,
            on_device=on_device,
        )
        require("mean", list(mean), len(mean) == 1, "one number: digits are grey")

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
