"""Sums and products with a parameter: it has a grid like any other tensor, and runtimes add its codes."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import both, quantized
from test_insert import Model, inserted, planned
from test_targets import W8A8, skip_if_saturating, target_of
from torch import Tensor, nn

from qat.convert import EVERYTHING, convert
from qat.export.verify import Comparison, Verdict, check_codes
from qat.integer import IntegerTensor

torch.set_num_threads(1)
X = (4, 6, 8)


class Patches(nn.Module):
    """The beginning of a ViT: patches, positions, a block that adds to them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.up, self.head = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 8), nn.Linear(8, 5)
        self.positions = nn.Parameter(torch.randn(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head((x + F.relu(self.up(x)))[:, 0])


class Scaled(nn.Module):
    """A scale and an offset for each value, left of what they are applied to."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.body, self.head = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1), nn.Linear(8, 5)
        self.gamma, self.offset = nn.Parameter(torch.randn(8, 8, 8)), nn.Parameter(torch.randn(8, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.offset + F.relu(self.stem(x))
        return self.head((self.gamma * self.body(x) + x).mean((2, 3)))


def table(m: Any, x: Tensor) -> Tensor:
    return m.b(m.a(x) + m.table)


def with_table(forward: Any, *shape: int) -> Model:
    model = Model(forward, a=nn.Linear(8, 8), b=nn.Linear(8, 8))
    model.table = nn.Parameter(torch.randn(shape))
    return model


@pytest.mark.parametrize(
    ("forward", "index"),
    [
        pytest.param(table, 1, id="right"),
        pytest.param(lambda m, x: m.b(m.table + m.a(x)), 0, id="left"),
        pytest.param(lambda m, x: m.b(m.a(x).add_(m.table)), 1, id="in-place"),
    ],
)
def test_a_parameter_that_is_added_has_a_grid_and_is_replaced_by_its_codes(forward, index) -> None:
    fake, converted = both(with_table(forward, 6, 8), torch.randn(X), W8A8)
    grid = fake.add_0.get_submodule(f"input_quantizer_{index}")
    assert torch.equal(converted.add_0.integer_weight.codes, grid.quantize(fake.table))
    assert "table" not in dict(converted.named_parameters()) and converted.table.untyped_storage().nbytes() == 4
    x = torch.randn(X)
    torch.testing.assert_close(fake(x), converted(x), rtol=1e-5, atol=1e-6)  # sums of products in another order


@pytest.mark.parametrize("shape", [(8,), (6, 1), (1, 1, 8), ()], ids=str)
def test_a_vector_is_a_bias_or_the_scale_of_a_norm_and_stays_float(shape) -> None:
    for forward in (table, lambda m, x: m.b(m.a(x) * m.table), lambda m, x: m.b(F.gelu(m.a(x)) - m.table)):
        assert planned(with_table(forward, *shape), torch.randn(X), kinds=["add", "sub", "mul"]).sites == {}


def test_sums_with_one_parameter_share_its_grid_and_its_codes() -> None:
    _, converted = both(with_table(lambda m, x: m.b(F.relu(m.a(x) + m.table)) + m.table, 6, 8), torch.randn(X), W8A8)
    first, second = converted.add_0, converted.add_1
    assert first.integer_weight is second.integer_weight and "table" not in dict(converted.named_parameters())


def test_a_parameter_that_others_read_stays_beside_its_codes() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.b(m.a(x) + m.table) + m.table.mean()

    fake, converted = both(with_table(forward, 6, 8), torch.randn(X), {**W8A8, "kinds": ["add"]})
    assert isinstance(converted.add_0.integer_weight, IntegerTensor) and torch.equal(converted.table, fake.table)


def test_a_site_that_reads_one_parameter_or_another_keeps_both() -> None:
    class Adds(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    model = with_table(lambda m, x: m.b(m.adds(m.adds(m.a(x), m.table), m.other)), 6, 8)
    model.other, model.adds = nn.Parameter(torch.randn(6, 8)), Adds()
    x = torch.randn(X)
    fake, converted = both(model, x, W8A8)
    torch.testing.assert_close(fake(x), converted(x), rtol=1e-5, atol=1e-6)
    assert set(dict(converted.named_parameters())) >= {"table", "other"}


def test_gradients_reach_the_parameter_and_its_scale() -> None:
    model = inserted(with_table(table, 6, 8), torch.randn(X), act={"bits": 4}).train()
    model(torch.randn(X)).square().sum().backward()
    assert model.table.grad.abs().sum() > 0 and model.add_0.input_quantizer_1.scale.grad.abs() > 0


def test_a_parameter_that_a_measured_grid_reads_stays_float() -> None:
    model = with_table(lambda m, x: m.b(m.a(x) + m.table) * m.table, 6, 8)
    measured = {"match": "mul_0", "act": {"quantizer": "dynamic"}}
    x, policy = torch.randn(X), {**W8A8, "kinds": "all", "rules": {"m": measured}}
    plan = quantized(model, x, policy)
    converted = convert(model, plan, EVERYTHING)
    torch.testing.assert_close(converted(x), model(x), rtol=1e-5, atol=1e-6)


def test_a_parameter_that_changes_sides_stays_float() -> None:
    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.flipped = nn.Parameter(torch.randn(6, 8)), False

        def forward(self, x: Tensor) -> Tensor:
            self.flipped = not self.flipped
            return x + self.w if self.flipped else self.w + x

    model = with_table(lambda m, x: m.b(m.adds(m.adds(m.a(x)))), 6, 8)
    model.adds, x = Adds(), torch.randn(X)
    fake, converted = both(model, x, W8A8)
    torch.testing.assert_close(converted(x), fake(x), rtol=1e-5, atol=1e-6)


AFFINE = {**W8A8, "act": {"bits": 8, "symmetric": False}}
NARROW = {**W8A8, "act": {"bits": 4}}
FAST = ["onnx", "onnx_qnn", "onnx_openvino", "openvino", "torch", "packed"]
CASES = [
    *(pytest.param(name, W8A8, id=f"{name}-w8a8") for name in (*FAST, "executorch")),
    *(pytest.param(name, NARROW, id=f"{name}-w8a4") for name in FAST if name != "onnx_qnn"),
    *(pytest.param(name, AFFINE, id=f"{name}-affine") for name in (*FAST, "executorch")),
]


@pytest.mark.parametrize(("name", "policy"), CASES)
def test_a_file_holds_the_codes_of_positions_and_computes_what_was_trained(name, policy, tmp_path) -> None:
    agrees(name, policy, Patches(), tmp_path)


@pytest.mark.parametrize("name", ["onnx", "openvino", "litert", "torch", "packed"])
def test_a_file_holds_the_codes_of_scales_and_offsets(name, tmp_path) -> None:
    agrees(name, {**W8A8, "kinds": "all"}, Scaled(), tmp_path)


def test_codes_of_16_bits_come_back_from_a_file(tmp_path) -> None:
    model, x, target = Patches(), torch.randn(32, 3, 8, 8), target_of("onnx")
    plan = quantized(model, x, {**W8A8, "sites": {"bits": 16}})
    prepared, verdict = target.prepared(model, plan), Verdict()
    target.export(prepared, plan, x, tmp_path / target.file)
    check_codes(verdict, prepared, target.codes(tmp_path / target.file))
    assert verdict.passed and prepared.add_0.integer_weight.codes.dtype == torch.int16, verdict.checks


@pytest.mark.parametrize("name", ["onnx", "onnx_qnn", "openvino", "litert", "packed"])
def test_a_file_holds_a_parameter_of_two_sums_once_and_computes_both(name, tmp_path) -> None:
    model = with_table(lambda m, x: m.b(F.relu(m.a(x) + m.table)) + m.table, 6, 8)
    agrees(name, W8A8, model, tmp_path, torch.randn(32, *X[1:]))


def agrees(name: str, policy: dict[str, Any], model: nn.Module, folder: Any, x: Tensor | None = None) -> None:
    if policy is not NARROW:
        skip_if_saturating(name)
    target, x = target_of(name), torch.randn(32, 3, 8, 8) if x is None else x
    policy, original = policy | {"engine": target.engine}, copy.deepcopy(model)
    plan = quantized(model, x, policy)
    prepared, path = target.prepared(model, plan), folder / target.file
    target.export(prepared, plan, x[:4], path)
    runner, comparison = target.load(path, original), Comparison()
    verdict = Verdict()
    check_codes(verdict, prepared, target.codes(path))
    target.check_kernels(verdict, prepared, runner)
    assert verdict.passed, verdict.checks
    if name == "executorch":
        assert runner.float_layers() == ["head"], "which no grid follows"
    with torch.no_grad():
        comparison.update(model(x).numpy(), runner(x.numpy()))
    assert comparison.mean_steps <= 0.2, "no more than borders between codes, which reciprocals of scales move"


@pytest.mark.parametrize("name", ["onnx", "openvino"])
@pytest.mark.parametrize(
    "forward",
    [
        pytest.param(lambda m, x: m.b(m.a(x) + m.table[1:7]), id="slice"),
        pytest.param(lambda m, x: m.b(m.a(x) * m.table[:6].exp()), id="computed"),
        pytest.param(lambda m, x: m.b(m.a(x) + m.buffer), id="buffer"),
    ],
)
def test_what_is_computed_from_no_data_is_codes_in_the_graph(forward, name, tmp_path) -> None:
    onnx = pytest.importorskip("onnx")
    from qat.export.onnx.export import export_onnx

    skip_if_saturating(name)
    model, x, target = with_table(forward, 9, 8), torch.randn(16, 6, 8), target_of(name)
    model.register_buffer("buffer", torch.randn(6, 8))
    original = copy.deepcopy(model)
    plan = quantized(model, x, {**W8A8, "act": {"bits": 5}, "kinds": "all", "engine": target.engine})
    prepared = target.prepared(model, plan)
    target.export(prepared, plan, x, tmp_path / target.file)
    with torch.no_grad():
        expected, found = model(x), torch.from_numpy(target.load(tmp_path / target.file, original)(x.numpy()))
    assert (expected - found).abs().mean() <= 0.05 * (expected.max() - expected.min()) / 255
    export_onnx(prepared, x, tmp_path / "plain.onnx")
    floats = [t for t in onnx.load(tmp_path / "plain.onnx").graph.initializer if t.data_type == 1]
    assert all(len(t.dims) <= 1 for t in floats), "scales and biases alone"
