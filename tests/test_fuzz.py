"""1,000 damaged files: each loader refuses them in one line, and none is loaded as if it were whole."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small_models import POLICY, Drawn, Shape, lived, quantized
from torch import nn

from qat.convert import convert
from qat.errors import UserError
from qat.export.onnx.target import OnnxTarget
from qat.export.packed import MANIFEST, WEIGHTS, load_packed, packed_codes, save_packed
from qat.lightning.weights import read_checkpoint

MODEL = Drawn(Shape(kind="linear"))


@st.composite
def damages(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """A bit flipped, bytes overwritten, cut out, doubled or inserted, the end cut off, or everything replaced."""
    kind = draw(st.sampled_from(["flip", "write", "cut", "double", "insert", "truncate", "replace"]))
    where, length = draw(st.floats(0, 1, exclude_max=True)), draw(st.integers(1, 64))
    noise, bit = draw(st.binary(min_size=1, max_size=64)), draw(st.integers(0, 7))

    def damage(content: bytes) -> bytes:
        at = int(where * len(content))
        head, tail = content[:at], content[at:]
        return {
            "flip": head + bytes([tail[0] ^ 1 << bit]) + tail[1:],
            "write": head + noise + tail[len(noise) :],
            "cut": head + tail[length:],
            "double": head + tail[:length] + tail,
            "insert": head + noise + tail,
            "truncate": head,
            "replace": noise,
        }[kind]

    return damage


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """One model as every file that we load, in a folder that stays as it is."""
    folder = tmp_path_factory.mktemp("whole")
    model = lived(Drawn(Shape(kind="linear")))
    plan = quantized(model, model.example(8), POLICY)
    converted = convert(model, plan)
    save_packed(converted, plan, folder)
    OnnxTarget().export(converted, plan, model.example(4), folder / "model.onnx")
    torch.save({"state_dict": model.state_dict(), "qat": plan.to_dict()}, folder / "model.ckpt")
    save_file({k: v.contiguous() for k, v in MODEL.state_dict().items()}, folder / "float.safetensors")
    return folder


def fuzz(examples: int):
    calm = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much]
    return settings(max_examples=examples, deadline=None, suppress_health_check=calm, database=None)


def broken(whole: Path, folder: Path, name: str, damage: Callable[[bytes], bytes]) -> Path:
    """A copy of `whole` in `folder`, one of its files damaged."""
    shutil.copytree(whole, folder, dirs_exist_ok=True)
    content = (whole / name).read_bytes()
    assume((damaged := damage(content)) != content)
    (folder / name).write_bytes(damaged)
    return folder


def refused(load: Callable[[], object]) -> None:
    with pytest.raises(UserError) as caught:
        load()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", [WEIGHTS, MANIFEST])
@fuzz(150)
@given(damage=damages())
def test_damaged_packed_models_are_refused(name, whole, tmp_path, damage) -> None:
    folder = broken(whole, tmp_path / "x", name, damage)
    if name == MANIFEST and _same_json(whole / name, folder / name):
        return  # white space, which says nothing
    refused(lambda: load_packed(MODEL, folder))
    refused(lambda: packed_codes(folder))


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.json"])
@fuzz(150)
@given(damage=damages())
def test_damaged_onnx_files_and_manifests_are_refused_before_the_runtime_sees_them(
    name, whole, tmp_path, damage
) -> None:
    folder = broken(whole, tmp_path / "x", name, damage)
    if name.endswith("json") and _same_json(whole / name, folder / name):
        return
    refused(lambda: OnnxTarget().load(folder / "model.onnx", nn.Identity()))


@fuzz(200)
@given(damage=damages())
def test_damaged_checkpoints_are_refused_or_hold_what_they_held(whole, tmp_path, damage) -> None:
    """A zip file has bytes that mean nothing (padding, dates); where only those differ, it is the same checkpoint."""
    folder = broken(whole, tmp_path / "x", "model.ckpt", damage)
    try:
        content = read_checkpoint(folder / "model.ckpt")
    except UserError as error:
        assert "\n" not in str(error)
        return
    expected = read_checkpoint(whole / "model.ckpt")
    assert content["qat"] == expected["qat"] and content["state_dict"].keys() == expected["state_dict"].keys()
    assert all(torch.equal(value, expected["state_dict"][key]) for key, value in content["state_dict"].items())


@fuzz(200)
@given(damage=damages())
def test_damaged_float_weights_are_refused_or_are_tensors(whole, tmp_path, damage) -> None:
    """A bare safetensors file has no checksum: changed values go unseen, a changed structure does not."""
    folder = broken(whole, tmp_path / "x", "float.safetensors", damage)
    try:
        state = read_checkpoint(folder / "float.safetensors")["state_dict"]
    except UserError as error:
        assert "\n" not in str(error)
        return
    assert state.keys() and sum(v.nbytes for v in state.values()) <= sum(
        v.nbytes for v in load_file(whole / "float.safetensors").values()
    )


def _same_json(a: Path, b: Path) -> bool:
    try:
        return json.loads(a.read_text()) == json.loads(b.read_text())
    except ValueError:
        return False
