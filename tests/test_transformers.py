"""Models of `transformers`, which we did not write, from configs with random weights: what docs/coverage.md shows."""

import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra `transformers`")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import coverage
import zoo
from scale_gradients import scale_gradients

from qat.errors import UserError
from qat.insert import apply_plan, named_quantizers, remove
from qat.layers import original_class
from qat.measure.health import from_checkpoint

MODELS = list(zoo.MODELS)
STILL = {
    "DETR": {  # its queries begin as zeros, which are on every grid; their product with a weight ignores the weight
        "model.decoder.layers.0.self_attn.v_proj.input_quantizer": "its tensor lies on the grid",
        "model.decoder.layers.0.self_attn.v_proj.weight_quantizer": "no gradient in float",
    },
    "CLIP": {"mul_0.input_quantizer_1": "its tensor lies on the grid"},  # one number: calibration made it the last code
}
"""Scales whose gradient is zero because its closed form is."""
TRACED = ["ConvNeXt", "BERT", "Llama"]
COMPILED = [pytest.param(n, False, marks=pytest.mark.slow, id=f"{n}-evaluation") for n in TRACED]
COMPILED += [pytest.param(n, True, id=f"{n}-training") for n in ("ViT", "Wav2Vec2")]
"""All of them in both modes take minutes; docs/coverage.md has them."""


@cache
def quantized(name: str) -> tuple[Any, ...]:
    model, inputs = zoo.build(name)
    keys = model.state_dict().keys()
    plan, rows = coverage.quantize(model, inputs, coverage.POLICY)
    return model, inputs, keys, plan, rows


@pytest.mark.parametrize("name", MODELS)
def test_insertion_covers_the_model_and_keeps_every_float_key(name):
    model, _, keys, _, rows = quantized(name)
    assert coverage.coverage(rows)[0] >= 0.99 and not coverage.gaps(rows)
    assert sum(row.macs for row in rows) > 0
    assert keys <= model.state_dict().keys()


@pytest.mark.parametrize("name", MODELS)
def test_sixteen_bit_grids_compute_what_the_float_model_does(name):
    assert coverage.fine_error(name) < 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_a_state_dict_brings_a_new_model_to_the_same_bits(name):
    model, inputs, _, plan, _ = quantized(name)
    assert coverage.same(coverage.outputs(model, inputs), coverage.reloaded(name, plan, model, inputs), 0)


@pytest.mark.parametrize("name", MODELS)
def test_one_training_step_gives_every_scale_its_closed_form_gradient_which_is_not_zero_without_a_reason(name):
    model, inputs, *_ = quantized(name)
    scales = scale_gradients(model, inputs)
    model.zero_grad()
    assert len(scales) > 10 and all(scale.agrees for scale in scales)
    assert {scale.name: scale.why for scale in scales if scale.still} == STILL.get(name, {})


@pytest.mark.parametrize(("name", "train"), COMPILED)
def test_compilation_breaks_no_more_often_than_the_float_model_and_computes_the_same(name, train):
    model, inputs = zoo.build(name)
    float_breaks, _ = coverage.traced(model, inputs, train)
    coverage.quantize(model, inputs, coverage.POLICY)
    breaks, compiled = coverage.traced(model, inputs, train)
    assert breaks == float_breaks
    assert coverage.same(coverage.outputs(model, inputs, train), compiled, 1e-4)


@pytest.mark.parametrize("name", ["Mixtral", "GPT-2", "DETR"])
def test_removing_the_quantizers_restores_the_model(name):
    model, inputs = zoo.build(name)
    before, classes = coverage.outputs(model, inputs), [type(m) for m in model.modules()]
    coverage.quantize(model, inputs, coverage.POLICY)
    remove(model)
    assert [type(m) for m in model.modules()] == classes
    assert coverage.same(before, coverage.outputs(model, inputs), 0)


def test_an_expert_that_saw_no_token_has_weights_on_a_grid_of_its_own():
    model, *_ = quantized("Mixtral")
    sites = [q for name, q in named_quantizers(model) if "experts.grouped_mm_0.weight" in name]
    assert [q.scale.shape for q in sites] == [(4 * 128,)] * 2  # experts times outputs


def test_a_checkpoint_tells_how_well_the_experts_weights_do():
    model, _, _, plan, _ = quantized("Mixtral")
    rows, _, left_out = from_checkpoint({"qat": plan.to_dict(), "state_dict": model.state_dict()}, "model.ckpt")
    found = {row.layer: row.sqnr_db for row in rows}
    assert not left_out and found.keys() == plan.weights.keys()
    for name in (n for n in found if "experts.grouped_mm" in n):
        site = model.get_submodule(name)
        error = (site.weight - site.weight_quantizer(site.weight)).square().sum()
        assert found[name] == pytest.approx(10 * (site.weight.square().sum() / error).log10().item(), abs=1e-3)


@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
def test_every_implementation_of_the_experts_reads_the_same_grids(implementation):
    model, inputs, *_ = quantized("Mixtral")
    before = coverage.outputs(model, inputs)
    model.set_experts_implementation(implementation)
    try:
        assert coverage.same(before, coverage.outputs(model, inputs), 1e-5)
    finally:
        model.set_experts_implementation("grouped_mm")


def test_both_products_of_the_experts_get_inputs_on_a_grid(monkeypatch):
    model, inputs = zoo.build("Mixtral")
    coverage.quantize(model, inputs, {"weight": {"bits": 8}, "act": {"bits": 2}})
    seen, original = [], torch.nn.functional.grouped_mm
    monkeypatch.setattr(
        torch.nn.functional, "grouped_mm", lambda x, *args, **kwargs: seen.append(x) or original(x, *args, **kwargs)
    )
    coverage.outputs(model, inputs)
    assert len(seen) == 4 and all(len(x.unique()) <= 4 for x in seen)


def test_experts_weights_take_part_in_training_as_quantized():
    model, inputs = zoo.build("Mixtral")
    coverage.quantize(model, inputs, {"weight": {"bits": 2, "granularity": "channel"}, "act": {"bits": 8}})
    experts = model.model.layers[0].mlp.experts
    assert len(experts.gate_up_proj[0, 0].unique()) <= 4 < len(experts._parameters["gate_up_proj"][0, 0].unique())
    sum(t.sum() for t in coverage.tensors(model.train()(**inputs))).backward()
    assert experts._parameters["gate_up_proj"].grad.abs().sum() > 0


def test_angles_of_a_rotary_embedding_stay_float():
    _, _, _, plan, rows = quantized("Llama")
    assert not [site for site in plan.sites if "rotary" in site]
    assert {r.reason for r in rows if r.name.startswith("model.rotary_emb")} == {
        "computed from no data: the same for every input"
    }


def test_a_tied_head_shares_the_grid_of_the_embedding():
    _, _, _, plan, _ = quantized("Qwen2")
    assert plan.layers["lm_head"].weight == "model.embed_tokens"


def test_a_cache_that_is_switched_off_is_an_error_that_names_the_rule():
    model, inputs, *_ = quantized("Llama")
    with pytest.raises(UserError, match=r"model\.layers\.0\.self_attn\.cat_\*"):
        model(**inputs, use_cache=False)


def test_the_rule_that_it_names_makes_the_cache_optional():
    model, inputs = zoo.build("Llama")
    rules = {"cats": {"match": "model.layers.*.self_attn.cat_*", "act": False}}
    coverage.quantize(model, inputs, {**coverage.POLICY, "rules": rules})
    with_cache = coverage.outputs(model, inputs)[0]
    with torch.no_grad():
        assert torch.equal(with_cache, model(**inputs, use_cache=False).logits)


def test_the_layer_of_gpt2_is_a_product_with_a_weight():
    model, _, _, plan, _ = quantized("GPT-2")
    name = "transformer.h.0.attn.c_attn"
    assert original_class(model.get_submodule(name)).__name__ == "Conv1D"
    assert plan.parameters[f"{name}.matmul_0"].parameter == f"{name}.weight"
    assert model.get_submodule(f"{name}.matmul_0").weight_quantizer.scale.shape == (96,)  # one for each output


def test_the_plan_of_a_mixture_survives_a_checkpoint():
    model, _, _, plan, _ = quantized("Mixtral")
    fresh, _ = zoo.build("Mixtral")
    apply_plan(fresh, type(plan).from_dict(plan.to_dict()))
    assert [n for n, _ in named_quantizers(fresh)] == [n for n, _ in named_quantizers(model)]
