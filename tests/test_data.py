"""The data modules: splits, batched fetching, augmentation, configurations, and what a wrong option says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from hydra.utils import get_class, instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from pytorch_lightning.utilities.data import _update_dataloader
from torch.utils.data import DataLoader, DistributedSampler

from qat.config.signature import Signature
from qat.data import Digits, ImageDataModule, Images
from qat.data.batches import Collate, ImageDataset, augment
from qat.errors import UserError
from qat.lightning import QATCallback
from qat.lightning.runs.evaluate import check_monitors
from qat.models import MLP

CONFIGS = Path(__file__).parents[1] / "configs"


def ready(data: ImageDataModule) -> ImageDataModule:
    data.setup()
    return data


def counting(n: int) -> Images:
    """n one-pixel images; image i holds the byte i and the label i."""
    return Images(torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1), torch.arange(n))


# Digits


def test_digits_splits_are_disjoint_stratified_and_complete():
    splits = ready(Digits()).splits
    assert {name: len(images.labels) for name, images in splits.items()} == {"train": 1257, "val": 180, "test": 360}
    pixels = torch.cat([images.pixels for images in splits.values()]).flatten(1)
    assert len(pixels.unique(dim=0)) == 1797  # no two digits are alike, so nothing is in two splits
    for images in splits.values():
        share = images.labels.bincount(minlength=10) / len(images.labels)
        assert share.min() > 0.09 and share.max() < 0.11


def test_digits_are_normalised_with_the_training_set_s_mean_and_deviation():
    x = torch.cat([x for x, _ in ready(Digits()).train_dataloader()])
    assert x.shape == (1257, 1, 8, 8)
    assert x.mean().abs() < 0.02 and (x.std() - 1).abs() < 0.02


def test_the_split_depends_on_its_own_seed_alone():
    torch.manual_seed(1)
    first = ready(Digits(split_seed=3)).splits["test"].pixels
    torch.manual_seed(2)
    assert torch.equal(first, ready(Digits(split_seed=3)).splits["test"].pixels)
    assert not torch.equal(first, ready(Digits(split_seed=4)).splits["test"].pixels)


def test_limits_keep_a_random_fixed_subset():
    data, whole = ready(Digits(train_limit=100, val_limit=90, test_limit=110)), ready(Digits())
    for name, limit in {"train": 100, "val": 90, "test": 110}.items():
        kept = data.splits[name]
        assert len(kept.labels) == limit
        assert not torch.equal(kept.pixels, whole.splits[name].pixels[:limit])
        assert len(kept.labels.unique()) == 10


# Fetching


def test_a_batch_is_fetched_by_one_call():
    calls = []

    class Counted(ImageDataset):
        def __getitems__(self, indices):
            calls.append(list(indices))
            return super().__getitems__(indices)

    batches = list(DataLoader(Counted(counting(10)), 4, collate_fn=Collate(1, [0.0], [1.0])))
    assert calls == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [y.tolist() for _, y in batches] == calls


def test_one_index_gives_one_sample():
    x, y = ImageDataset(counting(10))[7]
    assert (x.tolist(), y.item()) == ([[[7]]], 7)


def test_seeding_torch_reproduces_order_and_augmentation():
    reproduced(0)


def test_it_does_so_with_processes_that_prepare_batches():
    script = "import test_data; test_data.reproduced(2)"  # forks are no good for a process that runs tests
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def reproduced(workers: int) -> None:
    data = ready(Digits(crop_padding=1, flip=True, batch_size=100, num_workers=workers))

    loader = data.train_dataloader()

    def epoch(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return torch.cat([x for x, _ in loader])

    first, other = epoch(0), epoch(1)
    assert not torch.equal(first, other)
    assert torch.equal(epoch(0), first)  # whatever epochs there were between


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_batches_made_where_the_model_is_are_those_of_a_loader(precision, tmp_path):
    seen = []

    class Model(pl.LightningModule):
        def training_step(self, batch, batch_idx):
            seen.append(batch)

        validation_step = test_step = training_step

        def configure_optimizers(self):
            return None

    def run(**how):
        seen.clear()
        pl.seed_everything(0, verbose=False)
        data = Digits(crop_padding=1, flip=True, batch_size=300, **how)
        quiet = {name: False for name in ("logger", "enable_progress_bar", "enable_model_summary")}
        trainer = pl.Trainer(max_epochs=2, precision=precision, default_root_dir=tmp_path, accelerator="cpu", **quiet)
        trainer.fit(Model(), data)
        trainer.test(Model(), data, verbose=False)
        return list(seen)

    there, here = run(on_device=True), run()
    assert len(there) == len(here) == 15  # 2 x 5 in training, 3 in validation (one before it), 2 in the test
    for batch, expected in zip(there, here, strict=True):
        assert batch[0].dtype == expected[0].dtype
        assert all(map(torch.equal, batch, expected))


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true"])
def test_batches_made_where_the_model_is_serve_whoever_a_loader_serves(precision, tmp_path):
    """Probing and calibration, before the model has the trainer's precision and after; its own hook; predictions."""

    class Model(MLP):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            seen.append(len(batch[0]))
            return batch

        def predict_step(self, batch, batch_idx):
            return self(batch[0])

    seen: list[int] = []
    quiet = {name: False for name in ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")}
    trainer = pl.Trainer(
        max_epochs=1,
        precision=precision,
        default_root_dir=tmp_path,
        accelerator="cpu",
        callbacks=QATCallback({"weight": {"bits": 4}, "act": {"bits": 4}}),
        **quiet,
    )
    model, data = Model(), Digits(on_device=True, batch_size=300)
    trainer.fit(model, data)
    assert len(seen) > 5
    assert [len(y) for y in trainer.predict(model, data)] == [300, 60]


def test_what_is_looked_at_early_is_made_of_batches_on_a_device_and_torn_down_by_nobody(tmp_path):
    class Data(Digits):
        torn = 0

        def teardown(self, stage):
            self.torn += 1

    data = Data(on_device=True, batch_size=300)
    trainer = pl.Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False)
    check_monitors(trainer, MLP(), data, {"val_metric": "val/acc"})
    assert not data.torn
    trainer.validate(MLP(), data, verbose=False)
    assert data.torn == 1
    with pytest.raises(UserError, match=r"val_metric=val/ac: .* did you mean 'val/acc'"):
        check_monitors(trainer, MLP(), data, {"val_metric": "val/ac"})


def test_loaders_of_one_split_that_collate_differently_get_batches_of_their_own_on_a_device():
    data = ready(Digits(on_device=True, crop_padding=2, flip=True, batch_size=2000))
    loaders = data.train_dataloader(), data._loader("train", data.plain), data.train_dataloader()
    batches = [next(iter(loader)) for loader in loaders]
    x = data.transfer_batch_to_device(batches[1], torch.device("cpu"), 0)[0]
    assert torch.equal(x, data.plain(data.splits["train"].take(batches[1].indices))[0])
    assert batches[0].resident == batches[2].resident and len(data.resident) == 2


def test_a_model_keeps_its_own_transfer_hook():
    hook = "transfer_batch_to_device"
    assert hook not in vars(Digits()) and hook in vars(Digits(on_device=True))


def test_only_training_batches_are_shuffled_and_augmented():
    data = ready(Digits(crop_padding=2, flip=True))
    for split, loader in {"val": data.val_dataloader(), "test": data.test_dataloader()}.items():
        x, y = (torch.cat(parts) for parts in zip(*loader, strict=True))
        assert torch.equal(y, data.splits[split].labels)
        assert torch.equal(x, (data.splits[split].pixels.float() / 16 - 0.3053) / 0.3760)
    assert torch.equal(next(iter(data.predict_dataloader()))[0], next(iter(data.test_dataloader()))[0])
    plain = {tuple(p.flatten().tolist()) for p in (data.splits["train"].pixels.float() / 16 - 0.3053) / 0.3760}
    augmented = torch.cat([x for x, _ in data.train_dataloader()])
    assert sum(tuple(p.flatten().tolist()) in plain for p in augmented) < 0.1 * len(augmented)  # 1/50 are the identity


def test_lightning_s_distributed_sampler_shares_every_sample_between_ranks_in_batches():
    data = ready(Digits(batch_size=50))
    loader = data.train_dataloader()
    seen = []
    for rank in range(2):
        sampler = DistributedSampler(loader.dataset, num_replicas=2, rank=rank, shuffle=True, seed=5)
        shard = _update_dataloader(loader, sampler)
        batches = list(shard)
        assert [len(y) for _, y in batches[:-1]] == [50] * (len(batches) - 1)
        seen.append(torch.cat([x for x, _ in batches]))
    together = torch.cat(seen).flatten(1)
    assert len(together) == 1258  # 1257, and one repeated so that both ranks have as many
    assert len(together.unique(dim=0)) == 1257


# Augmentation


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(1, 5), channels=st.sampled_from([1, 3]), height=st.integers(1, 7), width=st.integers(1, 7),
    padding=st.integers(0, 3), flip=st.booleans(), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_every_augmented_image_is_some_crop_of_the_padded_image_or_of_its_mirror(
    n, channels, height, width, padding, flip, seed
):
    torch.manual_seed(seed)
    x = torch.randint(0, 256, (n, channels, height, width), dtype=torch.uint8)
    out = augment(x, crop_padding=padding, flip=flip)
    assert (out.shape, out.dtype) == (x.shape, x.dtype)
    padded = torch.nn.functional.pad(x, [padding] * 4)
    for image, result in zip(padded, out, strict=True):
        offsets = [(i, j) for i in range(2 * padding + 1) for j in range(2 * padding + 1)]
        crops = [image[:, i : i + height, j : j + width] for i, j in offsets]
        crops += [crop.flip(-1) for crop in crops] if flip else []
        assert any(torch.equal(result, crop) for crop in crops)


def test_offsets_and_flips_are_drawn_per_image_and_uniformly():
    torch.manual_seed(0)
    x = torch.zeros(9000, 1, 3, 3)
    x[:, :, 1, 0] = 1.0  # left of the middle: the result tells offset and flip
    out = augment(x, crop_padding=1, flip=True)[:, 0]
    inside = out.sum((1, 2))
    assert inside.mean() == pytest.approx(2 / 3, abs=0.02)  # one of the three horizontal offsets crops the pixel off
    left, right = out[:, :, 0].sum(), out[:, :, 2].sum()
    assert (left / (left + right)).item() == pytest.approx(0.5, abs=0.03)
    rows = out.sum((0, 2)) / inside.sum()
    assert torch.allclose(rows, torch.full((3,), 1 / 3), atol=0.03)


# Mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"batch_size": 0}, r"data\.batch_size=0: expected at least 1", id="batch-size"),
        pytest.param({"train_limit": 0}, r"data\.train_limit=0", id="limit-zero"),
        pytest.param({"test_limit": 361}, r"data\.test_limit=361: expected at most 360", id="limit-too-large"),
        pytest.param({"crop_padding": -1}, r"data\.crop_padding=-1", id="padding"),
        pytest.param({"mean": [0.5] * 2}, r"data\.mean=\[0\.5, 0\.5\]", id="two-channels"),
        pytest.param({"mean": [0.5] * 3, "std": [0.5] * 3}, r"data\.mean=.*digits are grey", id="colour-digits"),
        pytest.param({"std": [0.0]}, r"data\.std=\[0\.0\]: expected 1 positive numbers, as in data\.mean", id="std"),
    ],
)
def test_a_bad_option_is_named(options, message):
    with pytest.raises(UserError, match=message):
        ready(Digits(**options))


def test_importing_the_data_modules_does_not_import_datasets():
    code = "import sys, qat.data; assert not {'datasets', 'PIL.Image'} & set(sys.modules) - before, 'imported'"
    code = "import sys, pytorch_lightning; before = set(sys.modules); " + code
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


# Configurations


@pytest.mark.parametrize(
    "file", sorted(CONFIGS.glob("data/*.yaml")) + sorted(CONFIGS.glob("model/*.yaml")), ids=lambda p: p.stem
)
def test_a_config_lists_every_option_of_its_class_with_a_comment_and_builds(file, tmp_path):
    config = OmegaConf.load(file)
    target = get_class(config["_target_"])
    assert set(config) == {"_target_", *Signature.of(target).takes}
    lines = file.read_text().splitlines()
    assert all("#" in line for line in lines if not line.startswith("_target_") and ":" in line and "std:" not in line)
    if config.get("path", "") is None:
        config.path = str(tmp_path / "some.txt")
        Path(config.path).write_text("what a file may hold " * 100)
    assert isinstance(instantiate(config), pl.LightningDataModule | pl.LightningModule)
