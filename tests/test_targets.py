"""Every target's file computes what training measured, holds the very same codes, and shows where it went wrong."""

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from small_models import POLICY, Drawn, Shape, lived, quantized
from torch import nn

from qat.config.configs import configs_dir
from qat.config.exports import target_named
from qat.convert import convert
from qat.copies import copied
from qat.errors import UserError
from qat.export.bisect import first_divergence
from qat.export.manifest import files_bytes
from qat.export.onnx.runtime import OnnxRunner, saturates
from qat.export.onnx.target import OnnxTarget
from qat.export.overflow import largest_sum
from qat.export.target import Target
from qat.export.verify import Comparison, Verdict, check_codes, expected_integer_nodes
from qat.planning.plan import Plan

W8A8 = {"weight": {"bits": 8, "granularity": "channel"}, "act": {"bits": 8}}
TENSOR = {"weight": {"bits": 5, "granularity": "tensor"}, "act": {"bits": 6}}
SHAPES = [
    pytest.param(Shape(kind="strided"), W8A8, id="w8a8-strided"),
    pytest.param(Shape(kind="depthwise", activation="relu6"), POLICY, id="w4a8-depthwise-relu6"),
    pytest.param(Shape(kind="linear", bias=True, norm=False), TENSOR, id="w5a6-linear-per-tensor"),
]


BLOCKS = {
    "weight": {"granularity": "group", "group_size": 32, "scale": "float16", "narrow": False},
    "act": None,
    "sites": None,
}


def target_of(name: str) -> Target:
    try:
        return target_named(name, {})
    except UserError as error:
        pytest.skip(str(error))


def skip_if_saturating(name: str) -> None:
    """For files with 8-bit weights: no option keeps OpenVINO's products from saturating on older processors."""
    if "openvino" in name and saturates():
        pytest.skip("on a processor without VNNI, OpenVINO lets sums of 8-bit products saturate")


class Case:
    """A drawn model: float, fake-quantized, converted."""

    def __init__(self, shape: Shape, policy: dict[str, Any], name: str | None = None) -> None:
        policy = policy | {"engine": target_of(name).engine if name else None}
        torch.manual_seed(0)
        self.float_model: Any = Drawn(shape)
        self.fake: Any = lived(Drawn(shape))
        self.x = self.fake.example(32)
        self.plan = quantized(self.fake, self.x, policy)
        self.converted = convert(self.fake, self.plan)

    def export(self, target: Target, folder: Path) -> Path:
        path = folder / target.file
        target.export(self.converted, self.plan, self.x[:4], path)
        return path

    def compared(self, runner: Any) -> Comparison:
        comparison = Comparison()
        with torch.no_grad():
            comparison.update(self.fake(self.x).numpy(), runner(self.x.numpy()))
        return comparison


@pytest.mark.parametrize("name", ["onnx", "packed", "openvino", "torch", "litert"])
@pytest.mark.parametrize(("shape", "policy"), SHAPES)
def test_a_file_has_the_same_codes_and_outputs_with_and_without_optimizations(name, shape, policy, tmp_path) -> None:
    if policy is W8A8:
        skip_if_saturating(name)
    target, case = target_of(name), Case(shape, policy, name)
    path, verdict = case.export(target, tmp_path), Verdict()
    check_codes(verdict, case.converted, target.codes(path))
    assert verdict.passed, verdict.checks
    for optimize in (True, False):
        comparison = case.compared(target.load(path, case.float_model, optimize=optimize))
        limit = target.max_mean_steps if optimize else 1
        assert comparison.mean_steps <= limit and comparison.agreement >= 0.9, (optimize, comparison)


@pytest.mark.parametrize("name", ["onnx", "openvino", "torch"])
@pytest.mark.parametrize("grain", [{"granularity": "channel"}, {"granularity": "group", "group_size": 4}], ids=str)
def test_unsigned_weights_of_4_bits_come_back_and_give_the_outputs(name, grain, tmp_path) -> None:
    weight = {"bits": 4, "symmetric": False, **grain}
    target, case, verdict = target_of(name), Case(Shape(kind="linear"), W8A8 | {"weight": weight}, name), Verdict()
    path = case.export(target, tmp_path)
    check_codes(verdict, case.converted, target.codes(path))
    assert verdict.passed, verdict.checks
    for optimize in (True, False):
        assert case.compared(target.load(path, case.float_model, optimize=optimize)).mean_steps <= 0.1


@pytest.mark.parametrize("name", ["onnx", "packed", "openvino", "torch", "litert"])
@pytest.mark.parametrize("layer", ["stem", "body", "head"])
def test_bisection_names_the_layer_whose_scale_is_wrong(name, layer, tmp_path) -> None:
    target, case = target_of(name), Case(Shape(bias=True), W8A8, name)
    right, weight = case.converted, case.converted.get_submodule(f"{layer}.integer_weight")
    scale = weight.scale.clone()
    weight.scale.mul_(1.5)
    path = case.export(target, tmp_path)
    weight.scale.copy_(scale)
    runner = target.load(path, case.float_model)
    assert first_divergence(right, runner, case.x.numpy()) == f"the first layer that diverges is '{layer}'"


@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_the_runtime_computes_every_layer_on_integers(name, tmp_path) -> None:
    target, case = target_of(name), Case(Shape(), W8A8, name)
    runner: Any = target.load(case.export(target, tmp_path), case.float_model)
    verdict = Verdict()
    target.check_kernels(verdict, case.converted, runner)
    assert verdict.passed and verdict.facts["integer_nodes"] == expected_integer_nodes(case.converted) == 3
    assert runner.float_layers() == []


@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_a_layer_that_stays_float_is_named(name, tmp_path) -> None:
    policy = W8A8 | {"rules": {"head": {"match": "head", "weight": "off", "act": "off"}}}
    target, case = target_of(name), Case(Shape(), policy, name)
    assert target.load(case.export(target, tmp_path), case.float_model).float_layers() == ["head"]


def test_a_program_is_made_of_quantized_decomposed_operations(tmp_path) -> None:
    target, case = target_of("torch"), Case(Shape(), W8A8)
    program = torch.export.load(str(case.export(target, tmp_path)))
    names = [str(node.target) for node in program.graph.nodes]
    assert sum("quantize_per_tensor" in n and "dequantize" not in n for n in names) >= 3
    assert sum("dequantize_per_channel" in n for n in names) >= 3


@pytest.mark.parametrize(
    ("name", "package"), [("openvino", "openvino"), ("executorch", "executorch"), ("litert", "ai_edge_litert")]
)
def test_a_missing_package_is_an_error_that_names_the_extra(name, package, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"needs {package}: pip install qat\[{name}\]"):
        target_named(name, {})


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64], ids=str)
def test_a_model_that_is_not_in_float32_has_no_graph_but_tensors(kind) -> None:
    x = torch.randn(8, 12).to(kind)
    model: Any = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)).to(kind)
    plan = quantized(model, x, W8A8)
    said = rf"'0.weight' is {str(kind)[6:]}, .* cast the model with .float\(\), or use packed"
    assert target_named("packed", {}).refusal(model, plan) is None
    for name in ("onnx", "torch"):
        assert re.search(said, target_named(name, {}).refusal(model, plan) or ""), name
        assert target_named(name, {}).refusal(copied(model).float(), plan) is None
    assert "'0' is" in (target_named("torch", {}).refusal(convert(model, plan), plan) or "")


def wide(inputs: int, counting: int, policy: dict[str, Any]) -> tuple[nn.Module, Plan]:
    """A layer of so many inputs, of which so many count, and its plan."""
    model, x = nn.Sequential(nn.Linear(inputs, 2)), torch.linspace(0, 1, inputs).repeat(2, 1)
    model[0].weight.data = torch.where(torch.arange(inputs) < counting, -0.01, 0.0).repeat(2, 1)
    return model, quantized(model, x, policy)


@pytest.mark.parametrize(
    ("counting", "policy", "before", "after"),
    [
        pytest.param(67_000, W8A8, 1, 1, id="w8a8"),
        pytest.param(60_000, W8A8, 1, 0, id="codes-that-fit"),
        pytest.param(67_000, W8A8 | {"weight": {"bits": 7}}, 0, 0, id="w7a8"),
        pytest.param(67_000, W8A8 | {"act": {"bits": 16}}, 0, 0, id="no-int32"),
        pytest.param(67_000, W8A8 | {"weight": {"bits": 8, "granularity": "group", "group_size": 100}}, 0, 0,
                     id="groups"),
    ],
)  # fmt: skip
def test_a_layer_whose_products_int32_cannot_add_up_is_named(counting, policy, before, after, monkeypatch) -> None:
    monkeypatch.setattr("qat.export.onnx.target.saturates", lambda: False)
    grids = {role: policy[role] | {"range": "minmax"} for role in ("weight", "act")}
    grids["act"]["signed"] = False
    (model, plan), onnx = wide(67_000, counting, grids), target_named("onnx", {})
    found = onnx.cautions(model, plan), onnx.cautions(convert(model, plan), plan)
    assert [len(lines) for lines in found] == [before, after]
    for line in (*found[0], *found[1]):
        assert line.startswith("'0': ") and "beyond 2,147,483,647; give it fewer bits, or split it" in line
    assert target_named("packed", {}).cautions(model, plan) == [], "no integer kernel reads it"


@pytest.mark.parametrize(
    ("weight", "act", "target", "named"),
    [
        pytest.param(8, 8, "onnx", True, id="w8a8"),
        pytest.param(7, 8, "onnx", False, id="w7a8"),
        pytest.param(8, 7, "onnx", False, id="w8a7"),
        pytest.param(8, 6, "onnx", False, id="w8a6"),
        pytest.param(8, 16, "onnx", False, id="in-float"),
        pytest.param(8, None, "onnx", False, id="weights-alone"),
        pytest.param(8, 8, "openvino", True, id="openvino"),
        pytest.param(8, 8, "packed", False, id="no-kernels"),
    ],
)
def test_products_that_saturate_where_a_processor_adds_them_in_int16_are_named(
    weight, act, target, named, monkeypatch
) -> None:
    bits = {"weight": {"bits": weight}, "act": {"bits": act} if act else "off"}
    model, plan = wide(64, 64, bits)
    for wrong in (True, False):
        for module in ("onnx.target", "openvino_ir"):
            monkeypatch.setattr(f"qat.export.{module}.saturates", lambda wrong=wrong: wrong)
        found = target_of(target).cautions(model, plan)
        assert len(found) == (named and wrong)
        assert not found or found[0].startswith("'0': this processor has no VNNI")


def test_verification_adds_products_of_eight_bits_exactly_on_every_processor(tmp_path) -> None:
    """Where a processor lacks VNNI, the runtime's default would not."""
    model, x = nn.Sequential(nn.Linear(64, 2)), torch.ones(2, 64)
    model[0].weight.data.fill_(1.0)
    grid = {"bits": 8, "range": "minmax"}
    plan = quantized(model, x, {"weight": grid, "act": grid | {"signed": False}})
    path = tmp_path / "model.onnx"
    OnnxTarget().export(convert(model, plan), plan, x, path)
    expected = model(x).detach().numpy()
    np.testing.assert_allclose(OnnxRunner(path)(x.numpy()), expected, rtol=1e-6)
    default = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = np.asarray(default.run(None, {"input": x.numpy()})[0])
    assert np.allclose(found, expected, rtol=1e-6) != saturates()


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_largest_sum_of_a_layer_is_that_of_its_worst_input(symmetric) -> None:
    torch.manual_seed(0)
    model, grid = nn.Sequential(nn.Conv1d(3, 4, 2)), {"bits": 4, "symmetric": symmetric, "quantizer": "fixed"}
    weight = grid | {"granularity": "channel"}
    layer: Any = convert(model, quantized(model, torch.randn(8, 3, 2), {"weight": weight, "act": grid}))[0]
    codes, input = layer.integer_weight, layer.input_quantizer
    ends = (torch.tensor([input.quant_min, input.quant_max]) - input.zero_point).tolist()
    inputs = torch.tensor(list(itertools.product(ends, repeat=6)))
    levels = (codes.codes.long() - codes.spread(codes.zero_point).long()).flatten(1)
    sums = inputs @ levels.T + layer.integer_bias.codes.long()
    assert largest_sum(layer) == int(sums.abs().max())


def test_an_export_warns_of_a_layer_that_int32_cannot_add_up(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("qat.export.overflow.INT32_MAX", 1000)
    monkeypatch.setattr(OnnxTarget, "write", lambda self, model, plan, example, folder: (folder / self.file).touch())
    case = Case(Shape(kind="linear"), W8A8)
    with pytest.warns(UserWarning, match=r"model\.onnx: 'stem': on some inputs its products add up to [\d,]+, and"):
        case.export(target_named("onnx", {}), tmp_path)


def test_every_export_config_but_none_is_a_target() -> None:
    for path in (configs_dir() / "export").glob("*.yaml"):
        if path.stem != "none":
            assert isinstance(target_of(path.stem), Target)


@pytest.mark.parametrize(("text", "said"), [("{", "no JSON"), ("[]", "holds a list"), ("{}", "lacks 'sha256'")])
def test_the_size_of_a_file_beside_a_damaged_manifest_is_an_error_that_names_it(text, said, tmp_path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"onnx")
    assert files_bytes(path) == 4, "a file without a manifest stands alone"
    (tmp_path / "model.onnx.json").write_text(text)
    with pytest.raises(UserError, match=rf"model\.onnx\.json: is damaged: {said}"):
        files_bytes(path)


def test_an_export_that_fails_leaves_nothing(tmp_path, monkeypatch) -> None:
    case, target = Case(Shape(), W8A8), target_of("onnx")

    def half(self: object, model: nn.Module, plan: object, example: object, folder: Path) -> None:
        (folder / "model.onnx").write_bytes(b"half")
        raise UserError("no space")

    monkeypatch.setattr(type(target), "write", half)
    with pytest.raises(UserError, match="no space"):
        case.export(target, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_outputs_of_other_numbers_are_told_apart(tmp_path) -> None:
    case, target = Case(Shape(), W8A8), target_of("packed")
    runner = target.load(case.export(target, tmp_path), case.float_model)
    assert np.array_equal(runner(case.x.numpy()), case.converted(case.x).detach().numpy())


class Perceptron(nn.Module):
    """Layers whose inputs come in blocks of 32."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Linear(64, 96), nn.LayerNorm(96), nn.Linear(96, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.norm(self.stem(x))))


def blocks_case(bits: int, **weight: object) -> tuple[Any, Any, Any, torch.Tensor]:
    torch.manual_seed(1)
    model, x = Perceptron(), torch.randn(16, 64)
    plan = quantized(model, x, BLOCKS | {"weight": BLOCKS["weight"] | {"bits": bits} | weight})
    return model, convert(model, plan), plan, x


@pytest.mark.parametrize(("bits", "kind"), [(8, "Q8_0"), (4, "Q4_0")])
@pytest.mark.parametrize("scale", ["float16", "pow2"])
def test_gguf_blocks_hold_the_trained_codes_and_scales(bits, kind, scale, tmp_path) -> None:
    target = target_of("gguf")
    gguf = pytest.importorskip("gguf")
    model, converted, plan, x = blocks_case(bits, scale=scale)
    target.export(converted, plan, x[:2], tmp_path / "model.gguf")
    verdict = Verdict()
    check_codes(verdict, converted, target.codes(tmp_path / "model.gguf"))
    assert verdict.passed, verdict.checks
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert tensors["stem.weight"].tensor_type.name == tensors["head.weight"].tensor_type.name == kind
    values = gguf.dequantize(tensors["stem.weight"].data, tensors["stem.weight"].tensor_type)
    assert np.array_equal(values, converted.stem.integer_weight().numpy()), "bit for bit, as another package reads it"
    with torch.no_grad():
        runner = target.load(tmp_path / "model.gguf", Perceptron())
        assert np.array_equal(runner(x.numpy()), model(x).numpy())


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        pytest.param({"scale": "float32"}, "has scales of float32, and blocks have float16; train with", id="scale"),
        pytest.param({"group_size": 16}, "not symmetric blocks of 32; train with", id="group"),
        pytest.param({"granularity": "channel", "group_size": None}, "not symmetric blocks of 32", id="channel"),
    ],
)
def test_gguf_refuses_another_grid_and_says_what_to_train(weight, said, tmp_path) -> None:
    target = target_of("gguf")
    _, converted, plan, x = blocks_case(4, **weight)
    with pytest.raises(UserError, match=said):
        target.export(converted, plan, x[:2], tmp_path / "model.gguf")


def test_gguf_refuses_quantized_activations(tmp_path) -> None:
    target, case = target_of("gguf"), Case(Shape(), W8A8)
    with pytest.raises(UserError, match="holds weights alone"):
        case.export(target, tmp_path)


@pytest.mark.parametrize("name", ["torch", "torch_inductor"])
def test_a_program_holds_no_training_data(name, tmp_path):
    case, target = Case(Shape(), POLICY), target_of(name)
    sizes = []
    for samples in (2, 4096):
        path, batch = tmp_path / str(samples) / target.file, torch.randn(samples, 3, 8, 8)
        target.export(case.converted, case.plan, batch[:2], path)
        sizes.append(path.stat().st_size)
    assert sizes[0] == sizes[1]
    (stored,), _ = torch.export.load(str(path)).example_inputs
    assert not stored.any()
