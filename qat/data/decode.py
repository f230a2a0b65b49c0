"""From a Hugging Face data set to tensors: the only file that imports `datasets` and PIL, and only when called.

Images are read as bytes and decoded here: going through the column's own decoding took 1.3 times (CIFAR-10) to 2.5
times (Fashion-MNIST) as long, and the number of channels is ours to choose (Fashion-MNIST is often stored as RGB).
"""

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from qat.errors import UserError, nearest

if TYPE_CHECKING:
    from datasets import Dataset

SPLITS = ("train", "test")


def load_splits(where: str, path: str, data_files: Mapping[str, list[str]] | None = None) -> dict[str, "Dataset"]:
    """Opens the published splits "train" and "test", downloading them if need be.

    Args:
        where: the config key and value that an error names.
        path: what `datasets.load_dataset` takes first: a name on the hub, or "parquet".
        data_files: the files of each split, for "parquet".

    Raises:
        UserError: `datasets` is not installed, or the data can't be had.
    """
    try:
        import datasets
        import PIL.Image  # noqa: F401  decoding needs it; say so before a long download
    except ImportError as error:
        raise UserError(f'{where}: reading it needs the package {error.name}: pip install "qat[hf]"') from error
    try:
        found = datasets.load_dataset(path, data_files=data_files)
    except Exception as error:  # files, HTTP client, hub and Arrow have no common base class
        reason = f"{type(error).__name__}: {error.__cause__ or error}"
        raise UserError(
            f"{where} could not be loaded ({reason}); to work offline, set data.root to a folder"
        ) from error
    if missing := [split for split in SPLITS if split not in found]:
        raise UserError(f"{where}: no split {missing[0]!r}; it has {', '.join(map(str, found))}")
    return {split: found[split] for split in SPLITS}


def decode_split(
    where: str, split: "Dataset", *, image_column: str, label_column: str, channels: int
) -> tuple[Tensor, Tensor]:
    """Decodes one split.

    Args:
        where: the config key and value that an error names.
        split: an opened split.
        image_column: its column of encoded images.
        label_column: its column of integer labels.
        channels: 1 to read images as grey, 3 as RGB.

    Returns:
        pixels uint8 [N, channels, H, W] and labels int64 [N].

    Raises:
        UserError: a column is missing or of the wrong kind, or the images differ in size.
    """
    import datasets

    for key, column in (("image_column", image_column), ("label_column", label_column)):
        if column not in split.column_names:
            hint = nearest(column, split.column_names)
            raise UserError(f"{where}: there is no column {column!r}; data.{key} names it{hint}")
    try:
        encoded = split.cast_column(image_column, datasets.Image(decode=False))[image_column]
    except (TypeError, ValueError, NotImplementedError) as error:
        raise UserError(
            f"{where}: data.image_column={image_column} holds no images but {split.features[image_column]}"
        ) from error
    labels = np.asarray(split[label_column][:])
    if labels.dtype.kind not in "iu" or labels.min() < 0:
        raise UserError(f"{where}: data.label_column={label_column} must hold labels from 0 up, found {labels[:3]}...")
    pixels: np.ndarray | None = None
    for i, cell in enumerate(track(encoded, f"decoding {where}", total=len(split), transient=True)):
        image = _pixels(cell, channels)
        if pixels is None:
            pixels = np.empty((len(split), *image.shape), np.uint8)
        if image.shape != pixels.shape[1:]:
            sizes = f"{pixels.shape[1]}x{pixels.shape[2]} and {image.shape[0]}x{image.shape[1]}"
            raise UserError(f"{where}: images of one size are needed, found {sizes} (image {i})")
        pixels[i] = image
    assert pixels is not None  # an empty label column has no minimum, and ended above
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels.astype(np.int64))


def _pixels(cell: dict[str, Any], channels: int) -> np.ndarray:
    """One encoded image {"bytes", "path"} as uint8 [H, W, channels]."""
    from PIL import Image

    mode = "L" if channels == 1 else "RGB"
    with Image.open(io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else cell["path"]) as image:
        return np.asarray(image if image.mode == mode else image.convert(mode)).reshape(
            image.height, image.width, channels
        )
