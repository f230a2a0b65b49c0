"""Packed safetensors: every width packs to its bits, a round trip loses nothing, and a damaged file is refused in one
line."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from small_models import POLICY, Drawn, Shape, lived, quantized
from torch import nn

from qat.convert import convert
from qat.errors import UserError
from qat.export import packed
from qat.export.packed import MANIFEST, WEIGHTS, load_packed, pack, save_packed, unpack


@settings(deadline=None)
@given(st.data(), st.integers(1, 8), st.booleans())
def test_packing_is_undone_by_unpacking_and_takes_no_bit_more(data, bits, signed) -> None:
    first = -(2 ** (bits - 1)) if signed else 0
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple))
    count = torch.Size(shape).numel()
    codes = data.draw(st.lists(st.integers(first, first + 2**bits - 1), min_size=count, max_size=count))
    tensor = torch.tensor(codes, dtype=torch.int8 if signed else torch.uint8).view(shape)
    stored = pack(tensor, bits, first)
    assert stored.dtype == torch.uint8 and stored.numel() == -(-count * bits // 8)
    assert torch.equal(unpack(stored, bits, first, shape, tensor.dtype), tensor)


def test_bits_fill_bytes_from_the_lowest_up() -> None:
    assert pack(torch.tensor([1, 2, 3]), 4, 0).tolist() == [0x21, 0x03]
    assert pack(torch.tensor([0b101, 0b011, 0b110]), 3, 0).tolist() == [0b10011101, 0b1]


@pytest.mark.parametrize("code", [-9, 8])
def test_a_code_that_does_not_fit_is_refused(code) -> None:
    with pytest.raises(ValueError, match="do not fit 4 bits from -8"):
        pack(torch.tensor([0, code]), 4, -8)


def test_nothing_packs_to_nothing() -> None:
    assert unpack(pack(torch.zeros(0, 3), 4, 0), 4, 0, (0, 3), torch.int8).shape == (0, 3)


SHAPE = Shape(kind="strided", bias=True)
MIXED = POLICY | {
    "rules": {
        "stem": {"match": "stem", "weight": {"bits": 7}},
        "body": {"match": "body", "weight": {"bits": 3, "granularity": "tensor"}},
    }
}
GROUPS = {"weight": {"bits": 4, "granularity": "group", "group_size": 1}, "act": {"bits": 8}}


def saved(folder: Path, policy: dict, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = lived(Drawn(SHAPE), seed)
    plan = quantized(model, model.example(8), policy)
    converted = convert(model, plan)
    save_packed(converted, plan, folder)
    return converted


@pytest.mark.parametrize(
    "policy", [pytest.param(POLICY, id="w4a8"), pytest.param(MIXED, id="mixed"), pytest.param(GROUPS, id="groups")]
)
def test_a_loaded_model_computes_the_same_bits(tmp_path, policy) -> None:
    converted, x = saved(tmp_path, policy), Drawn(SHAPE).example(8, seed=1)
    torch.manual_seed(99)
    loaded = load_packed(Drawn(SHAPE), tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(x), converted(x))
    assert loaded.state_dict().keys() == converted.state_dict().keys()


def test_loading_leaves_the_given_model_as_it_is(tmp_path) -> None:
    saved(tmp_path, POLICY)
    model = Drawn(SHAPE)
    weight = model.stem.weight.clone()
    load_packed(model, tmp_path)
    assert type(model.stem) is nn.Conv2d and torch.equal(model.stem.weight, weight)


def test_four_bits_are_four_bits_in_the_file(tmp_path) -> None:
    saved(tmp_path, POLICY)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    tensors = load_file(tmp_path / WEIGHTS)
    assert len(manifest["packed"]) == 4
    for key, how in manifest["packed"].items():
        assert how["bits"] == 4
        assert tensors[key].numel() * 2 == torch.Size(how["shape"]).numel()


def test_saving_the_same_model_writes_the_same_bytes(tmp_path) -> None:
    for name in "ab":
        saved(tmp_path / name, POLICY)
    for file in (WEIGHTS, MANIFEST):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def truncate(folder: Path, file: str) -> None:
    (folder / file).write_bytes((folder / file).read_bytes()[:-7])


def flip(folder: Path, file: str) -> None:
    content = bytearray((folder / file).read_bytes())
    content[-len(content) // 3] ^= 1
    (folder / file).write_bytes(content)


def swap(folder: Path, file: str) -> None:
    saved(folder / "other", POLICY, seed=5)
    (folder / "other" / file).rename(folder / file)


def delete(folder: Path, file: str) -> None:
    (folder / file).unlink()


def edit(key: str, value: object):
    def apply(folder: Path, file: str) -> None:
        manifest = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(manifest | {key: value}))

    return apply


@pytest.mark.parametrize(
    ("damage", "file", "message"),
    [
        pytest.param(delete, WEIGHTS, f"{WEIGHTS}: no such file", id="missing-weights"),
        pytest.param(delete, MANIFEST, f"{MANIFEST}: no such file", id="missing-manifest"),
        pytest.param(truncate, WEIGHTS, f"{WEIGHTS}: does not match {MANIFEST}", id="truncated-weights"),
        pytest.param(truncate, MANIFEST, f"{MANIFEST}: is damaged", id="truncated-manifest"),
        pytest.param(flip, WEIGHTS, f"{WEIGHTS}: does not match {MANIFEST}", id="flipped-weights"),
        pytest.param(flip, MANIFEST, f"{MANIFEST}: is damaged", id="flipped-manifest"),
        pytest.param(swap, WEIGHTS, f"{WEIGHTS}: does not match .* another model", id="swapped-weights"),
        pytest.param(swap, MANIFEST, f"{WEIGHTS}: does not match .* another model", id="swapped-manifest"),
        pytest.param(
            edit("format", 99),
            MANIFEST,
            "has format 99 .made by qat .*; this version reads",
            id="future-format",
        ),
        pytest.param(edit("packed", {}), MANIFEST, f"{MANIFEST}: is damaged", id="edited-manifest"),
    ],
)
def test_unfit_files_are_refused_in_one_line(tmp_path, damage, file, message) -> None:
    saved(tmp_path, POLICY)
    damage(tmp_path, file)
    with pytest.raises(UserError, match=message) as caught:
        load_packed(Drawn(SHAPE), tmp_path)
    assert "\n" not in str(caught.value)


def test_another_architecture_is_named(tmp_path) -> None:
    saved(tmp_path, POLICY)
    with pytest.raises(UserError, match="another"):
        load_packed(nn.Sequential(nn.Linear(4, 4)), tmp_path)


def test_a_write_that_fails_leaves_the_old_files(tmp_path, monkeypatch) -> None:
    saved(tmp_path, POLICY)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full_disk(*_: object) -> str:
        raise OSError("no space left on device")

    monkeypatch.setattr(packed, "sha256", full_disk)
    with pytest.raises(OSError, match="no space left"):
        saved(tmp_path, POLICY, seed=5)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
