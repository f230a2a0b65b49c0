"""Health of quantizers: what is logged while training, what a checkpoint remembers, and what `qat inspect` says."""

import csv
import io
import json
import re
import warnings
from dataclasses import replace

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.loggers import CSVLogger
from rich.console import Console
from small_models import quantized
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.data import DataLoader

from qat import QATCallback
from qat.cli import main
from qat.errors import UserError
from qat.grid.functional import SCALE_FLOOR
from qat.grid.spec import QuantSpec
from qat.insert import named_quantizers
from qat.lightning import QuantizerHealth
from qat.measure.health import Health, from_checkpoint, worst_first
from qat.models import MLP
from qat.quantizers import create
from qat.report.health import health_table

POLICY = {"weight": {"bits": 2, "granularity": "channel"}, "act": {"bits": 4}}


def data(batches: int = 6) -> DataLoader:
    x = torch.randn(16 * batches, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    return DataLoader(list(zip(x, torch.arange(len(x)) % 3, strict=True)), batch_size=16)


def fit(tmp_path, *callbacks, module=None, **options):
    module = module or MLP(16, 3, 8, lr=0.3)
    defaults = {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    logger = CSVLogger(tmp_path, "csv", "")
    trainer = pl.Trainer(
        callbacks=[QATCallback(POLICY, calibration_samples=32), *callbacks], logger=logger, enable_checkpointing=False,
        **{**defaults, **options},
    )  # fmt: skip
    trainer.fit(module, data(), **({"weights_only": True} if options else {}))
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    return module, trainer


class Break(pl.Callback):
    """Does something to one quantizer of the first layer when training starts."""

    def __init__(self, how):
        self.how = how

    @torch.no_grad()
    def on_train_start(self, trainer, pl_module):
        self.how(dict(named_quantizers(pl_module)), pl_module)


def test_every_measure_of_every_quantizer_is_in_the_log(tmp_path):
    module, _ = fit(tmp_path, QuantizerHealth(every_n_steps=2))
    header = (tmp_path / "csv" / "metrics.csv").read_text().splitlines()[0].split(",")
    for name, quantizer in named_quantizers(module):
        for what in ("sqnr_db", "clip_rate", "drift", "grad_norm", *["oscillation"] * quantizer.is_weight):
            assert f"health/{what}/{name}" in header


def test_a_measurement_is_logged_at_the_last_step_it_looked_at(tmp_path):
    fit(tmp_path, QuantizerHealth(), max_steps=2)
    rows = csv.DictReader((tmp_path / "csv" / "metrics.csv").read_text().splitlines())
    assert [row["step"] for row in rows if row.get("health/drift/fc1.weight_quantizer")] == ["1"]


@pytest.mark.parametrize("value", [torch.inf, torch.nan], ids=str)
def test_a_batch_that_is_not_finite_is_left_out(value):
    health, quantizer = QuantizerHealth(), create(QuantSpec(4, signed=True, narrow=True))
    quantizer.calibrate(torch.ones(4))
    health._watch("act")(quantizer, (torch.tensor([1.0, value]),))
    assert not health._tallies


def test_the_numbers_are_what_their_names_say(tmp_path):
    health, levels, gradients, scales = QuantizerHealth(every_n_steps=100), [], {}, {}

    class Look(pl.Callback):
        def note(self, pl_module):
            layer = pl_module.fc1
            levels.append(layer.weight_quantizer.levels(layer.weight))

        def on_train_start(self, trainer, pl_module):
            self.note(pl_module)
            scales["start"] = pl_module.fc1.weight_quantizer.step()

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if trainer.global_step == 0:
                gradients["first"] = pl_module.fc1.weight_quantizer.scale.grad.norm().item()

        def on_train_batch_end(self, trainer, pl_module, *_):
            self.note(pl_module)

    module, _ = fit(tmp_path, health, Look(), max_steps=2)
    row = next(row for row in health.rows if row.name == "fc1.weight_quantizer")
    first, second = levels[1] - levels[0], levels[2] - levels[1]
    assert row.oscillation == ((first * second) < 0).float().mean().item()
    assert row.grad_norm == pytest.approx(gradients["first"])
    moved = (module.fc1.weight_quantizer.step() / scales["start"]).log2().abs().mean().item()
    assert moved > 0 and row.drift == pytest.approx(moved)


def test_a_code_oscillates_if_one_step_changes_it_and_the_next_changes_it_back():
    health = QuantizerHealth()
    health._levels = {
        "fc.weight_quantizer": [
            torch.tensor(codes) for codes in ([0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0], [0.0, 1.0, 2.0, 1.0])
        ]
    }
    assert health._oscillation("fc.weight_quantizer") == 1 / 4


def _tiny_scale(found, module):
    found["fc1.weight_quantizer"].scale.mul_(1e-12)


def _dead_weight(found, module):
    module.fc1.weight.mul_(1e-6)
    module.fc1.weight.requires_grad_(False)


def _tight(found, module):
    found["fc1.input_quantizer"].scale.mul_(0.02)


@pytest.mark.parametrize(
    ("how", "who", "said"),
    [
        pytest.param(_tiny_scale, "fc1.weight_quantizer", "a scale is at its floor", id="floor"),
        pytest.param(_dead_weight, "fc1.weight_quantizer", "all codes are equal", id="one-code"),
        pytest.param(_tight, "fc1.input_quantizer", "of its values are clipped", id="clipped"),
    ],
)
def test_a_collapsed_quantizer_is_warned_of_once_and_leads_the_table(how, who, said, tmp_path, capsys):
    health = QuantizerHealth(every_n_steps=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, Break(how), health, module=MLP(16, 3, 8, lr=1e-6))
    mine = [str(w.message) for w in caught if f"'{who}'" in str(w.message)]
    assert len(mine) == 1 and said in mine[0]
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "model.ckpt"), "--json"]) == 1
    first = json.loads(capsys.readouterr().out.splitlines()[0])
    assert first["name"] == who and said in "; ".join(first["findings"])


def test_a_healthy_model_is_not_warned_of_and_inspect_shows_what_training_recorded(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    health = QuantizerHealth(every_n_steps=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module, _ = fit(tmp_path, health, module=MLP(16, 3, 8, lr=1e-3))
    assert not [w for w in caught if "collapsed" in str(w.message)]
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "model.ckpt"), "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {row["name"] for row in rows} == {name for name, _ in named_quantizers(module)}
    assert [row["sqnr_db"] for row in rows] == sorted(row["sqnr_db"] for row in rows)
    assert main(["inspect", str(tmp_path / "model.ckpt")]) == 0
    assert re.search(r"^ fc1\.input +u?int\d ", capsys.readouterr().out, re.M)


def test_without_the_callback_inspect_measures_the_weights(tmp_path, capsys):
    module, _ = fit(tmp_path)
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "model.ckpt"), "--json"]) == 0
    rows = {row["name"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert set(rows) == {name for name, q in named_quantizers(module) if q.is_weight}
    weight = module.fc1.weight.detach()
    error = (weight - module.fc1.weight_quantizer(weight)).square().sum()
    expected = 10 * (weight.square().sum() / error).log10().item()
    assert rows["fc1.weight_quantizer"]["sqnr_db"] == pytest.approx(expected, abs=1e-3)


class Nested(nn.Module):
    """One layer's path ends like another's."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8))
        self.block = nn.ModuleDict({"net": nn.Sequential(nn.Linear(8, 8))})

    def forward(self, x):
        return self.net(self.block["net"](x))


class Products(nn.Module):
    """Weights that no layer owns, with their output channels along either axis, and one that two layers share."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8))
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(F.linear(x @ self.a, self.b)))


class Narrow(nn.Module):
    """Attention to keys and values of other widths, whose projections are parameters of their own."""

    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, kdim=6, vdim=4)

    def forward(self, x):
        return self.attn(x, x[..., :6], x[..., :4])[0]


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        pytest.param(lambda: nn.Sequential(nn.ConvTranspose2d(8, 8, 3)), (2, 8, 4, 4), id="transposed"),
        pytest.param(lambda: nn.Sequential(nn.ConvTranspose2d(8, 8, 3, groups=2)), (2, 8, 4, 4), id="in-groups"),
        pytest.param(Nested, (4, 8), id="nested"),
        pytest.param(Products, (4, 8), id="products-and-ties"),
        pytest.param(lambda: nn.Sequential(nn.LSTM(8, 8, bidirectional=True)), (3, 4, 8), id="lstm"),
        pytest.param(lambda: nn.LSTM(8, 8), (3, 4, 8), id="root"),
        pytest.param(lambda: nn.Sequential(nn.GRUCell(8, 8)), (4, 8), id="cell"),
        pytest.param(lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0), (3, 4, 8), id="attention"),
        pytest.param(Narrow, (3, 4, 8), id="three-widths"),
    ],
)
@pytest.mark.parametrize("grid", [{"granularity": "channel"}, {"granularity": "group", "group_size": 2}], ids=str)
def test_without_recorded_health_every_weight_is_measured_where_it_lies(make, shape, grid):
    torch.manual_seed(0)
    model = make()
    for parameter in (p for p in model.parameters() if p.ndim > 1):  # no two channels alike, along either axis
        rows, columns = (torch.linspace(0.1, 3, n) for n in parameter.shape[:2])
        parameter.data *= torch.outer(rows, columns**2).view(*parameter.shape[:2], *[1] * (parameter.ndim - 2))
    x = torch.randn(shape)
    plan = quantized(model, x, {"weight": {"bits": 4, **grid}})
    rows, why, left_out = from_checkpoint({"qat": plan.to_dict(), "state_dict": model.state_dict()}, "x")
    assert "holds no callbacks" in str(why) and not left_out
    expected: dict[str, float] = {}

    def note(name, before, after):
        expected[name] = 10 * (before.square().sum() / (before - after).square().sum()).log10().item()

    for name, quantizer in named_quantizers(model):
        quantizer.register_forward_hook(lambda _, args, after, name=name: note(name, args[0], after))
    model.train()(x)
    assert {row.name: row.sqnr_db for row in rows} == pytest.approx(expected, abs=1e-3)


def test_weights_that_are_computed_are_left_out_with_a_line(tmp_path, capsys):
    model = nn.Sequential(weight_norm(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 8))
    plan = quantized(model, torch.randn(4, 8))
    torch.save({"qat": plan.to_dict(), "state_dict": model.state_dict()}, tmp_path / "model.ckpt")
    assert main(["inspect", str(tmp_path / "model.ckpt"), "--json"]) == 0
    out, err = capsys.readouterr()
    assert [json.loads(line)["layer"] for line in out.splitlines()] == ["2"]
    assert err.startswith("qat: left out, as the checkpoint alone does not tell the weight: 0; ")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        pytest.param(lambda folder: folder, "holds no quantized checkpoint", id="empty-folder"),
        pytest.param(lambda folder: folder / "nothing.ckpt", "no such file", id="missing"),
    ],
)
def test_what_cannot_be_inspected_is_named(make, said, tmp_path, capsys):
    assert main(["inspect", str(make(tmp_path))]) == 2
    assert said in capsys.readouterr().err


def test_a_float_checkpoint_cannot_be_inspected(tmp_path, capsys):
    torch.save({"state_dict": MLP(16, 3, 8).state_dict()}, tmp_path / "float.ckpt")
    assert main(["inspect", str(tmp_path / "float.ckpt")]) == 2
    assert "is of a float model" in capsys.readouterr().err


def test_what_has_collapsed_comes_before_what_is_noisy():
    def row(name, sqnr_db, codes=4):
        return Health(name, name, "weight", "int2", 2, codes, 0.1, sqnr_db, 0.0)

    rows = worst_first([row("exact", None), row("good", 30.0), row("noisy", 3.0), row("collapsed", 40.0, codes=1)])
    assert [r.name for r in rows] == ["collapsed", "noisy", "good", "exact"]


def test_at_80_columns_names_and_grids_are_whole_and_findings_are_below():
    row = Health(
        "features.30.weight_quantizer", "features.30", "weight", "int4/channel", 4, 1, 0.1, 12.34, 0.5, 4.47e-06,
        0.00347, 0.000205,
    )  # fmt: skip
    console = Console(width=80, file=io.StringIO())
    console.print(health_table([row, replace(row, name="cat_0.input_quantizer_1.0")], None))
    lines = [line.split() for line in console.file.getvalue().splitlines()]
    numbers = ["int4/channel", "12.3", "50.00%", "1", "4.5e-06", "0.0035", "0.0002"]
    assert ["features.30.weight", *numbers] in lines and ["cat_0.input_1.0", *numbers] in lines
    assert ["features.30.weight:", "all", "codes", "are", "equal"] in lines


def test_a_step_is_too_few_for_oscillation():
    with pytest.raises(UserError, match="every_n_steps=1: must be at least 2"):
        QuantizerHealth(every_n_steps=1)


@pytest.mark.parametrize(("bits", "said"), [(1, []), (2, ["75% of its values are clipped"])], ids=["one-bit", "two"])
def test_a_grid_of_one_bit_has_nothing_but_ends_to_clip_to(bits, said):
    assert Health("q", "l", "weight", f"int{bits}", bits, 2, 0.1, 3.0, 0.75).findings() == said


@pytest.mark.parametrize(("times", "count"), [(1, 1), (2, 0)], ids=["at", "above"])
def test_a_scale_at_its_floor_has_collapsed(times, count):
    row = Health("q", "l", "weight", "int2", 2, 2, SCALE_FLOOR * times, 3.0, 0.0)
    assert len(row.findings()) == count
