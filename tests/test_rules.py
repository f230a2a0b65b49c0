"""`quant.engine`: grids by the rules of an engine, and no file of a model that was trained by another one's."""

import copy
from typing import Any

import pytest
import torch
from small_models import Drawn, Shape, both, lived, quantized
from torch import nn
from torch.utils.checkpoint import checkpoint

from qat.config.exports import of_file, target_named
from qat.convert import convert
from qat.errors import UserError
from qat.insert import apply_plan, remove
from qat.planning.plan import Plan
from qat.planning.planner import make_plan
from qat.policies.engines import ENGINES, Engine
from qat.policies.networks import policy_of
from qat.policies.policy import QuantPolicy

torch.set_num_threads(1)

W8A8 = {"weight": {"bits": 8, "granularity": "channel"}, "act": {"bits": 8}}


def planned(engine: str | None, shape: Shape = Shape(kind="strided"), **policy: Any) -> Plan:  # noqa: B008
    model = lived(Drawn(shape))
    x = model.example(4)
    settings = QuantPolicy.from_dict(W8A8 | {"engine": engine} | policy)
    return make_plan(model, settings, lambda: model(x))[0]


@pytest.mark.parametrize(
    ("engine", "signed"),
    [
        pytest.param(None, False, id="no-engine"),
        pytest.param("ort", False, id="ort"),
        pytest.param("openvino", False, id="openvino"),
        pytest.param("tensorrt", True, id="tensorrt"),
        pytest.param("qnn", False, id="qnn"),
    ],
)
def test_what_follows_a_relu_is_signed_where_the_engine_has_no_unsigned_codes(engine, signed):
    assert planned(engine).activations["body.input"].signed is signed


@pytest.mark.parametrize(
    ("engine", "operands"),
    [
        pytest.param("ort", [1, 1], id="ort"),
        pytest.param("openvino", [0, 1], id="openvino"),
        pytest.param("tensorrt", [0, 1], id="tensorrt"),
        pytest.param("qnn", [1, 1], id="qnn"),
    ],
)
@pytest.mark.parametrize("kind", ["conv", "strided"])
def test_what_a_convolution_adds_in_its_accumulator_has_no_grid(engine, operands, kind):
    assert [len(labels) for labels in planned(engine, Shape(kind=kind)).sites["add_0"]] == operands


def test_openvino_adds_the_output_of_a_linear_layer_on_its_grid_and_tensorrt_does_not():
    linear = Shape(kind="linear")
    assert [len(labels) for labels in planned("openvino", linear).sites["add_0"]] == [1, 1]
    assert [len(labels) for labels in planned("tensorrt", linear).sites["add_0"]] == [0, 1]


@pytest.mark.parametrize(
    ("products", "adds", "left_out"),
    [
        pytest.param(["", "conv"], "not convolutions", 1, id="second"),
        pytest.param(["conv", "conv"], "not convolutions", 0, id="two"),
        pytest.param(["linear", ""], "not convolutions", None, id="linear"),
        pytest.param(["", ""], "not products", None, id="none"),
        pytest.param(["conv", "conv"], "both", None, id="both"),
    ],
)
def test_one_operand_at_most_stays_in_the_accumulator(products, adds, left_out):
    assert Engine("any", adds=adds).accumulated(products) == left_out


def test_scales_per_channel_are_for_convolutions_on_qnn():
    weights = planned("qnn").weights
    assert {name: spec.granularity for name, spec in weights.items()} == {
        "stem": "channel", "body": "channel", "down": "channel", "head": "tensor",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        pytest.param(
            {"engine": "tensort"}, "quant.engine='tensort': no such engine; did you mean 'tensorrt'", id="name"
        ),
        pytest.param(
            {"engine": "tensorrt", "act": {"bits": 8, "symmetric": False}},
            "quant.act.symmetric=False: quant.engine=tensorrt cannot compute that; set quant.act.symmetric=true",
            id="zero-point",
        ),
        pytest.param(
            {"engine": "tensorrt", "act": {"bits": 4}}, "set quant.act.bits=8, or another engine", id="tensorrt-4-bit"
        ),
        pytest.param(
            {"engine": "openvino", "weight": {"bits": 4, "symmetric": False}},
            "quant.weight.symmetric=False: quant.engine=openvino cannot compute that; set quant.weight.symmetric=true",
            id="convolution-with-zero-points",
        ),
        pytest.param({"engine": "qnn", "act": {"bits": 12}}, "set quant.act.bits=8,", id="qnn-12-bit"),
        pytest.param({"engine": "ort_no_vnni"}, "set quant.weight.bits=7, or another engine", id="saturation"),
        pytest.param(
            {"engine": "tensorrt", "rules": {"stem": {"match": "stem", "act": {"signed": False}}}},
            "quant.rules.stem.act.signed=False: .* set quant.rules.stem.act.signed=null",
            id="unsigned-in-a-rule",
        ),
        pytest.param(
            {"round_bias": "always"}, "quant.round_bias='always': must be one of eval, train, never", id="bias"
        ),
        pytest.param({"round_bias": False}, "quant.round_bias=False: must be one of eval, train, never", id="bias-off"),
    ],
)
def test_a_setting_that_the_engine_cannot_compute_is_an_error_that_says_what_to_set(settings, message):
    with pytest.raises(UserError, match=message):
        planned(settings.get("engine"), **{k: v for k, v in settings.items() if k != "engine"})


def test_seven_bits_of_weights_do_not_saturate_sixteen_bits_of_accumulator():
    largest = ENGINES["ort_no_vnni"].weight_bits
    assert 2 * 255 * 2 ** (largest - 1) <= 2**15 - 1 < 2 * 255 * 2**largest


def test_the_rules_travel_with_the_plan():
    plan = planned("tensorrt")
    again = Plan.from_dict(plan.to_dict())
    assert (again.engine, again.round_bias, again.residuals) == ("tensorrt", "never", {"add_0": ["conv", "conv"]})


@pytest.mark.parametrize("networks", [False, True])
def test_a_plan_that_calls_the_engine_target_as_older_ones_do_is_read(networks):
    plan = planned("tensorrt")
    if networks:
        plan.policy = {"modules": {"body": plan.policy}}
    old = plan.to_dict()
    for settings in (old, old["policy"]["modules"]["body"] if networks else old["policy"]):
        settings["target"] = settings.pop("engine")
    assert Plan.from_dict(old) == plan and policy_of(plan.policy).engine == "tensorrt"


MISMATCHES = [
    pytest.param(
        "onnx_tensorrt",
        None,
        "'body.input' is uint8, which tensorrt does not compute: train it with quant.engine=tensorrt, and signed=null",
        id="unsigned-for-tensorrt",
    ),
    pytest.param(
        "onnx_openvino",
        "ort",
        "'add_0' was trained with a grid for each operand, and openvino computes it with none for operand 0: "
        "train it with quant.engine=openvino",
        id="ort-for-openvino",
    ),
    pytest.param(
        "onnx",
        "openvino",
        "'add_0' was trained with none for operand 0, and ort computes it with a grid for each operand: "
        "train it with quant.engine=ort",
        id="openvino-for-ort",
    ),
]


@pytest.mark.parametrize(("name", "trained", "message"), MISMATCHES)
def test_a_model_trained_by_other_rules_is_refused_before_anything_is_written(name, trained, message, tmp_path):
    model = lived(Drawn(Shape(kind="strided")))
    x = model.example(4)
    plan = quantized(model, x, W8A8 | {"engine": trained})
    if "openvino" in name:
        pytest.importorskip("openvino", reason="needs the extra `openvino`")
    target = target_named(name, {})
    with pytest.raises(UserError, match=message):
        target.export(convert(model, plan), plan, x, tmp_path / target.file)
    assert list(tmp_path.iterdir()) == []


# -- biases ------------------------------------------------------------------------------------------------------------


class Biased(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(x)))


@pytest.mark.parametrize(
    ("when", "in_training", "in_evaluation"),
    [("never", False, False), ("eval", False, True), ("train", True, True)],
)
def test_biases_are_whole_accumulator_steps_when_asked(when, in_training, in_evaluation):
    torch.manual_seed(0)
    model, x = Biased(), torch.randn(16, 8)
    quantized(model, x, {"weight": {"bits": 4}, "act": {"bits": 4}, "round_bias": when})
    layer: Any = model.a
    step = (layer.input_quantizer.step() * layer.weight_quantizer.step()).double()
    for training, rounded in ((True, in_training), (False, in_evaluation)):
        model.train(training)
        steps = layer(torch.zeros(1, 8)).double() / step  # what a zero input leaves is the bias
        assert ((steps - steps.round()).abs().max() < 1e-4) == rounded
    model.train()
    model(x).sum().backward()
    assert layer.bias.grad.abs().sum() > 0


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(6), nn.BatchNorm2d(6, affine=False)], ids=["affine", "plain"])
def test_a_batch_norm_adds_in_training_what_it_will_add_in_evaluation(norm):
    x = torch.randn(8, 3, 6, 6)
    models = {}
    for when in ("never", "eval", "train"):
        torch.manual_seed(0)
        models[when] = nn.Sequential(nn.Conv2d(3, 6, 3), copy.deepcopy(norm), nn.ReLU(), nn.Conv2d(6, 2, 3))
        quantized(models[when], x, {"weight": {"bits": 4}, "act": {"bits": 4}, "round_bias": when})
    outputs = {when: model.train()[:2](x) for when, model in models.items()}
    torch.testing.assert_close(outputs["eval"], outputs["never"], rtol=0, atol=0)
    added = outputs["train"] - outputs["never"]
    assert added.abs().amax() > 1e-3 and added.std((0, 2, 3)).amax() < 1e-6  # one value for each channel
    with torch.no_grad():
        expected = models["eval"].eval()[:2](x) - models["never"].eval()[:2](x)
    torch.testing.assert_close(added, expected)
    grads = []
    for when in ("never", "train"):
        layer: Any = models[when].train()[0]
        models[when][:2](x).square().sum().backward()
        grads.append(layer.weight.grad)
    assert not torch.equal(*grads)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_adds_what_its_first_run_added(reentrant):
    torch.manual_seed(0)
    x = torch.randn(32, 4, 12, 12, requires_grad=True)
    model = nn.Sequential(nn.Conv2d(4, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 2, 3))
    quantized(model, x.detach(), {"weight": {"bits": 3}, "act": {"bits": 4}, "round_bias": "train"})
    plain = copy.deepcopy(model.train())
    plain(x).square().mean().backward()
    checkpoint(model, x, use_reentrant=reentrant).square().mean().backward()
    for (name, found), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        if name != "0.bias":  # the batch's mean takes it away: its gradient is noise about zero
            assert (found.grad - expected.grad).norm() <= 1e-4 * expected.grad.norm(), name


def test_float_biases_stay_float_in_the_integer_model_and_compute_the_same():
    torch.manual_seed(0)
    model, x = Biased(), torch.randn(16, 8)
    fake, converted = both(model, x, W8A8 | {"engine": "tensorrt"})
    layer: Any = converted.get_submodule("a")
    assert layer.integer_bias is None and torch.equal(layer.bias, model.a.bias)
    torch.testing.assert_close(converted(x), fake(x), rtol=1e-6, atol=1e-6)


def test_removing_quantizers_forgets_when_biases_are_rounded():
    model, x = Biased(), torch.randn(4, 8)
    plan, _ = make_plan(model, QuantPolicy.from_dict(W8A8 | {"round_bias": "train"}), lambda: model(x))
    apply_plan(model, plan)
    remove(model)
    assert "round_bias" not in model.a.__dict__


def test_a_file_is_opened_by_the_target_that_its_manifest_names(tmp_path):
    model = lived(Drawn(Shape()))
    x = model.example(4)
    plan = quantized(model, x, W8A8 | {"engine": "tensorrt"})
    target = target_named("onnx_tensorrt", {})
    target.export(convert(model, plan), plan, x, tmp_path / "trt.onnx")
    assert type(of_file(tmp_path / "trt.onnx", {})) is type(target)
    assert type(of_file(tmp_path / "other.onnx", {})).__name__ == "OnnxTarget"
