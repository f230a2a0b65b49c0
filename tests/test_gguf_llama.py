"""A Llama in a GGUF file is one that `transformers` reads, with the logits of training."""

from typing import Any

import pytest
import torch
from small_models import quantized
from test_targets import BLOCKS, target_of
from torch import nn

from qat.convert import convert
from qat.export.gguf.llama import Llama
from qat.export.verify import Verdict, check_codes
from qat.models import CausalLM

transformers = pytest.importorskip("transformers", reason="needs the extra `transformers`")
gguf = pytest.importorskip("gguf", reason="needs the extra `gguf`")

torch.set_num_threads(1)
LLAMA = {
    "model_type": "llama", "vocab_size": 40, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
}  # fmt: skip
RULES = {"embeddings": {"match": "*", "type": "Embedding", "weight": "off"}}


def exported(folder: Any, bits: int, **architecture: Any) -> tuple[nn.Module, torch.Tensor, Any]:
    torch.manual_seed(0)
    model, x, target = CausalLM(LLAMA | architecture), torch.randint(40, (3, 12)), target_of("gguf")
    weight = {"bits": bits, **BLOCKS["weight"]}
    rules = RULES | ({"head": {"match": "@last", "weight": "off"}} if "tie_word_embeddings" in architecture else {})
    plan = quantized(model, x, {"weight": weight, "act": None, "sites": "off", "rules": rules})
    converted, verdict = convert(model, plan), Verdict()
    target.export(converted, plan, x, folder / target.file)
    check_codes(verdict, converted, target.codes(folder / target.file))
    assert verdict.passed, verdict.checks
    with torch.no_grad():
        runner = target.load(folder / target.file, CausalLM(LLAMA | architecture))
        assert torch.equal(torch.from_numpy(runner(x.numpy())), model(x))
    return model, x, converted


def test_a_llama_that_is_no_part_of_another_module_is_read_back(tmp_path) -> None:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{k: v for k, v in LLAMA.items() if k != "model_type"})
    )
    x, target = torch.randint(40, (3, 12)), target_of("gguf")
    policy = {"weight": {"bits": 8, **BLOCKS["weight"]}, "act": None, "sites": "off", "rules": RULES}
    plan, verdict = quantized(model, x, policy), Verdict()
    converted = convert(model, plan)
    target.export(converted, plan, x, tmp_path / target.file)
    check_codes(verdict, converted, target.codes(tmp_path / target.file))
    assert verdict.passed, verdict.checks


def test_a_llama_with_another_layer_in_it_is_not_called_one() -> None:
    model = CausalLM(LLAMA)
    assert Llama.of_model(model) is not None
    attention = next(m for n, m in model.named_modules() if n.endswith("layers.1.self_attn"))
    attention.q_proj = nn.Sequential(nn.Linear(64, 4, bias=False), nn.Linear(4, 64, bias=False))
    assert Llama.of_model(model) is None


@pytest.mark.parametrize(
    ("bits", "architecture"),
    [
        pytest.param(4, {}, id="q4_0"),
        pytest.param(8, {}, id="q8_0"),
        pytest.param(8, {"num_key_value_heads": 4, "tie_word_embeddings": True}, id="tied-and-all-heads"),
    ],
)
def test_transformers_loads_a_llama_and_gives_the_logits_to_the_bit(bits, architecture, tmp_path) -> None:
    fake, x, converted = exported(tmp_path, bits, **architecture)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        str(tmp_path), gguf_file="model.gguf", dtype=torch.float32, local_files_only=True
    )
    with torch.no_grad():
        # gguf multiplies a code and its scale in float32, as training does, and the model is the same one behind.
        assert torch.equal(loaded(x).logits, fake(x)) and torch.equal(converted(x), fake(x))


def test_rows_of_queries_and_keys_are_moved_and_come_back(tmp_path) -> None:
    exported(tmp_path, 8)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    names = [tensor.name for tensor in reader.tensors]
    assert {"token_embd.weight", "blk.1.attn_q.weight", "blk.0.ffn_norm.weight", "output.weight"} <= set(names)
    llama = Llama.of_file(reader.fields)
    assert llama == Llama("model.", (4, 2), 2)
    rows = torch.arange(64)[:, None].numpy()
    moved = llama.reordered("blk.0.attn_q.weight", rows)
    assert moved[:4, 0].tolist() == [0, 8, 1, 9] and moved[16, 0] == 16, "heads of 16: halves become pairs"
    assert (llama.reordered("blk.0.attn_q.weight", moved, back=True) == rows).all()
    assert llama.reordered("blk.0.attn_v.weight", rows) is rows


@pytest.mark.parametrize(
    "architecture", [{"attention_bias": True}, {"hidden_act": "gelu"}], ids=["biases", "another-activation"]
)
def test_a_llama_that_the_format_cannot_say_keeps_our_names(architecture, tmp_path) -> None:
    exported(tmp_path, 8, **architecture)
    names = [tensor.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors]
    assert "model.model.layers.0.self_attn.q_proj.weight" in names
