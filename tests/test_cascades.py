"""Ties between two grids in a row: calibration leaves none, and a file for OpenVINO evades those that training made."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from small_models import quantized
from torch import Tensor, nn

from qat.cascades import MARGIN, untie, untied
from qat.convert import convert
from qat.export import openvino_ir
from qat.export.onnx.cascades import moved
from qat.export.onnx.placement import OPENVINO, Placement
from qat.export.openvino_ir import OpenVinoTarget
from qat.export.verify import Comparison
from qat.insert import named_quantizers
from qat.planning.plan import Plan

SCALES = st.floats(1e-4, 10)
TIED = 19 / 170
"""Of the scales: code 85 of the first grid is code 9.5 of the second."""


def codes(values: np.ndarray, scale: np.float32, low: int, high: int) -> np.ndarray:
    return np.clip(np.rint(values / scale), low, high)


def from_a_tie(values: np.ndarray, scale: np.float32, low: int, high: int) -> float:
    ratio = values.astype(np.float64) / scale
    within = ratio[(ratio >= low) & (ratio <= high)]
    return float(np.abs(within - np.floor(within) - 0.5).min(initial=0.5))


@given(SCALES, st.integers(1, 64), st.integers(1, 64), st.booleans(), st.integers(2, 8))
def test_scales_that_are_fractions_of_one_maximum_are_left_without_a_tie(top, a, b, signed, bits):
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    first, scale = np.float32(top * a / 64 / 255), torch.tensor([top * b / 64 / high])
    values = np.arange(-128 * signed, 256 - 128 * signed).astype(np.float32) * first
    result = untied(scale, torch.from_numpy(values), low, high)
    assert from_a_tie(values, result.numpy(), low, high) > MARGIN
    assert abs(float(result / scale) - 1) < 1e-3
    if from_a_tie(values, scale.numpy(), low, high) > 1.1 * MARGIN:
        assert result == scale


def test_one_pair_of_six_has_an_exact_tie_if_scales_are_fractions_of_one_maximum():
    """Of 8 and of 4 bits, each with one of the 64 fractions that `range: mse` tries."""

    def tied(a: int, b: int) -> bool:
        ratios = (Fraction(k * a, 17 * b) for k in range(256))  # 17 = 255 / 15
        return any(ratio.denominator == 2 and ratio < 15.5 for ratio in ratios)

    share = sum(tied(a, b) for a in range(1, 65) for b in range(1, 65)) / 64**2
    assert share == pytest.approx(1 / 6, abs=0.01)


@pytest.mark.parametrize("near", [pytest.param(None, id="anywhere"), pytest.param(2e-5, id="near-a-tie")])
@given(scale=SCALES, ratio=st.floats(0.01, 3), signed=st.booleans(), bits=st.integers(2, 6))
def test_a_files_scale_gives_trainings_codes_and_none_near_a_tie_where_one_does(near, scale, ratio, signed, bits):
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    second = np.float32(scale)
    if near is not None:  # the largest code of the first grid, which is odd, half way between two of the second
        ratio = (high - 0.5 + near) / 255
    values = np.arange(-255 * signed, 256).astype(np.float32) * np.float32(second * ratio)
    result = moved(values, second, low, high)
    assert (codes(values, result, low, high) == codes(values, second, low, high)).all()
    before, after = (from_a_tie(values, each, low, high) for each in (second, result))
    if near is not None and not signed:
        assert before < 2 * near and after > 0.9 * MARGIN
    if before > 1.1 * MARGIN:
        assert result == second


def test_where_two_grids_leave_no_scale_with_a_margin_the_middle_is_as_far_from_both_ties():
    values, scale = np.array([0.4999995, 1.50009], np.float32), np.float32(1)  # code 0 of one grid, code 2 of another
    result = moved(values, scale, 0, 15)
    assert codes(values, result, 0, 15).tolist() == [0, 2] == codes(values, scale, 0, 15).tolist()
    assert from_a_tie(values, scale, 0, 15) < 1e-6 and 1e-5 < from_a_tie(values, result, 0, 15) < MARGIN


class Twice(nn.Module):
    """The body's convolution reads 4 bits of the 8 that the addition reads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head(F.relu(self.body(x) + x).mean((2, 3)))


POLICY = {"act": {"bits": 4}, "sites": {"bits": 8}, "engine": "openvino"}


def tied(scale: float, ratio: float = TIED) -> tuple[nn.Module, Plan, Tensor]:
    """A model whose two grids have these scales."""
    model, x = Twice().eval(), torch.randn(32, 3, 8, 8)
    plan = quantized(model, x, POLICY)
    first, second = model.body.input_quantizer  # pyright: ignore
    with torch.no_grad():
        first.scale.fill_(scale * ratio)
        second.scale.fill_(scale)
    return model, plan, x


def test_calibration_moves_the_second_of_two_grids_alone():
    model, _, _ = tied(0.114)
    first, second = model.body.input_quantizer  # pyright: ignore
    before = {name: float(grid.step().sum()) for name, grid in named_quantizers(model)}
    untie(model, set())
    assert before == {name: float(grid.step().sum()) for name, grid in named_quantizers(model)}
    untie(model, {grid for _, grid in named_quantizers(model)})
    (changed,) = (name for name, grid in named_quantizers(model) if float(grid.step().sum()) != before[name])
    assert dict(named_quantizers(model))[changed] is second
    values = np.arange(256).astype(np.float32) * first.step().numpy()
    assert from_a_tie(values, second.step().numpy(), 0, 15) > MARGIN


def steps_off(model: nn.Module, plan: Plan, x: Tensor, placement: Placement, folder: Path, monkeypatch) -> list[float]:
    """How far OpenVINO's outputs are from training's, with low-precision kernels and without."""
    pytest.importorskip("openvino", reason="needs the extra `openvino`")
    monkeypatch.setattr(openvino_ir, "OPENVINO", placement)
    target, found = OpenVinoTarget(), []
    target.export(convert(model, plan), plan, x[:2], folder / "model.xml")
    for optimize in (True, False):
        comparison = Comparison()
        with torch.no_grad():
            comparison.update(model(x).numpy(), target.load(folder / "model.xml", model, optimize=optimize)(x.numpy()))
        found.append(comparison.mean_steps)
    return found


def test_openvino_rounds_a_tie_otherwise_unless_its_scale_is_moved(tmp_path, monkeypatch):
    model, plan, x = tied(0.114)
    as_is = replace(OPENVINO, steadies=False)
    assert max(steps_off(model, plan, x, as_is, tmp_path, monkeypatch)) > 0.02, "if it divides by now, the pass can go"
    assert max(steps_off(model, plan, x, OPENVINO, tmp_path, monkeypatch)) < 1e-3


def test_where_no_scale_of_a_file_would_do_calibration_has_to(tmp_path, monkeypatch):
    model, plan, x = tied(0.12, 0.1)  # codes 5, 15, 25, ... are ties, up and down in turn
    assert max(steps_off(model, plan, x, OPENVINO, tmp_path, monkeypatch)) > 0.02
    untie(model, {grid for _, grid in named_quantizers(model)})
    assert max(steps_off(model, plan, x, OPENVINO, tmp_path, monkeypatch)) < 1e-3
