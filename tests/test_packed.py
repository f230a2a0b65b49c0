"""Packed safetensors: every width packs to its bits, a round trip loses nothing, and a damaged file is refused in one
line."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from small_models import POLICY, Drawn, Shape, lived, quantized
from torch import Tensor, nn

from qat.convert import EVERYTHING, conversion_refusal, convert
from qat.errors import UserError
from qat.export import packed
from qat.export.onnx.target import OnnxTarget
from qat.export.packed import (
    MANIFEST,
    WEIGHTS,
    PackedTarget,
    load_packed,
    pack,
    pack_trits,
    save_packed,
    unpack,
    unpack_trits,
)
from qat.export.verify import Verdict, check_codes
from qat.grid.formats import FLOATS


@settings(deadline=None)
@given(st.data(), st.integers(1, 16), st.booleans())
def test_packing_is_undone_by_unpacking_and_takes_no_bit_more(data, bits, signed) -> None:
    first = -(2 ** (bits - 1)) if signed else 0
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple))
    count = torch.Size(shape).numel()
    codes = data.draw(st.lists(st.integers(first, first + 2**bits - 1), min_size=count, max_size=count))
    kinds = (torch.int8, torch.uint8) if bits <= 8 else (torch.int16, torch.int32)
    tensor = torch.tensor(codes, dtype=kinds[not signed]).view(shape)
    stored = pack(tensor, bits, first)
    assert stored.dtype == torch.uint8 and stored.numel() == -(-count * bits // 8)
    assert torch.equal(unpack(stored, bits, first, shape, tensor.dtype), tensor)


@settings(deadline=None)
@given(st.lists(st.integers(-1, 1), max_size=23))
def test_five_ternary_codes_take_a_byte(codes) -> None:
    tensor = torch.tensor(codes, dtype=torch.int8)
    stored = pack_trits(tensor)
    assert stored.dtype == torch.uint8 and stored.numel() == -(-len(codes) // 5)
    assert torch.equal(unpack_trits(stored, (len(codes),), torch.int8), tensor)


def test_the_first_ternary_code_is_the_lowest_digit() -> None:
    assert pack_trits(torch.tensor([1, -1, 0, -1, 1, 0])).tolist() == [2 + 0 + 9 + 0 + 2 * 81, 1]
    with pytest.raises(ValueError, match=r"codes -1 \.\. 2 are not -1, 0 and 1"):
        pack_trits(torch.tensor([-1, 2]))


def test_bits_fill_bytes_from_the_lowest_up() -> None:
    assert pack(torch.tensor([1, 2, 3]), 4, 0).tolist() == [0x21, 0x03]
    assert pack(torch.tensor([0b101, 0b011, 0b110]), 3, 0).tolist() == [0b10011101, 0b1]


def test_a_code_between_those_of_a_grid_is_refused() -> None:
    assert torch.equal(
        unpack(pack(torch.tensor([-3, 1, 3]), 2, -3, 2), 2, -3, (3,), torch.int8, 2),
        torch.tensor([-3, 1, 3], dtype=torch.int8),
    )
    with pytest.raises(ValueError, match="not all -3 and a multiple of 2"):
        pack(torch.tensor([-3, 0]), 2, -3, 2)


@pytest.mark.parametrize("code", [-9, 8])
def test_a_code_that_does_not_fit_is_refused(code) -> None:
    with pytest.raises(ValueError, match="do not fit 4 bits from -8"):
        pack(torch.tensor([0, code]), 4, -8)


def test_nothing_packs_to_nothing() -> None:
    assert unpack(pack(torch.zeros(0, 3), 4, 0), 4, 0, (0, 3), torch.int8).shape == (0, 3)


@st.composite
def grids(draw) -> dict:
    """Every weight grid that there is: formats, widths, granularities and scale formats."""
    kind = draw(st.sampled_from(["int", "midrise", "binary", "ternary", *FLOATS]))
    granularity = draw(st.sampled_from(["tensor", "channel", "group"]))
    scale = draw(st.sampled_from(["float32", "float16", "pow2"] + ["e8m0", "e4m3"] * (granularity == "group")))
    bits = draw(st.integers(1, 15) if kind == "midrise" else st.integers(2, 16))
    affine = kind == "int" and scale not in ("e8m0", "e4m3") and draw(st.booleans())
    return {
        "format": kind, "bits": bits if kind in ("int", "midrise") else None, "symmetric": not affine,
        "granularity": granularity, "group_size": 4 if granularity == "group" else None, "scale": scale,
        "quantizer": "fixed", "range": "minmax",
    }  # fmt: skip


ACTS = [
    {"bits": 8},
    {"format": "e4m3", "bits": None, "quantizer": "fixed"},
    {"format": "e2m1", "bits": None, "granularity": "group", "group_size": 4, "scale": "e8m0", "quantizer": "dynamic"},
    {
        "format": "e2m1", "bits": None, "granularity": "group", "group_size": 4, "scale": "e4m3",
        "quantizer": "dynamic", "options": {"calibrated": True}, "range": "minmax",
    },
    "off",
]  # fmt: skip


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 6, bias=False), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(nn.functional.pad(self.first(x).relu(), (0, 6)))


@settings(deadline=None, max_examples=150)
@given(weight=grids(), act=st.sampled_from(ACTS), seed=st.integers(0, 1000), size=st.sampled_from([1e-6, 0.1, 1e5]))
def test_every_grid_comes_back_bit_for_bit_from_its_true_number_of_bits(weight, act, seed, size) -> None:
    torch.manual_seed(seed)
    model, x = Two().eval(), torch.randn(16, 8)
    with torch.no_grad():
        model.first.weight.mul_(size)
    plan = quantized(model, x, {"weight": weight, "act": act, "sites": "off"})
    converted, spec = convert(model, plan, EVERYTHING), plan.weights["first"]
    with tempfile.TemporaryDirectory() as folder:
        save_packed(converted, plan, folder)
        stored, loaded = load_file(Path(folder) / WEIGHTS), load_packed(Two(), folder)
    for key, value in converted.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    assert loaded.first.integer_weight.bits == converted.first.integer_weight.bits
    with torch.no_grad():
        assert torch.equal(loaded(x), converted(x))
        assert torch.equal(loaded.first.quantized_weight(), model.first.weight_quantizer(model.first.weight))
    size = -(-48 // 5) if spec.size == 3 and spec.symmetric else -(-48 * spec.width // 8)
    assert stored["first.integer_weight.codes"].numel() == size
    bytes_of_scales = {"float32": 4, "float16": 2}.get(spec.scale, 1)
    scale = stored["first.integer_weight.scale"]
    assert scale.numel() * scale.element_size() == converted.first.integer_weight.scale.numel() * bytes_of_scales


def test_blocks_are_a_packed_target_alone_and_it_is_verified(tmp_path) -> None:
    block = {"format": "e2m1", "bits": None, "granularity": "group", "group_size": 4, "scale": "e8m0"}
    policy = {"weight": block | {"quantizer": "minmax"}, "act": block | {"quantizer": "dynamic"}, "sites": "off"}
    model, x = Two().eval(), torch.randn(16, 8)
    plan, target = quantized(model, x, policy), PackedTarget()
    assert "format=e2m1 has no integers" in (conversion_refusal(plan) or "")
    with pytest.raises(UserError, match=r"has no integers .*; use export=packed$"):
        convert(model, plan)
    assert (OnnxTarget().refusal(model, plan) or "").endswith("; use export=packed")
    assert target.refusal(model, plan) is None
    prepared, path = target.prepared(model, plan), tmp_path / target.file
    target.export(prepared, plan, x[:2], path)
    verdict = Verdict()
    check_codes(verdict, prepared, target.codes(path))
    assert verdict.passed
    with torch.no_grad():
        assert np.array_equal(target.load(path, Two())(x.numpy()), model(x).numpy())


def test_a_channel_that_a_batch_norm_made_constant_takes_a_binary_grid_another_bit(tmp_path) -> None:
    model, x = lived(nn.Sequential(nn.Linear(8, 4, bias=False), nn.BatchNorm1d(4))), torch.randn(16, 8)
    with torch.no_grad():
        model[1].weight[2] = 0
    plan = quantized(model, x, {"weight": {"format": "binary", "bits": None}, "act": {"bits": 8}})
    converted = convert(model, plan)
    save_packed(converted, plan, tmp_path)
    assert load_file(tmp_path / WEIGHTS)["0.integer_weight.codes"].numel() == 8 * 4 * 2 // 8
    fresh = nn.Sequential(nn.Linear(8, 4, bias=False), nn.BatchNorm1d(4))
    assert torch.equal(load_packed(fresh, tmp_path)(x), converted(x))


@pytest.mark.parametrize(
    ("weight", "size"),
    [
        pytest.param({"format": "ternary", "bits": None}, -(-32 // 5), id="ternary"),
        pytest.param({"bits": 2, "narrow": True}, -(-32 // 5), id="narrow-2-bits"),
        pytest.param({"bits": 9}, 32 * 9 // 8, id="9-bits"),
        pytest.param({"bits": 12, "narrow": False}, 32 * 13 // 8, id="12-bits-and-one-for-the-mirrored-lowest"),
        pytest.param({"bits": 11, "symmetric": False}, 32 * 11 // 8, id="affine-11-bits"),
        pytest.param({"bits": 16}, 64, id="16-bits"),
    ],
)
def test_negative_gammas_mirror_ternary_and_wide_codes_and_they_come_back(weight, size, tmp_path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 4, bias=False), nn.BatchNorm1d(4))

    torch.manual_seed(0)
    model, x = lived(build()), torch.randn(16, 8)
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([-1.0, 1.0, -0.5, 0.5]))
        model[0].weight[0, 0] = -3
    plan = quantized(model, x, {"weight": weight | {"range": "minmax"}, "act": {"bits": 8}})
    converted = convert(model, plan)
    with torch.no_grad():
        torch.testing.assert_close(converted(x), model(x), rtol=1e-4, atol=1e-5)
    save_packed(converted, plan, tmp_path)
    assert load_file(tmp_path / WEIGHTS)["0.integer_weight.codes"].numel() == size
    with torch.no_grad():
        assert torch.equal(load_packed(build(), tmp_path)(x), converted(x))


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
