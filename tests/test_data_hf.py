"""Images from parquet files: decoding, the cache, and what a wrong folder, file or column says."""

import io
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from qat.data import HFImages
from qat.data.cache import cached
from qat.errors import UserError

SHARED = Path(__file__).parents[2] / "shared" / "data"
CONFIGS = Path(__file__).parents[1] / "configs"


def ready(data: HFImages) -> HFImages:
    data.setup()
    return data


def png(pixels: np.ndarray) -> dict[str, bytes]:
    image = pytest.importorskip("PIL.Image")
    buffer = io.BytesIO()
    image.fromarray(pixels).save(buffer, format="png")
    return {"bytes": buffer.getvalue()}


def image_of(i: int, size: int = 6) -> np.ndarray:
    """A random RGB image that is a function of i."""
    return np.random.default_rng(i).integers(0, 256, (size, size, 3), dtype=np.uint8)


def write_parquet(path: Path, images: list[np.ndarray], labels: list, columns: tuple[str, str] = ("image", "label")):
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    table = arrow.table({columns[0]: [png(image) for image in images], columns[1]: labels})
    pyarrow.parquet.write_table(table, path)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder with 12 + 8 training images in two files and 5 test images; label i is image i's."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    root = tmp_path / "images"
    root.mkdir()
    write_parquet(root / "train-00.parquet", [image_of(i) for i in range(12)], list(range(12)))
    write_parquet(root / "train-01.parquet", [image_of(i) for i in range(12, 20)], list(range(12, 20)))
    write_parquet(root / "test.parquet", [image_of(i) for i in range(20, 25)], list(range(20, 25)))
    return root


def rgb(root: Path | None, **options) -> HFImages:
    defaults = {"mean": [0.0] * 3, "std": [1.0] * 3, "val_fraction": 0.25, "cache_dir": None}
    return HFImages(root=root and str(root), **{**defaults, **options})


# Images from parquet files


def test_decoded_images_are_the_encoded_ones_bit_for_bit(folder):
    splits = ready(rgb(folder)).splits
    assert {name: len(images.labels) for name, images in splits.items()} == {"train": 15, "val": 5, "test": 5}
    for images in splits.values():
        for pixels, label in zip(images.pixels, images.labels, strict=True):
            assert np.array_equal(pixels.permute(1, 2, 0).numpy(), image_of(int(label)))
    assert splits["test"].labels.tolist() == [20, 21, 22, 23, 24]
    assert sorted(torch.cat([splits["train"].labels, splits["val"].labels]).tolist()) == list(range(20))


def test_one_mean_reads_images_as_grey(folder):
    images = ready(rgb(folder, mean=[0.0], std=[1.0])).splits["test"]
    weights = np.array([0.299, 0.587, 0.114])  # ITU-R 601 luma
    expected = np.stack([image_of(int(label)) @ weights for label in images.labels])
    assert images.pixels.shape == (5, 1, 6, 6)
    assert np.abs(images.pixels[:, 0].numpy() - expected).max() <= 1


def test_a_name_is_loaded_as_datasets_does_and_root_goes_before_it(folder):
    from_name = ready(rgb(None, name=str(folder))).splits  # a folder is a valid name, and needs no network
    for name, images in ready(rgb(folder, name="no/such-name")).splits.items():
        assert torch.equal(images.pixels, from_name[name].pixels)
        assert torch.equal(images.labels, from_name[name].labels)


def test_the_second_run_reads_the_cache_and_a_changed_source_does_not(folder, tmp_path, monkeypatch):
    cache = tmp_path / "new" / "cache"
    first = ready(rgb(folder, cache_dir=str(cache))).splits
    (kept,) = cache.iterdir()

    def refuse(*_, **__):
        raise AssertionError("decoded again")

    with monkeypatch.context() as patch:
        patch.setattr("qat.data.hf.decode_split", refuse)
        second = ready(rgb(folder, cache_dir=str(cache))).splits
        for name in first:
            assert torch.equal(first[name].pixels, second[name].pixels)
        with pytest.raises(AssertionError, match="decoded again"):
            ready(rgb(folder, cache_dir=str(cache), mean=[0.0], std=[1.0]))  # other channels, other tensors
    os.utime(folder / "test.parquet", ns=(1, 1))
    ready(rgb(folder, cache_dir=str(cache)))
    assert len(list(cache.iterdir())) == 2 and kept.exists()


def test_a_damaged_cache_file_is_made_anew(tmp_path):
    source = tmp_path / "source"
    source.write_bytes(b"x")
    made = cached(tmp_path / "cache", [source], [], lambda: {"a": torch.ones(3)})
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(file.read_bytes()[:-5])
    again = cached(tmp_path / "cache", [source], [], lambda: {"a": torch.ones(3)})
    assert torch.equal(again["a"], made["a"])
    assert torch.equal(cached(tmp_path / "cache", [source], [], dict)["a"], made["a"])


def test_a_write_that_fails_leaves_no_file_and_costs_a_warning(tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.write_bytes(b"x")

    def full(tensors, path):
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("qat.data.cache.save_file", full)
    with pytest.warns(UserWarning, match=r"data\.cache_dir=.*No space left"):
        assert cached(tmp_path / "cache", [source], [], lambda: {"a": torch.ones(3)})["a"].sum() == 3
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_missing_folder_or_file_names_the_key_and_the_path(tmp_path, folder):
    with pytest.raises(UserError, match=rf"data\.root={tmp_path}/nowhere: there is no such folder"):
        ready(rgb(tmp_path / "nowhere"))
    (folder / "test.parquet").rename(folder / "final.parquet")
    with pytest.raises(UserError, match=rf"data\.root={folder}: no test\*\.parquet .* holds final\.parquet, train-00"):
        ready(rgb(folder))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"image_column": "img"}, r"no column 'img'; data\.image_column .* 'image'|label", id="image"),
        pytest.param({"label_column": "lable"}, r"data\.label_column names it; did you mean 'label'", id="label"),
        pytest.param({"image_column": "label"}, r"data\.image_column=label holds no images", id="no-images"),
        pytest.param({"label_column": "image"}, r"data\.label_column=image must hold labels", id="no-labels"),
        pytest.param(
            {"val_fraction": 0.01}, r"data\.val_fraction=0\.01: expected a part of the 20", id="no-val-images"
        ),
    ],
)
def test_a_wrong_column_or_fraction_names_the_key_and_the_folder(folder, options, message):
    with pytest.raises(UserError, match=message) as error:
        ready(rgb(folder, **options))
    assert "val_fraction" in options or str(folder) in str(error.value)


def test_images_of_different_sizes_are_refused(folder):
    write_parquet(folder / "train-02.parquet", [image_of(0, size=7)], [0])
    with pytest.raises(UserError, match=r"images of one size are needed, found 6x6 and 7x7 \(image 20\)"):
        ready(rgb(folder))


def test_a_file_that_is_no_parquet_is_an_error_with_the_folder(folder):
    (folder / "test.parquet").write_bytes(b"not parquet")
    with pytest.raises(UserError, match=rf"data\.root={folder} could not be loaded"):
        ready(rgb(folder))


def test_without_a_name_and_a_folder_both_keys_are_named():
    with pytest.raises(UserError, match=r"data\.name and data\.root are null"):
        HFImages()


@pytest.mark.parametrize("package", ["datasets", "PIL.Image"])
def test_a_missing_package_names_the_extra(folder, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=r'pip install "qat\[hf\]"'):
        ready(rgb(folder))


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real images in {SHARED}")
@pytest.mark.parametrize("name", ["fashion_mnist", "cifar10"])
def test_the_real_files_have_the_configured_columns_and_statistics(name, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    table = parquet.read_table(SHARED / name / "test.parquet")
    parquet.write_table(table[:: len(table) // 1000], tmp_path / "test.parquet")
    parquet.write_table(table[:10], tmp_path / "train.parquet")
    data = ready(instantiate(OmegaConf.load(CONFIGS / "data" / f"{name}.yaml"), root=str(tmp_path), cache_dir=None))
    x = torch.cat([x for x, _ in data.test_dataloader()])
    assert x.mean((0, 2, 3)).abs().max() < 0.25  # cifar10.yaml has ImageNet's statistics: off by 0.18 and 0.17
    assert (x.std((0, 2, 3)) - 1).abs().max() < 0.25
