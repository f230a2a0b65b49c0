"""Random small models under random policies: the ONNX file holds training's codes, runs on the integer kernels that
it should, and each of its pieces returns training's codes from the same inputs (see tests/forced.py)."""

import copy
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from forced import EQUAL, Call, compare, cut, packs, run, watch
from random_models import draw
from small_models import Drawn, Shape, both, lived

from qat.export.onnx.export import export_onnx

PACKS = packs(range(10))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [pytest.param(seeds, id=f"from-{seeds[0]}") for seeds in PACKS])
def test_random_models_are_exported_as_they_were_trained(seeds, tmp_path):
    outcome = compare([draw(seed) for seed in seeds], tmp_path / "model.onnx")
    again = f"python benchmarks/export_fuzz.py {seeds[0]}:{seeds[-1] + 1} --blocks 1"
    assert not outcome.wrong, f"{again}: {'; '.join(outcome.wrong)}"


def test_the_same_seed_draws_the_same_case():
    a, b = draw(7, 3), draw(7, 3)
    assert a.policy == b.policy and str(a.model) == str(b.model)
    assert all(torch.equal(v, b.model.state_dict()[k]) for k, v in a.model.state_dict().items())
    assert draw(8, 3).policy != a.policy


# -- the comparison finds what it should -------------------------------------------------------------------------------


def one(tmp_path: Path) -> tuple[onnx.ModelProto, np.ndarray, np.ndarray, list[Call]]:
    """A file, inputs, training's outputs on them and its codes."""
    model = lived(Drawn(Shape()))
    with torch.no_grad():
        fake, converted = both(model, model.example(16))
        export_onnx(converted, model.example(16), tmp_path / "model.onnx")
    x = model.example(16, 1)
    output, calls = watch(fake, x)
    return onnx.load(tmp_path / "model.onnx"), x.numpy(), output.numpy(), calls


def wrong(model: onnx.ModelProto, x: np.ndarray, expected: np.ndarray, calls: list[Call]) -> list[str]:
    pieces = cut(copy.deepcopy(model), calls)
    (output, *codes), _ = run(pieces.model, {"input": x, **pieces.inputs()}, True)
    found = [line for c, call in zip(codes, pieces.calls, strict=True) if (line := call.wrong(c))]
    return found + ["outputs"] * bool(np.abs(output - expected).max() > EQUAL * np.ptp(expected) / 255)


def test_a_file_as_it_should_be_passes_piece_by_piece(tmp_path):
    assert wrong(*one(tmp_path)) == []


@pytest.mark.parametrize("layer", ["stem", "body", "head"])
def test_a_weight_scale_that_is_a_little_off_is_found_in_its_piece_alone(layer, tmp_path):
    model, *rest = one(tmp_path)
    (scale,) = (t for t in model.graph.initializer if t.name == f"{layer}.weight_scale")
    scale.raw_data = (onnx.numpy_helper.to_array(scale) * np.float32(1.01)).tobytes()
    assert len(wrong(model, *rest)) == 1


def test_another_grid_than_trainings_is_found(tmp_path):
    model, _, _, calls = one(tmp_path)
    with pytest.raises(AssertionError, match=r"training quantizes with .* where the file does not"):
        cut(model, [*calls, Call(0.5, 0, calls[0].ratio, calls[0].codes)])
    with pytest.raises(AssertionError, match=r"the file quantizes with .* where training does not"):
        cut(onnx.load(tmp_path / "model.onnx"), calls[1:])


def test_the_neighbouring_code_is_right_at_a_tie_and_wrong_elsewhere():
    ratio = np.array([[0.5 - 1e-5, 1.2]], np.float32)
    call = Call(1.0, 0, ratio, np.array([[0, 1]], np.uint8))
    assert call.wrong(np.array([[1, 1]], np.uint8)) is None
    assert "1 of 2 codes differ, by up to 1; 0.3" in (call.wrong(np.array([[0, 2]], np.uint8)) or "")
    assert "by up to 2" in (call.wrong(np.array([[2, 1]], np.uint8)) or "")
