"""The reference models: shapes, names, hyperparameters, schedule, and the accuracy of the pretrained ResNet."""

import math
import re
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from safetensors.torch import load_file, safe_open
from torch.utils.data import DataLoader

from qat.data import Digits, HFImages, Text
from qat.errors import UserError
from qat.lightning import load_weights
from qat.models import GPT, MLP, Classifier, ResNet, SmallCNN
from qat.models.classifier import cosine_factor

DATA = Path(__file__).parents[2] / "shared" / "data"
PRETRAINED = DATA / "pretrained"
needs_data = pytest.mark.skipif(not PRETRAINED.is_dir(), reason=f"no pretrained weights in {PRETRAINED}")

BUILD = [
    pytest.param(lambda **kw: MLP(64, 10, 16, **kw), (1, 8, 8), id="mlp"),
    pytest.param(lambda **kw: SmallCNN(1, 10, 8, **kw), (1, 8, 8), id="cnn-8x8"),
    pytest.param(lambda **kw: SmallCNN(3, 10, 8, **kw), (3, 28, 28), id="cnn-28x28-rgb"),
    pytest.param(lambda **kw: ResNet(8, 3, 10, **kw), (3, 32, 32), id="resnet8"),
    pytest.param(lambda **kw: ResNet(8, 1, 10, **kw), (1, 28, 28), id="resnet8-grey"),
]


def quiet_trainer(**options) -> pl.Trainer:
    defaults = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return pl.Trainer(**{**defaults, "enable_model_summary": False, **options})


def random_batches(shape: tuple[int, ...], batches: int = 4, size: int = 4) -> DataLoader:
    """Loader of `batches` batches of noise, each of `size` images."""
    x = torch.randn(batches * size, *shape)
    return DataLoader(list(zip(x, torch.arange(len(x)) % 10, strict=True)), batch_size=size)


@pytest.mark.parametrize(("build", "shape"), BUILD)
def test_every_parameter_gets_a_gradient(build, shape):
    model: Classifier = build()
    logits = model(torch.randn(4, *shape))
    assert logits.shape == (4, 10)
    torch.nn.functional.cross_entropy(logits, torch.arange(4)).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(("build", "shape"), BUILD)
def test_a_checkpoint_brings_back_the_model_without_its_arguments(build, shape, tmp_path):
    model = build(lr=0.05, momentum=0.8, optimizer="sgd")
    trainer = quiet_trainer(max_epochs=1, default_root_dir=tmp_path)
    trainer.fit(model, random_batches(shape))
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = type(model).load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    x = torch.randn(2, *shape)
    assert torch.equal(loaded.eval()(x), model.eval()(x))
    assert loaded.hparams == model.hparams
    assert loaded.hparams["lr"] == 0.05
    assert all(isinstance(value, str | int | float) for value in loaded.hparams.values())


def test_the_logged_metrics_are_the_whole_set_s_loss_and_accuracy_in_every_stage():
    torch.manual_seed(0)
    model, loader = MLP(64, 10, 16, lr=1e-9), random_batches((1, 8, 8), batches=3, size=7)
    x, y = (torch.cat(parts) for parts in zip(*loader, strict=True))
    logits = model(x)
    expected = {"loss": torch.nn.functional.cross_entropy(logits, y), "acc": (logits.argmax(1) == y).float().mean()}
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(model, loader, loader)
    fitted = dict(trainer.callback_metrics)
    trainer.test(model, loader, verbose=False)
    assert set(fitted) == {"train/loss", "val/loss", "val/acc"}
    for name, value in (fitted | trainer.callback_metrics).items():
        assert value == pytest.approx(expected[name.split("/")[1]].item(), rel=1e-5), name


def test_predict_returns_the_logits():
    model, loader = MLP(64, 10, 16), random_batches((1, 8, 8), batches=1)
    (logits,) = quiet_trainer().predict(model, loader)
    assert torch.equal(logits, model(next(iter(loader))[0]))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param(
            {"optimizer": "sgd", "momentum": 0.8},
            (torch.optim.SGD, {"momentum": 0.8, "nesterov": True, "weight_decay": 0.02}),
            id="sgd",
        ),
        pytest.param(
            {"optimizer": "sgd", "momentum": 0.0},
            (torch.optim.SGD, {"momentum": 0.0, "nesterov": False, "weight_decay": 0.02}),
            id="sgd-without-momentum",
        ),
        pytest.param(
            {"optimizer": "adamw", "momentum": 0.8},
            (torch.optim.AdamW, {"betas": (0.8, 0.999), "weight_decay": 0.02}),
            id="adamw",
        ),
    ],
)
def test_every_hyperparameter_reaches_the_optimizer(options, expected):
    model = MLP(64, 10, 16, lr=0.03, weight_decay=0.02, **options)
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(model, random_batches((1, 8, 8)))
    (optimizer,) = trainer.optimizers
    kind, settings = expected
    assert type(optimizer) is kind
    assert {key: optimizer.param_groups[0][key] for key in settings} == settings
    assert optimizer.param_groups[0]["initial_lr"] == 0.03


class RecordLR(pl.Callback):
    """Learning rate of every optimizer step, as used."""

    def __init__(self):
        self.lrs = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.lrs.append(optimizer.param_groups[0]["lr"])


def test_the_learning_rate_follows_the_formula_at_every_step():
    record, total, warm = RecordLR(), 20, 4
    model = MLP(64, 10, 16, lr=0.5, warmup=0.2)
    quiet_trainer(max_epochs=5, callbacks=[record]).fit(model, random_batches((1, 8, 8), batches=4))
    rising = [0.5 * (t + 1) / warm for t in range(warm)]
    falling = [0.25 * (1 + math.cos(math.pi * (t - warm) / (total - warm))) for t in range(warm, total)]
    assert record.lrs == pytest.approx(rising + falling)


@pytest.mark.parametrize("warmup", [0, 3])
def test_the_schedule_ends_at_zero_and_stays_there(warmup):
    assert cosine_factor(10, total=10, warmup=warmup) == 0
    assert cosine_factor(25, total=10, warmup=warmup) == 0


def test_an_endless_run_is_refused_because_the_cosine_has_no_end():
    with pytest.raises(UserError, match=r"trainer\.max_epochs"):
        quiet_trainer(max_epochs=-1).fit(MLP(64, 10, 16), random_batches((1, 8, 8)))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        pytest.param(
            lambda: MLP(optimizer="adam"), "optimizer='adam' is unknown; did you mean 'adamw'", id="optimizer"
        ),
        pytest.param(lambda: MLP(lr=0.0), "lr=0.0: expected a positive number", id="lr"),
        pytest.param(lambda: MLP(weight_decay=-1.0), "weight_decay=-1.0", id="weight-decay"),
        pytest.param(lambda: MLP(momentum=1.0), "momentum=1.0", id="momentum"),
        pytest.param(lambda: MLP(warmup=1.5), "warmup=1.5: expected a fraction", id="warmup"),
        pytest.param(lambda: MLP(num_classes=1), "num_classes=1", id="classes"),
        pytest.param(lambda: MLP(width=0), "width=0", id="mlp-width"),
        pytest.param(lambda: SmallCNN(width=0), "width=0", id="cnn-width"),
        pytest.param(
            lambda: ResNet(depth=21), "depth=21: expected 6n + 2, such as 20 or 56; the nearest is 20", id="depth"
        ),
        pytest.param(lambda: ResNet(depth=2), "depth=2: .* the nearest is 8", id="depth-too-small"),
        pytest.param(lambda: ResNet(depth=-4), "depth=-4: .* the nearest is 8", id="depth-negative"),
    ],
)
def test_a_bad_hyperparameter_is_named(build, message):
    with pytest.raises(UserError, match=message.replace("+", r"\+")):
        build()


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        pytest.param(MLP(64), (1, 28, 28), "set model.in_features=784", id="mlp"),
        pytest.param(SmallCNN(1), (3, 8, 8), "set model.in_channels=3", id="cnn"),
        pytest.param(ResNet(8, 3), (1, 28, 28), "set model.in_channels=1", id="resnet"),
        pytest.param(
            ResNet(8, 3), (28,), r"expected a batch of images \[N, C, H, W\], got the shape \[4, 28\]", id="no-images"
        ),
    ],
)
@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_data_that_does_not_fit_the_model_says_what_to_set(model, shape, message, stage):
    with pytest.raises(UserError, match=message):
        getattr(quiet_trainer(max_epochs=1), stage)(model, random_batches(shape))


def test_the_shortcut_subsamples_and_pads_zero_channels():
    block = ResNet(8).layer2[0].eval()
    torch.nn.init.zeros_(block.bn2.weight)  # the conv branch is zero: only the shortcut is left
    x = torch.rand(2, 16, 6, 6)
    y = block(x)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any() and not y[:, 24:].any()


def test_small_cnn_learns_the_digits():
    pl.seed_everything(0, verbose=False)
    model, data = SmallCNN(lr=0.1, weight_decay=5e-4, warmup=0.1), Digits()
    trainer = quiet_trainer(max_epochs=5)
    trainer.fit(model, data)
    assert trainer.test(model, data, verbose=False)[0]["test/acc"] >= 0.97  # 0.98 to 0.99 over three seeds


@needs_data
@pytest.mark.parametrize("depth", [20, 56])
def test_the_pretrained_file_has_exactly_the_model_s_names_and_shapes(depth):
    with safe_open(PRETRAINED / f"resnet{depth}_cifar10.safetensors", "pt") as file:
        published = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118  not a dict
    state = ResNet(depth).state_dict()
    own = {key: tuple(value.shape) for key, value in state.items() if not key.endswith("num_batches_tracked")}
    assert own == published


@needs_data
def test_pretrained_resnet20_keeps_its_accuracy_on_a_thousand_test_images(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(DATA / "cifar10" / "test.parquet")
    parquet.write_table(table[:1000], tmp_path / "test.parquet")
    parquet.write_table(table[:10], tmp_path / "train.parquet")
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    data = HFImages(root=str(tmp_path), image_column="img", mean=mean, std=std, cache_dir=None)
    model = ResNet(20)
    model.load_state_dict(load_file(PRETRAINED / "resnet20_cifar10.safetensors"))
    accuracy = quiet_trainer().test(model, data, verbose=False)[0]["test/acc"]
    assert abs(accuracy - 0.9173) < 3 * math.sqrt(
        0.9173 * 0.0827 / 1000
    )  # three standard errors around the whole set's


# -- the character GPT -------------------------------------------------------------------------------------------------


@pytest.fixture
def verse(tmp_path) -> Path:
    path = tmp_path / "verse.txt"
    path.write_text("to be, or not to be, that is the question:\n" * 20, encoding="utf-8")
    return path


def test_the_pretrained_gpt_reproduces_its_published_loss():
    text, weights = DATA / "text" / "tinyshakespeare.txt", PRETRAINED / "chargpt_shakespeare.safetensors"
    if not (text.is_file() and weights.is_file()):
        pytest.skip(f"no {text.name} and {weights.name} in {DATA}")
    model, data = GPT(), Text(str(text))
    load_weights(model, weights)
    result = quiet_trainer().test(model, data, verbose=False)[0]
    assert result["test/loss"] == pytest.approx(1.9069, abs=5e-5)


def test_a_character_s_logits_depend_on_nothing_behind_it():
    model = GPT(num_classes=9, block=8, layers=2, heads=2, width=16).eval()
    tokens = torch.randint(9, (3, 8))
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 9
    before, after = model(tokens), model(changed)
    assert torch.allclose(before[:, :5], after[:, :5], atol=1e-6) and not torch.allclose(before[:, 5:], after[:, 5:])


def test_every_parameter_of_the_gpt_gets_a_gradient_and_its_loss_falls(verse):
    torch.manual_seed(0)
    data = Text(str(verse), block=8, batch_size=8, train_windows=400)
    data.setup()
    model = GPT(len(data.vocabulary), block=8, layers=1, heads=2, width=16, optimizer="adamw", lr=0.01)
    trainer = quiet_trainer(max_epochs=1)
    before = trainer.test(model, data, verbose=False)[0]["test/loss"]
    assert before == pytest.approx(math.log(len(data.vocabulary)), abs=0.1), "it knows nothing yet"
    trainer.fit(model, data)
    assert trainer.test(model, data, verbose=False)[0]["test/loss"] < before - 0.5
    model._step(next(iter(data.train_dataloader())))[0].backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_every_window_is_followed_by_the_characters_that_come_next_in_the_file(verse):
    data = Text(str(verse), block=7, batch_size=4, train_windows=10)
    data.setup()
    text = "".join(data.vocabulary[c] for c in torch.cat([data.train_codes, data.test_codes]))
    assert text == verse.read_text(encoding="utf-8")
    seen = 0
    for x, y in [*data.train_dataloader(), *data.test_dataloader()]:
        assert torch.equal(x[:, 1:], y[:, :-1])
        for window, following in zip(x, y, strict=True):
            both = "".join(data.vocabulary[c] for c in [*window, following[-1]])
            assert both in text
            seen += 1
    assert seen == 10 + (len(data.test_codes) - 1) // 7


@pytest.mark.parametrize(
    ("options", "said"),
    [
        pytest.param({"path": None}, "data.path is null", id="no-path"),
        pytest.param({"path": "vrse.txt"}, "no such file; did you mean 'verse.txt'", id="typo"),
        pytest.param({"block": 0}, "data.block=0: expected at least 1", id="block"),
        pytest.param({"test_fraction": 1.0}, "data.test_fraction=1.0", id="fraction"),
        pytest.param({"block": 500}, "its test part has 86 characters", id="too-short"),
    ],
)
def test_a_text_that_cannot_be_used_is_named(options, said, verse):
    path = options.pop("path", verse.name)
    with pytest.raises(UserError, match=re.escape(said)):
        Text(**{"path": path and str(verse.with_name(path)), **options}).setup()


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        pytest.param(torch.zeros(2, 9, dtype=torch.int64), "set model.block=9", id="window-too-long"),
        pytest.param(torch.full((2, 8), 12), "the data has character code 12", id="vocabulary-too-small"),
        pytest.param(torch.zeros(2, 8), "expected windows of character codes", id="no-codes"),
    ],
)
def test_text_that_does_not_fit_the_gpt_is_named(tokens, said):
    model = GPT(num_classes=9, block=8, layers=1, heads=2, width=16)
    with pytest.raises(UserError, match=re.escape(said)):
        model.predict_step((tokens, tokens), 0)
