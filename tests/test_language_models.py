"""Causal models of `transformers` under the presets for language models: perplexity, `generate`, and the cache."""

import copy
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

pytest.importorskip("transformers", reason="needs the extra `transformers`")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import language_models as lm

import qat
from qat.errors import UserError
from qat.insert import named_quantizers
from qat.planning.planner import make_plan
from qat.policies.policy import QuantPolicy

TEXT = Path(__file__).parents[2] / "shared/data/text/tinyshakespeare.txt"
PRESETS = {  # the most by which calibration alone may raise the perplexity of a model that has hardly learned
    "lm_kv8": 1.005, "lm_w4a16_g128": 1.08, "lm_w4a16_g32": 1.05, "lm_w4a8": 1.08, "lm_w4a8kv4": 1.10, "lm_w8a8": 1.02,
    "lm_w8a8_dynamic": 1.01,
}  # fmt: skip


@pytest.fixture(scope="module")
def trained():
    if not TEXT.exists():
        pytest.skip(f"needs the text {TEXT.name}")
    learn, held = lm.split(TEXT.read_bytes())
    model = lm.small_llama()
    lm.train(model, learn, 80, 5e-3)
    return model, learn, held


def test_every_preset_for_language_models_is_looked_at():
    assert lm.presets() == sorted(PRESETS)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_keeps_the_perplexity_on_real_text(preset, trained):
    model, learn, held = trained
    before = lm.perplexity(model, held, 64)
    quantized = copy.deepcopy(model)
    lm.quantize(quantized, lm.policy(preset), learn)
    after = lm.perplexity(quantized, held, 64)
    assert before < 20  # of 256: it has learned something
    assert after != before and after < before * PRESETS[preset]


@pytest.mark.parametrize("preset", PRESETS)
def test_generate_computes_with_a_quantized_cache_what_it_computes_without_one(preset, trained):
    model, learn, held = trained
    quantized = copy.deepcopy(model)
    lm.quantize(quantized, lm.policy(preset), learn, steps=1)
    prompt = held[:20].view(2, 10)
    with_cache, without = (lm.continued(quantized, prompt, 8, use_cache) for use_cache in (True, False))
    assert with_cache.shape == (2, 8)
    assert torch.equal(with_cache, without)


def test_training_lowers_the_perplexity_that_four_bits_cost(trained):
    model, learn, held = trained
    quantized = copy.deepcopy(model)
    lm.quantize(quantized, lm.policy("lm_w4a8kv4", "quant.weight.bits=2"), learn)
    before = lm.perplexity(quantized, held, 64)
    lm.train(quantized, learn, 20, 1e-3, seed=1)
    assert lm.perplexity(quantized, held, 64) < 0.9 * before


def kv(**act):
    return {"act": False, "rules": {"kv": {"match": "*", "type": "kv_cache", "act": act}}}


@pytest.mark.parametrize(
    "act",
    [
        pytest.param(
            {"bits": 4, "granularity": "token", "quantizer": "dynamic", "range": "minmax"}, id="token-and-head"
        ),
        pytest.param({"bits": 8}, id="one-scale"),
    ],
)
def test_keys_and_values_alone_are_on_the_grid_of_the_cache(act):
    model = lm.small_llama(32, 1).eval()
    tokens = torch.arange(20).view(2, 10)
    lm.quantize(model, QuantPolicy.from_dict(kv(**act)), torch.arange(200) % 256, steps=1)
    seen = {}
    names = [name for name, _ in named_quantizers(model)]
    for name, quantizer in named_quantizers(model):
        quantizer.register_forward_hook(lambda _, args, y, name=name: seen.update({name: y}))
    model(input_ids=tokens)
    site = "model.layers.0.self_attn.attention_0.input_quantizer"
    assert names == [f"{site}_1", f"{site}_2"]
    assert all(y.shape == (2, 2, 10, 8) for y in seen.values())  # batch, heads of keys, tokens, width
    if act["bits"] == 4:
        assert all(len(vector.unique()) <= 16 for y in seen.values() for vector in y.flatten(0, 2))


def test_a_model_whose_attention_is_no_function_has_no_cache_to_quantize():
    model = lm.small_llama(32, 1).eval()
    model.set_attn_implementation("eager")
    tokens = torch.arange(20).view(2, 10)
    with pytest.raises(UserError, match="nothing is a 'kv_cache'"):
        make_plan(model, QuantPolicy.from_dict(kv(bits=8)), lambda: model(input_ids=tokens))


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = lm.small_llama(64, 1)

    def training_step(self, batch, _):
        return self.model(input_ids=batch, labels=batch).loss  # pyright: ignore

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def test_the_callback_trains_a_causal_model_which_then_generates():
    data = torch.utils.data.DataLoader(torch.randint(256, (8, 32)), batch_size=4)  # pyright: ignore
    module = Module()
    callback = qat.QATCallback(lm.policy("lm_w4a16_g32"))
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = pl.Trainer(max_steps=2, accelerator="cpu", callbacks=[callback], enable_checkpointing=False, **quiet)
    before = module.model.model.layers[0].mlp.up_proj.weight.clone()  # pyright: ignore
    trainer.fit(module, data)
    assert not torch.equal(before, module.model.model.layers[0].mlp.up_proj.weight)  # pyright: ignore
    assert lm.continued(module.model.eval(), torch.arange(6).view(1, 6), 4, use_cache=True).shape == (1, 4)
