"""LoRA adapters of peft: the base weight is frozen and on its grid, the adapters train, and merging makes one plain
quantized layer of both.
"""

import pytest
import torch
from small_models import POLICY, quantized
from torch import Tensor, nn

from qat.adapters import merge_adapters
from qat.convert import convert
from qat.errors import UserError
from qat.export.packed import load_packed, save_packed
from qat.insert import apply_plan, named_quantizers, plan_of
from qat.planning.audit import audit
from qat.planning.planner import make_plan
from qat.policies.policy import QuantPolicy

peft = pytest.importorskip("peft", reason="peft is not installed")
LSQ = {"weight": {"bits": 4, "granularity": "channel", "quantizer": "lsq"}, "act": {"bits": 8, "quantizer": "lsq"}}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x).relu())


def adapted() -> nn.Module:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["fc1"], init_lora_weights=False)
    return peft.get_peft_model(Net(), config)


def batch() -> Tensor:
    return torch.randn(16, 8, generator=torch.Generator().manual_seed(1))


FC1 = "base_model.model.fc1"


def test_the_base_weight_is_quantized_and_frozen_and_the_adapter_trains():
    model, x = adapted(), batch()
    plan = quantized(model, x, LSQ)
    assert set(plan.weights) == {f"{FC1}.base_layer", "base_model.model.fc2"} and not plan.sites
    model.train()(x).square().sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert {f"{FC1}.lora_A.default.weight", f"{FC1}.lora_B.default.weight"} <= trained
    assert f"{FC1}.base_layer.weight" not in trained
    assert {f"{n}.scale" for n, _ in named_quantizers(model)} <= trained


def test_the_audit_names_adapters():
    model, x = adapted(), batch()
    plan, recording = make_plan(model, QuantPolicy.from_dict(POLICY), lambda: model(x))
    apply_plan(model, plan)
    rows = {row.name: row for row in audit(model, plan, recording)}
    assert rows[f"{FC1}.base_layer"].reason is None
    for name in (f"{FC1}.lora_A.default", f"{FC1}.lora_B.default", f"{FC1}.add_0"):
        assert rows[name].reason == "an adapter, which stays float until it is merged (qat.merge_adapters)"


def test_conversion_before_merging_says_what_to_do():
    model, x = adapted(), batch()
    plan = quantized(model, x)
    with pytest.raises(UserError, match=rf"'{FC1}' holds an adapter .* qat.merge_adapters\(model\)"):
        convert(model, plan)


def test_the_merged_weight_is_the_sum_on_a_grid_of_its_own(tmp_path):
    model, x = adapted(), batch()
    quantized(model, x, POLICY | {"weight": {"bits": 8, "granularity": "channel"}})
    base, layer = model.base_model.model.fc1.base_layer.weight.clone(), model.base_model.model.fc1
    whole = base + layer.get_delta_weight("default")
    with torch.no_grad():
        before = model(x)
    plan = merge_adapters(model)
    assert plan_of(model) == plan
    fc1 = model.base_model.model.fc1
    assert set(plan.weights) == {FC1, "base_model.model.fc2"} and isinstance(fc1, nn.Linear)
    torch.testing.assert_close(fc1.weight, whole)
    assert (fc1.quantized_weight() - whole).abs().max() <= fc1.weight_quantizer.scale.max() / 2 + 1e-6
    converted = convert(model, plan)
    with torch.no_grad():
        assert (model(x) - before).abs().max() < 0.05 * before.abs().max()
        torch.testing.assert_close(converted(x), model(x), rtol=0, atol=1e-5)
        save_packed(converted, plan, tmp_path)
        plain = adapted()
        plain.base_model.model.fc1 = nn.Linear(8, 8)
        assert torch.equal(load_packed(plain, tmp_path)(x), converted(x))


def test_a_model_without_adapters_has_nothing_to_merge():
    model = Net()
    quantized(model, batch())
    with pytest.raises(UserError, match="Net has no adapters of peft"):
        merge_adapters(model)
