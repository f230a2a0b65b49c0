"""Verification fails when it should, and says what is wrong."""

import copy
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from small_models import POLICY, Drawn, Shape, both, lived
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from qat.errors import UserError
from qat.export.manifest import write_manifest
from qat.export.onnx.export import export_onnx
from qat.export.onnx.runtime import OnnxRunner
from qat.export.onnx.target import OnnxTarget
from qat.export.torch.runner import TorchRunner
from qat.export.verify import (
    Comparison,
    Verdict,
    check_codes,
    check_metric,
    check_outputs,
    count_kernels,
    expected_codes,
)
from qat.lightning.runs.evaluate import verify_file
from qat.planning.plan import Plan
from qat.report.format import verdict_in_words

SHAPE = Shape(bias=True)


class Net(pl.LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def test_step(self, batch: list[Tensor], index: int) -> None:
        x, y = batch
        self.log("test/loss", F.cross_entropy(self(x), y))


class Data(pl.LightningDataModule):
    def test_dataloader(self) -> DataLoader:
        x = Drawn(SHAPE).example(40, seed=1)
        return DataLoader(TensorDataset(x, torch.arange(40) % 5), 16)


class Trained:
    """A fake-quantized module, its converted form, its file, and a float file of the same architecture."""

    def __init__(self, folder, seed: int) -> None:
        torch.manual_seed(seed)
        float_model = lived(Drawn(SHAPE), seed)
        x = float_model.example(16)
        export_onnx(Net(copy.deepcopy(float_model)), x, folder / "float.onnx")
        self.fake, self.converted = both(Net(float_model), x, POLICY)
        self.path = folder / "model.onnx"
        OnnxTarget().export(self.converted, Plan(), x, self.path)
        self.loss = self.test()["test/loss"]

    def test(self) -> dict[str, float]:
        return self.trainer().test(self.fake, datamodule=Data(), verbose=False)[0]

    def trainer(self) -> pl.Trainer:
        return pl.Trainer(
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )

    def verify(self, path, target: OnnxTarget | None = None) -> Verdict:
        return verify_file(
            path,
            target or OnnxTarget(),
            self.converted,
            self.fake,
            self.trainer(),
            self.fake,
            Data(),
            "test/loss",
            self.loss,
        )


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    return Trained(tmp_path_factory.mktemp("trained"), 0)


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Trained:
    return Trained(tmp_path_factory.mktemp("other"), 7)


def failed(verdict: Verdict) -> dict[str, str]:
    return {check.name: check.detail for check in verdict.checks if not check.passed}


def stamped(path) -> Path:
    """Gives a file that nobody exported a manifest."""
    write_manifest(path.with_name(f"{path.name}.json"), "OnnxTarget", [path], {path.name: path.name})
    return path


def edited(source, target, edit) -> None:
    model = onnx.load(source)
    edit({t.name: t for t in model.graph.initializer})
    onnx.save(model, target)
    stamped(target)


def test_a_faithful_file_passes_every_check(trained) -> None:
    verdict = trained.verify(trained.path)
    assert failed(verdict) == {} and len(verdict.checks) == 7
    assert verdict.facts["samples"] == 40 and verdict.facts["codes_identical"]
    assert verdict.facts["integer_nodes"] == verdict.facts["expected_integer_nodes"] == 3


def test_the_module_is_itself_again_afterwards(trained) -> None:
    trained.verify(trained.path)
    assert "forward" not in vars(trained.fake)


def test_one_flipped_code_is_found_and_its_layer_named(trained, tmp_path) -> None:
    def flip(tensors) -> None:
        raw = bytearray(tensors["model.body.weight"].raw_data)
        raw[3] ^= 0b1
        tensors["model.body.weight"].raw_data = bytes(raw)

    edited(trained.path, tmp_path / "x.onnx", flip)
    assert failed(trained.verify(tmp_path / "x.onnx"))["weight codes"] == (
        "of 1 of 3 layers not those of the model; first, those of 'model.body' differ"
    )


def test_another_models_file_is_found(trained, other) -> None:
    assert "of 3 of 3 layers" in failed(trained.verify(other.path))["weight codes"]


def test_a_float_file_is_found(trained) -> None:
    wrong = failed(trained.verify(stamped(trained.path.with_name("float.onnx"))))
    assert "'model.stem' are missing" in wrong["weight codes"]
    assert wrong["integer kernels"].startswith("0 of 3")


def scaled(factor: float):
    def edit(tensors) -> None:
        array = onnx.numpy_helper.to_array(tensors["model.head.weight_scale"]) * np.float32(factor)
        tensors["model.head.weight_scale"].raw_data = array.tobytes()

    return edit


def test_nan_outputs_are_named_and_so_is_their_layer(trained, tmp_path) -> None:
    edited(trained.path, tmp_path / "x.onnx", scaled(float("nan")))
    wrong = failed(trained.verify(tmp_path / "x.onnx"))
    assert wrong["outputs"] == "hold NaN or infinity"
    assert wrong["layers"] == "the first layer that diverges is 'model.head'"


def test_nan_that_the_trained_model_computes_itself_is_not_sought_in_the_file(trained, monkeypatch) -> None:
    x = Drawn(SHAPE).example(40, seed=1)
    x[20] = torch.nan
    loader = DataLoader(TensorDataset(x, torch.arange(40) % 5), 16)
    monkeypatch.setattr(Data, "test_dataloader", lambda self: loader)
    wrong = failed(trained.verify(trained.path))
    assert wrong["trained model"].startswith("its own outputs hold NaN") and "layers" not in wrong


def test_a_wrong_scale_is_found_though_every_prediction_agrees(trained, tmp_path) -> None:
    edited(trained.path, tmp_path / "x.onnx", scaled(1.2))
    wrong = failed(trained.verify(tmp_path / "x.onnx", OnnxTarget(min_agreement=0, max_metric_change=9)))
    assert list(wrong) == ["outputs", "outputs without optimizations", "layers"]
    assert wrong["layers"] == "the first layer that diverges is 'model.head'"
    assert "steps of the 8-bit output grid on the average" in wrong["outputs"]


def test_a_file_that_breaks_an_engine_s_rules_alone_has_no_layer_that_diverges(trained, monkeypatch) -> None:
    def broken(target: OnnxTarget, verdict: Verdict, *_: object) -> None:
        verdict.add("rules of qnn", False, "1 nodes do not keep them")

    monkeypatch.setattr(OnnxTarget, "check_kernels", broken)
    assert list(failed(trained.verify(trained.path))) == ["rules of qnn"]


def test_a_missing_file_is_named(trained, tmp_path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.onnx: no such file"):
        trained.verify(tmp_path / "nowhere.onnx")


def test_a_truncated_file_is_named(trained, tmp_path) -> None:
    (tmp_path / "x.onnx").write_bytes(trained.path.read_bytes()[:-99])
    stamped(tmp_path / "x.onnx")
    with pytest.raises(UserError, match=r"x\.onnx: onnxruntime refuses it"):
        trained.verify(tmp_path / "x.onnx")


def test_a_file_of_other_inputs_is_named(trained, tmp_path) -> None:
    export_onnx(nn.Sequential(nn.Flatten(), nn.Linear(75, 5)), torch.randn(2, 3, 5, 5), tmp_path / "x.onnx")
    stamped(tmp_path / "x.onnx")
    with pytest.raises(UserError, match=r"x\.onnx: cannot run on float32 \[16, 3, 8, 8\]"):
        trained.verify(tmp_path / "x.onnx")


def test_an_error_without_a_message_is_named_by_its_type() -> None:
    class Silent(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError

    with pytest.raises(UserError, match=r"x\.pt: cannot run on float32 \[1, 2\]: AssertionError"):
        TorchRunner(Silent(), Path("x.pt"), [])(np.zeros((1, 2), np.float32))


def test_a_file_of_other_outputs_is_named(trained, tmp_path) -> None:
    export_onnx(nn.Sequential(nn.Flatten(), nn.Linear(192, 7)), torch.randn(2, 3, 8, 8), tmp_path / "x.onnx")
    stamped(tmp_path / "x.onnx")
    with pytest.raises(UserError, match=r"outputs have shape \[16, 7\] where the trained model's have \[16, 5\]"):
        trained.verify(tmp_path / "x.onnx")


def test_float_kernels_are_counted_against_the_model(trained) -> None:
    verdict = Verdict()
    OnnxTarget().check_kernels(verdict, trained.converted, OnnxRunner(trained.path, optimize=False))
    floats = "in float: model.stem, model.body, model.head"
    assert not verdict.passed and verdict.checks[0].detail == f"0 of 3 convolutions and matrix products; {floats}"


def test_a_layer_in_float_is_not_made_up_for_by_one_that_runs_several_times(trained) -> None:
    verdict = Verdict()
    count_kernels(verdict, trained.converted, 5, floats=["model.stem"])
    assert not verdict.passed and verdict.checks[0].detail.startswith("2 of 3 convolutions and matrix products;")


def test_a_layer_that_is_no_product_on_integers_is_not_named_among_those_in_float(trained) -> None:
    verdict = Verdict()
    count_kernels(verdict, trained.converted, 2, floats=["model", "model.stem"])
    assert verdict.checks[0].detail.endswith("; in float: model.stem")


def test_codes_that_a_file_holds_as_floats_are_not_those_of_the_model(trained) -> None:
    codes = expected_codes(trained.converted)
    for stored, passed in ((codes, True), ({n: c.astype(np.float32) for n, c in codes.items()}, False)):
        verdict = Verdict()
        check_codes(verdict, trained.converted, stored)
        assert verdict.passed is passed


def test_each_position_of_a_sequence_is_a_prediction() -> None:
    comparison, expected = Comparison(), np.eye(4, dtype=np.float32)[None].repeat(2, 0)
    actual = expected.copy()
    actual[1, 3] = [1, 0, 0, 0]
    comparison.update(expected, actual)
    assert comparison.samples == 8 and comparison.agreement == 7 / 8


@pytest.mark.parametrize(("change", "passed"), [(0.01, True), (0.02, False), (-0.02, False), (float("nan"), False)])
def test_the_metric_may_move_by_so_much_and_no_more(change, passed) -> None:
    verdict = Verdict()
    check_metric(verdict, "acc", 0.5, 0.5 + change, 0.0101)
    assert verdict.passed is passed


def test_deviations_are_measured_in_steps_of_the_output_grid() -> None:
    comparison, expected = Comparison(), np.linspace(-1, 1, 30, dtype=np.float32).reshape(10, 3)
    comparison.update(expected, expected + np.float32(2 / 255))
    assert comparison.deviation_steps == pytest.approx(1, rel=1e-4) and comparison.mean_steps == pytest.approx(
        1, rel=1e-4
    )
    assert comparison.agreement == 1


def test_outputs_that_are_no_classes_agree_where_no_value_is_more_than_a_step_away() -> None:
    comparison, expected = Comparison(), np.linspace(0, 255, 16, dtype=np.float32).reshape(2, 2, 2, 2)
    actual = expected.copy()
    actual[:, 0, 0, 0] += np.array([0.9, 1.1], np.float32)
    comparison.update(expected, actual)
    assert comparison.samples == 2 and comparison.agreement == 1 / 2
    verdict = Verdict()
    check_outputs(verdict, comparison, 0.5, 1.0)
    found = verdict_in_words({"verify": verdict.to_dict()})
    assert found is not None and "50.00% of samples within a step of 8 bits" in found.text


@pytest.mark.parametrize("constant", [-1e9, 0.25, -np.inf, np.inf])
@pytest.mark.parametrize("shape", [(10, 3), (5, 2, 3), (2, 3, 5, 1)])
def test_a_constant_output_changes_nothing_of_the_steps_of_the_others(constant, shape) -> None:
    axis, steps = 1 if len(shape) > 3 else -1, {}
    expected = np.linspace(-1, 1, 30, dtype=np.float32).reshape(shape)
    for name, fill in (("alone", None), ("beside", constant)):
        comparison = Comparison()
        for part in (expected[:1], expected[1:]):
            wrong = part * np.float32(1.3)
            if fill is not None:
                part, wrong = (np.insert(x, 0, np.float32(fill), axis) for x in (part, wrong))
            comparison.update(part, wrong)
        steps[name] = comparison.mean_steps, comparison.deviation_steps
    assert steps["beside"] == pytest.approx(steps["alone"]) and steps["alone"][0] > 10


@pytest.mark.parametrize("actual", [np.nan, np.inf, 1.0])
def test_another_infinity_than_the_model_s_is_none_of_its_outputs(actual) -> None:
    comparison, expected = Comparison(), np.array([[0, 1, -np.inf], [1, 2, -np.inf]], np.float32)
    wrong = expected.copy()
    wrong[1, 2] = actual
    comparison.update(expected, wrong)
    assert comparison.mean_steps == comparison.deviation_steps == np.inf


def test_steps_are_those_of_the_model_s_outputs_however_far_the_file_s_reach() -> None:
    comparison, expected = Comparison(), np.linspace(-1, 1, 30, dtype=np.float32).reshape(10, 3)
    comparison.update(expected, 100 * expected)
    assert comparison.deviation_steps == pytest.approx(99 * 255 / 2)


def test_one_sample_has_the_range_of_all_its_outputs() -> None:
    comparison, expected = Comparison(), np.array([[-1, 0, 1]], np.float32)
    comparison.update(expected, expected + np.float32(2 / 255))
    assert comparison.mean_steps == pytest.approx(1, rel=1e-4)


def test_no_samples_agree_with_nothing() -> None:
    assert Comparison().agreement == 0


def test_the_file_can_be_used_from_anywhere(trained, tmp_path) -> None:
    for name in ("model.onnx", "model.onnx.json"):
        shutil.copy(trained.path.with_name(name), tmp_path / name)
    assert trained.verify(tmp_path / "model.onnx").passed
