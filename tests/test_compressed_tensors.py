"""compressed-tensors: what `transformers` loads from the folder has our codes and gives our logits."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra `transformers`")
pytest.importorskip("compressed_tensors", reason="needs the extra `compressed-tensors`")

import qat
from qat.errors import UserError
from qat.export.compressed_tensors.target import CompressedTensorsTarget
from qat.export.verify import Verdict, check_codes
from qat.models import CausalLM

torch.set_num_threads(1)
LLAMA = {
    "model_type": "llama", "vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32,
}  # fmt: skip
FLOAT_ENDS = {
    "embeddings": {"match": "*", "type": "Embedding", "weight": "off"},
    "head": {"match": "@last", "weight": "off", "act": "off"},
}
GROUPS = {"bits": 4, "granularity": "group", "group_size": 32}
CHANNELS = {"bits": 8, "granularity": "channel"}
FP8 = {"bits": None, "format": "e4m3"}
TOKENS = {"granularity": "token", "quantizer": "dynamic"}
BLOCKS = {"bits": None, "granularity": "group", "quantizer": "minmax", "range": "minmax"}
MX = {"group_size": 32, "scale": "e8m0"}
NVFP4 = BLOCKS | {"format": "e2m1", "group_size": 16, "scale": "e4m3"}


class Case:
    def __init__(self, weight: Any, act: Any = None, rules: Any = None, **architecture: Any) -> None:
        torch.manual_seed(0)
        self.float_model = CausalLM(LLAMA | architecture).eval()
        torch.manual_seed(0)
        self.fake = CausalLM(LLAMA | architecture).eval()
        self.x = torch.randint(40, (3, 12))
        settings = {"weight": weight, "act": act, "sites": "off", "rules": FLOAT_ENDS if rules is None else rules}
        self.plan = qat.quantize(self.fake, settings, self.x)
        self.target = CompressedTensorsTarget()

    def export(self, path: Path) -> Path:
        self.target.export(self.target.prepared(self.fake, self.plan), self.plan, self.x, path)
        return path


@pytest.mark.parametrize(
    ("weight", "act", "stored", "tolerance"),
    [
        pytest.param(GROUPS, None, "pack-quantized", 0, id="w4a16-groups"),
        pytest.param(CHANNELS | {"bits": 3}, None, "pack-quantized", 0, id="w3a16"),
        pytest.param(GROUPS | {"symmetric": False}, None, "pack-quantized", 0, id="w4a16-affine-groups"),
        pytest.param(CHANNELS | {"symmetric": False}, None, "pack-quantized", 0, id="w8a16-affine"),
        pytest.param(CHANNELS, {"bits": 8}, "int-quantized", 0, id="w8a8-static"),
        pytest.param(CHANNELS, {"bits": 8, "range": "centred"} | TOKENS, "int-quantized", 0, id="w8a8-tokens"),
        pytest.param(GROUPS, {"bits": 8, "range": "centred"} | TOKENS, "int-quantized", 0, id="w4a8-tokens"),
        pytest.param(FP8, FP8, "float-quantized", 0, id="fp8-static"),
        pytest.param(FP8, FP8 | TOKENS | {"range": "minmax"}, "float-quantized", 0, id="fp8-tokens"),
        # transformers rounds the product of NVFP4's two scales and a code to bfloat16: 2 ** -9 of a weight.
        pytest.param(NVFP4, None, "nvfp4-pack-quantized", 2**-9, id="nvfp4"),
        pytest.param(BLOCKS | MX | {"format": "e2m1"}, None, "mxfp4-pack-quantized", 0, id="mxfp4"),
        pytest.param(
            BLOCKS | MX | {"format": "e2m1"},
            BLOCKS | MX | {"format": "e2m1", "quantizer": "dynamic", "range": "even"},
            "mxfp4-pack-quantized",
            0,
            id="mxfp4-both",
        ),
    ],
)  # fmt: skip
def test_transformers_loads_the_codes_and_gives_the_logits(weight, act, stored, tolerance, tmp_path):
    case = Case(weight, act)
    path, verdict = case.export(tmp_path / "folder"), Verdict()
    check_codes(verdict, case.fake, case.target.codes(path))
    assert verdict.passed and len(case.target.codes(path)) == 7
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    assert config["format"] == stored and config["ignore"] == ["lm_head"]
    with torch.no_grad():
        expected = case.fake(case.x).numpy()
    found = case.target.load(path, case.float_model)(case.x.numpy())
    assert np.abs(found - expected).max() <= 2 * tolerance * np.abs(expected).max()


def test_inputs_of_nvfp4_are_rounded_as_in_training_and_the_logits_are_close(tmp_path):
    from compressed_tensors.quantization.lifecycle.forward import forward_quantize

    case = Case(NVFP4, NVFP4 | {"quantizer": "dynamic", "options": {"calibrated": True}})
    path = case.export(tmp_path / "folder")
    args = json.loads((path / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    assert args["input_activations"]["dynamic"] == "local" and args["format"] == "nvfp4-pack-quantized"
    runner = case.target.load(path, case.float_model)
    x = torch.randn(64, 32) * torch.logspace(-2, 1, 64)[:, None]
    for name in [name for name in case.plan.layers if name.endswith(("q_proj", "o_proj", "up_proj"))]:
        ours, theirs = case.fake.get_submodule(name), runner.model.get_submodule(name)
        found = forward_quantize(theirs, x, "input", theirs.quantization_scheme.input_activations)
        # Theirs divides by the reciprocal of the scale above: a value on the border of two levels may take either.
        same = torch.isclose(found, ours.input_quantizer(x), rtol=1e-6, atol=0)
        assert same.float().mean() > 0.999
    with torch.no_grad():
        expected = case.fake(case.x).numpy()
    found = runner(case.x.numpy())
    # Weights are rounded to bfloat16, which moves single inputs of the layers behind to a neighbouring level.
    assert np.abs(found - expected).mean() <= 2**-8 * np.abs(expected).mean()


@pytest.mark.parametrize(
    ("weight", "act", "said"),
    [
        pytest.param(
            {"bits": 8, "symmetric": False}, None, "q_proj' is .* set granularity: channel", id="affine-tensor"
        ),
        pytest.param(CHANNELS | {"symmetric": False}, {"bits": 8}, "act: off or symmetric: true", id="affine-act"),
        pytest.param(CHANNELS, {"bits": 8, "range": "minmax"} | TOKENS, "train with range: centred", id="rule"),
        pytest.param(NVFP4, NVFP4 | {"quantizer": "dynamic"}, r"options: \{calibrated: true\}", id="nvfp4-act"),
        pytest.param(CHANNELS | {"bits": 12}, None, "at most 8 bits", id="bits"),
        pytest.param(NVFP4 | {"group_size": 8}, None, "blocks are NVFP4", id="blocks"),
    ],
)
def test_what_the_format_cannot_say_is_refused_with_the_layer(weight, act, said, tmp_path):
    case = Case(weight, act)
    with pytest.raises(UserError, match=said) as caught:
        case.export(tmp_path / "folder")
    assert "\n" not in str(caught.value) and "self_attn" in str(caught.value) and not list(tmp_path.iterdir())


def test_zero_points_beside_another_grid_are_refused(tmp_path):
    rules = FLOAT_ENDS | {"down": {"match": "*.mlp.down_proj", "weight": {"bits": 8}}}
    with pytest.raises(UserError, match=r"q_proj' has zero points, .*down_proj' has another"):
        Case(GROUPS | {"symmetric": False}, rules=rules).export(tmp_path / "folder")


def test_an_embedding_is_refused_and_a_tied_head_stays_tied(tmp_path):
    with pytest.raises(UserError, match="is a Embedding"):
        Case(CHANNELS, rules={"head": FLOAT_ENDS["head"]}).export(tmp_path / "folder")
    case = Case(CHANNELS, tie_word_embeddings=True)
    found = case.target.load(case.export(tmp_path / "folder"), case.float_model)(case.x.numpy())
    assert np.array_equal(found, case.fake(case.x).detach().numpy())


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        pytest.param(lambda f: flip(f / "model.safetensors"), "model.safetensors: does not match", id="flipped"),
        pytest.param(lambda f: (f / "config.json").unlink(), "config.json: no such file", id="missing"),
        pytest.param(lambda f: (f / "more.bin").write_text("x"), "not folder/more.bin", id="unknown"),
    ],
)
def test_a_damaged_folder_is_refused(damage, said, tmp_path):
    case = Case(GROUPS)
    path = case.export(tmp_path / "folder")
    case.export(path)  # over itself
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "folder.json"]
    damage(path)
    with pytest.raises(UserError, match=said):
        case.target.load(path, case.float_model)


def test_an_unknown_architecture_is_one_line():
    with pytest.raises(UserError, match="transformers has no such model; did you mean 'llama'"):
        CausalLM({"model_type": "lama"})
