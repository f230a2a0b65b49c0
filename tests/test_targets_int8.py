"""Runtimes that have int8 kernels alone: LiteRT, ExecuTorch's XNNPACK, Inductor's oneDNN."""

import copy
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from small_models import POLICY, Shape, both, lived, quantized
from test_targets import TENSOR, W8A8, Case, target_of
from torch import nn

from qat.config.exports import of_file, target_named
from qat.config.presets import preset
from qat.errors import UserError
from qat.export.bisect import first_divergence
from qat.export.executorch.file import PteFile
from qat.export.int8_graph import CLIPS, DEQUANTIZE, QUANTIZE, float_products
from qat.export.int8_program import int8_program
from qat.export.nibbles import pack, unpack
from qat.export.verify import Comparison, Verdict, check_codes
from qat.models import SmallCNN

torch.set_num_threads(1)


def proven(target: Any, case: Case, path: Any, runner: Any) -> Verdict:
    """Codes and kernels of a file."""
    verdict = Verdict()
    check_codes(verdict, case.converted, target.codes(path))
    target.check_kernels(verdict, case.converted, runner)
    return verdict


# -- the program -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8], ids=str)
@pytest.mark.parametrize(
    ("shape", "policy"),
    [
        pytest.param(Shape(max_pool=True), W8A8, id="w8a8-pool"),
        pytest.param(Shape(kind="linear", activation="relu6", norm=False), TENSOR, id="w5a6-per-tensor"),
    ],
)
def test_moved_and_clipped_codes_have_the_same_values(shape, policy, dtype) -> None:
    case = Case(shape, policy)
    program = int8_program(case.converted, case.x[:4], dtype)
    with torch.no_grad():
        expected, found = case.converted(case.x), program.module()(case.x)
    step = (expected.max() - expected.min()) / 255
    assert (expected - found).abs().mean() <= 0.05 * step, (
        "torch's quantize multiplies, and may flip a code at a border"
    )
    for node in program.graph.find_nodes(op="call_function", target=QUANTIZE):
        assert node.args[3:] == (torch.iinfo(dtype).min, torch.iinfo(dtype).max, dtype)


def test_a_tensor_that_two_layers_read_is_quantized_once_and_before_it_is_pooled() -> None:
    case = Case(Shape(max_pool=True), W8A8)
    graph = int8_program(case.converted, case.x[:4]).graph
    quantized = graph.find_nodes(op="call_function", target=QUANTIZE)
    assert len({(q.args[0], q.args[1]) for q in quantized}) == len(quantized)
    [pool] = [node for node in graph.nodes if "max_pool2d" in str(node.target)]
    assert pool.args[0].target is DEQUANTIZE and all(user.target is QUANTIZE for user in pool.users)


@pytest.mark.parametrize("clip", [nn.ReLU(), nn.ReLU6(), nn.Hardtanh(), nn.Hardtanh(-0.5, 2.0)], ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "affine"])
def test_the_clip_of_a_narrow_grid_and_the_models_own_become_one(clip, symmetric) -> None:
    x = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), clip, nn.MaxPool2d(2), nn.Conv2d(4, 4, 1), clip, nn.Conv2d(4, 2, 1))
    converted = both(model, x, W8A8 | {"act": {"bits": 4, "symmetric": symmetric}})[1]
    program = int8_program(converted, x)
    quantized: Any = program.graph.find_nodes(op="call_function", target=QUANTIZE)
    clips = [node.args[0] for node in quantized if node.args[0].target in CLIPS]
    assert len(clips) == 3 and all(node.args[0].target not in CLIPS for node in clips)
    with torch.no_grad():
        assert torch.allclose(program.module()(x), converted(x), atol=1e-5)


def test_a_layer_that_no_grid_follows_is_named_and_no_constant_is_left_that_nobody_reads() -> None:
    case = Case(Shape(), W8A8)
    program = int8_program(case.converted, case.x[:4])
    assert float_products(program) == ["head"]
    assert all(node.users for node in program.graph.nodes if node.op == "placeholder")


def test_a_product_of_floats_is_no_integer_product_without_a_grid() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.queries, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q = self.queries(x)
            return self.head((q @ q.transpose(1, 2)).softmax(-1) @ q)

    x = torch.randn(4, 5, 8)
    _, converted = both(Mixing(), x, {**W8A8, "sites": "off"})
    assert float_products(int8_program(converted, x)) == ["queries", "head"]


@pytest.mark.parametrize("name", ["litert", "executorch", "torch_inductor"])
@pytest.mark.parametrize(
    ("weight", "said"),
    [
        pytest.param({"granularity": "group", "group_size": 4}, "use granularity: channel", id="groups"),
        pytest.param({"symmetric": False}, "use symmetric: true", id="zero-point"),
    ],
)
def test_weights_without_an_int8_kernel_are_refused_with_what_to_train(name, weight, said, tmp_path) -> None:
    target, case = target_of(name), Case(Shape(kind="linear"), W8A8 | {"weight": {"bits": 8, **weight}})
    with pytest.raises(UserError, match=said):
        case.export(target, tmp_path)
    assert list(tmp_path.iterdir()) == []


# -- LiteRT ----------------------------------------------------------------------------------------------------------


def test_float_biases_are_refused_by_a_format_whose_kernels_add_integers(tmp_path) -> None:
    target, case = target_of("litert"), Case(Shape(kind="linear"), W8A8 | {"round_bias": "never"})
    with pytest.raises(UserError, match=r"train with quant.round_bias=eval"):
        case.export(target, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("optimize", "most"),
    [
        pytest.param(True, 0.05, id="xnnpack"),
        pytest.param(False, 2, id="own-kernels-which-round-twice"),
    ],
)
def test_litert_puts_codes_of_8_bits_on_a_grid_of_4_as_training_does(optimize, most, tmp_path) -> None:
    target, x = target_of("litert"), torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    fake, converted = both(lived(SmallCNN(width=8)), x, preset("w4a4"))
    target.write(converted, None, x[:4], tmp_path)  # pyright: ignore[reportArgumentType]
    runner: Any = target.open(tmp_path / target.file, converted, optimize=optimize)
    comparison = Comparison()
    with torch.no_grad():
        comparison.update(fake(x).numpy(), runner(x.numpy()))
    assert comparison.mean_steps <= most


@given(arrays(np.int8, st.integers(0, 33), elements=st.integers(-8, 7)))
def test_packed_int4_is_unpacked_to_the_same_codes(codes: np.ndarray) -> None:
    packed = pack(codes, 4)
    assert packed.nbytes == (len(codes) + 1) // 2
    assert np.array_equal(unpack(packed, 4, signed=True)[: len(codes)], codes)


def test_litert_holds_weights_of_4_bits_in_4_bits_if_asked_and_computes_with_them(tmp_path) -> None:
    target_of("litert")
    target = target_named("litert", {"int4": True})
    sizes = []
    for bits in (8, 4):
        case = Case(Shape(), POLICY | {"weight": {"bits": bits, "granularity": "channel"}})
        path = case.export(target, tmp_path)
        runner = target.load(path, case.float_model)
        assert proven(target, case, path, runner).passed
        assert case.compared(runner).mean_steps <= 0.2
        sizes.append(path.stat().st_size)
    weights = sum(m.weight.numel() for m in case.float_model.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    assert abs(sizes[0] - sizes[1] - weights / 2) < 200, "alignment, and the names of types"


def test_litert_computes_every_layer_that_a_grid_follows_on_integers(tmp_path) -> None:
    target, case = target_of("litert"), Case(Shape(kind="strided"), W8A8)
    path = case.export(target, tmp_path)
    runner: Any = target.load(path, case.float_model)
    verdict = proven(target, case, path, runner)
    assert verdict.passed and verdict.facts["integer_nodes"] == verdict.facts["expected_integer_nodes"] - 1 == 3
    assert runner.float_layers() == ["head"]


class Shortcuts(nn.Module):
    """A shortcut that drops pixels and adds channels of zeros, padded pooling before a ReLU, groups, concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grouped = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3, 2, 1, groups=2)
        self.twice, self.head = nn.Conv2d(16, 8, 1), nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(F.max_pool2d(self.stem(x), 3, 2, 1))
        y = self.grouped(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        y = torch.cat([torch.relu(y), torch.relu(self.twice(torch.relu(y)))], 1)
        return self.head(y.mean((2, 3)))


class Attending(nn.Module):
    """Attention written out, with a residual, between linear layers of three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(12, 12) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (f(x).view(-1, 6, 2, 6).transpose(1, 2) for f in (self.q, self.k, self.v))
        weights = torch.softmax(q @ k.transpose(-2, -1) / 6**0.5, -1)
        y = (weights @ v).transpose(1, 2).flatten(2)
        return F.silu(self.out(y)) * 0.5 - F.gelu(x)


@pytest.mark.parametrize(
    ("make", "shape", "integer"),
    [
        pytest.param(Shortcuts, (3, 14, 14), 3, id="convolutions"),
        pytest.param(Attending, (6, 12), 4, id="attention"),
    ],
)
def test_litert_computes_what_the_converted_model_does(make, shape, integer, tmp_path) -> None:
    target, x = target_of("litert"), torch.randn(32, *shape, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    converted = both(make(), x, W8A8)[1]
    target.write(converted, Any, x[:4], tmp_path)  # pyright: ignore[reportArgumentType]
    path, verdict = tmp_path / target.file, Verdict()
    runner: Any = target.open(path, converted)
    check_codes(verdict, converted, target.codes(path))
    target.check_kernels(verdict, converted, runner)
    assert verdict.passed and verdict.facts["integer_nodes"] == integer, verdict.checks
    comparison = Comparison()
    with torch.no_grad():
        comparison.update(converted(x).numpy(), runner(x.numpy()))
    assert comparison.mean_steps <= 0.1, comparison


def test_an_operation_that_the_file_has_no_form_for_is_named(tmp_path) -> None:
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(12, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(x.cumsum(1))

    target, x = target_of("litert"), torch.randn(8, 12)
    with pytest.raises(UserError, match=r"aten.cumsum.default has no form in this package's .tflite files"):
        target.write(both(Sorted(), x, W8A8)[1], None, x, tmp_path)  # pyright: ignore[reportArgumentType]


def test_an_operation_that_torch_adds_is_named_by_the_module_whose_operations_read_it(tmp_path) -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru, self.head = nn.GRU(12, 4, batch_first=True), nn.Linear(4, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.gru(x)[0][:, -1])

    target, x = target_of("litert"), torch.randn(8, 3, 12)
    with pytest.raises(UserError, match=r"^'gru': aten.sym_size.int has no form"):
        target.write(both(Last(), x, W8A8)[1], None, x, tmp_path)  # pyright: ignore[reportArgumentType]


# -- ExecuTorch ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_executorch_computes_what_was_trained_on_integers_from_the_same_codes(tmp_path) -> None:
    target, case = target_of("executorch"), Case(Shape(kind="strided", max_pool=True), W8A8)
    path = case.export(target, tmp_path)
    runner: Any = target.load(path, case.float_model)
    verdict = proven(target, case, path, runner)
    assert verdict.passed and verdict.facts["integer_nodes"] == verdict.facts["expected_integer_nodes"] - 1 == 3
    assert runner.float_layers() == ["head"]
    assert max(map(len, PteFile.read(path).keys)) <= 2, "names of constants are short"
    comparison = case.compared(runner)  # 32 samples, in parts of 8
    assert comparison.mean_steps <= 0.01 and comparison.agreement == 1
    assert runner(case.x[:3].numpy()).shape == (3, 5)
    assert runner(case.x[:0].numpy()).shape == (0, 5), "of which XNNPACK would end the process"
    assert "does not show ('head')" in first_divergence(case.converted, runner, case.x.numpy())
    load = f"from qat.export.executorch.target import *; ExecuTorchRunner(Path({str(path)!r}))"
    subprocess.run([sys.executable, "-c", load], check=True)  # a fresh process, where nothing was exported
    with pytest.raises(UserError, match=r"model.pte: cannot run on float32 \[4, 3, 9, 9\]"):
        runner(np.zeros((4, 3, 9, 9), np.float32))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "policy", "wrong", "said"),
    [
        pytest.param(
            Shape(kind="depthwise", activation="relu6"), POLICY | {"act": {"bits": 4}}, "body",
            "the first layer that diverges is 'body'", id="depthwise-of-4-bit-activations",
        ),
        pytest.param(Shape(), W8A8, "head", "in what this format does not show ('head')", id="behind-all-grids"),
    ],
)  # fmt: skip
def test_bisection_of_an_executorch_file_names_the_layer_whose_scale_is_wrong(
    shape, policy, wrong, said, tmp_path
) -> None:
    target, case = target_of("executorch"), Case(shape, policy)
    weight: Any = case.converted.get_submodule(f"{wrong}.integer_weight")
    scale = weight.scale.clone()
    weight.scale.mul_(1.5)
    path = case.export(target, tmp_path)
    weight.scale.copy_(scale)
    before = path.read_bytes()
    found = first_divergence(case.converted, target.load(path, case.float_model), case.x.numpy())
    assert found.endswith(said) and path.read_bytes() == before


@pytest.mark.slow
def test_bisection_of_an_executorch_file_leaves_out_a_layer_that_runs_in_two_graphs(tmp_path) -> None:
    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.a(x))
            for _ in range(2):
                x = torch.cumsum(x + torch.relu(self.b(x)), 1)  # sums along an axis are none of XNNPACK's
            return self.head(x)

    model, x, target = Again(), torch.randn(16, 8), target_of("executorch")
    original = copy.deepcopy(model)
    plan = quantized(model, x, W8A8 | {"engine": target.engine})
    prepared, path = target.prepared(model, plan), tmp_path / target.file
    target.export(prepared, plan, x[:4], path)
    runner: Any = target.load(path, original)
    assert "b" not in runner.layer_outputs(x.numpy())
    assert first_divergence(prepared, runner, x.numpy())


@pytest.mark.slow
def test_a_graph_of_xnnpack_is_taken_apart_and_put_together_again_bit_for_bit(tmp_path) -> None:
    target, case = target_of("executorch"), Case(Shape(kind="strided", activation="relu6"), W8A8)
    path = case.export(target, tmp_path)
    from executorch.exir._serialize._program import deserialize_pte_binary  # pyright: ignore

    from qat.export.executorch.graph import compile_graph, decompile

    for data in deserialize_pte_binary(path.read_bytes()).program.backend_delegate_data:
        graph = decompile(bytes(data.data))
        again = decompile(compile_graph(graph, bytes(data.data)))
        assert again == graph and any("output_min_max" in node for node in graph["xnodes"]) | (len(graph["xnodes"]) < 5)


def test_executorch_refuses_a_convolution_that_it_would_compute_wrongly(tmp_path) -> None:
    target, x = target_of("executorch"), torch.randn(8, 3, 6, 6)
    converted = both(nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(64, 5)), x, W8A8)[1]
    with pytest.raises(UserError, match=r"'0' is a convolution whose output lies on no grid"):
        target.write(converted, None, x, tmp_path)  # pyright: ignore[reportArgumentType]
    assert list(tmp_path.iterdir()) == []


class Joined(nn.Module):
    """Codes of two grids, concatenated into those of a third."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(8, 4), nn.Linear(8, 4), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.cat([self.a(x), 3 * self.b(x)], 1))


def test_executorch_refuses_a_concatenation_of_several_grids_and_says_where(tmp_path) -> None:
    target, x = target_of("executorch"), torch.randn(8, 8)
    converted = both(nn.Sequential(Joined()), x, W8A8 | {"concat": "separate", "kinds": "all"})[1]
    with pytest.raises(UserError, match=r"'0.cat_0' concatenates codes of one grid .* set quant.concat=shared"):
        target.write(converted, None, x, tmp_path)  # pyright: ignore[reportArgumentType]
    assert list(tmp_path.iterdir()) == []


class Decoder(nn.Module):
    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3), last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.first(x)))


@pytest.mark.slow
@pytest.mark.parametrize("last", [nn.ConvTranspose2d(4, 4, 2, 2)], ids=["transposed-without-a-grid"])
def test_executorch_refuses_a_convolution_that_xnnpack_does_not_take(last, tmp_path) -> None:
    target, x, model = target_of("executorch"), torch.randn(8, 3, 6, 6), Decoder(last)
    plan = quantized(model, x, W8A8 | {"engine": target.engine})
    with pytest.raises(UserError, match=r"'last' is a convolution that XNNPACK does not compute on integers here"):
        target.export(target.prepared(model, plan), plan, x, tmp_path / target.file)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_what_executorch_refuses_to_load_is_one_line_and_no_file(tmp_path, monkeypatch) -> None:
    target, model, x = target_of("executorch"), Joined(), torch.randn(8, 8)
    monkeypatch.setattr("qat.export.executorch.target._mixed", lambda program: None)
    plan = quantized(model, x, W8A8 | {"concat": "separate", "kinds": "all"})
    with pytest.raises(UserError, match=r"^model.pte: executorch refuses it: ") as caught:
        target.export(target.prepared(model, plan), plan, x, tmp_path / target.file)
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("clip", [nn.ReLU6(), nn.Hardtanh()], ids=str)
def test_executorch_computes_on_integers_what_a_clip_and_a_narrow_grid_follow(clip, tmp_path) -> None:
    target, x = target_of("executorch"), torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), clip, nn.Conv2d(4, 4, 3), clip, nn.Flatten(), nn.Linear(64, 5))
    converted = both(model, x, W8A8 | {"act": {"bits": 4}})[1]
    target.write(converted, None, x[:8], tmp_path)  # pyright: ignore[reportArgumentType]
    runner: Any = target.open(tmp_path / target.file, converted)
    assert runner.float_layers() == ["5"]
    comparison = Comparison()
    with torch.no_grad():
        comparison.update(converted(x[:9]).numpy(), runner(x[:9].numpy()))
    assert comparison.mean_steps <= 0.01


@pytest.mark.parametrize(
    ("layer", "shape", "said"),
    [
        pytest.param(nn.Conv3d(4, 4, 2), (5, 5, 5), r"'0' has three dimensions", id="3d"),
        pytest.param(
            nn.ConvTranspose2d(4, 4, 2, groups=2), (5, 5),
            r"'0' is transposed and has groups, .* with a rule \{match: \"0\", weight: off, act: off\}", id="groups",
        ),
    ],
)  # fmt: skip
def test_what_executorch_has_no_kernel_for_is_refused_before_training(layer, shape, said) -> None:
    target, x, model = target_of("executorch"), torch.randn(4, 4, *shape), nn.Sequential(layer, nn.ReLU())
    plan = quantized(model, x, W8A8)
    with pytest.raises(UserError, match=said):
        raise UserError(target.refusal(model, plan) or "")


def test_executorch_needs_a_batch_that_can_vary() -> None:
    target_of("executorch")
    from qat.export.executorch.target import ExecuTorchTarget

    with pytest.raises(UserError, match="max_batch=1: must be at least 2"):
        ExecuTorchTarget(max_batch=1)


# -- Inductor --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_inductor_compiles_every_layer_to_an_int8_kernel_and_a_smaller_batch_to_none(tmp_path) -> None:
    target, case = target_of("torch_inductor"), Case(Shape(), TENSOR)
    path = case.export(target, tmp_path)
    assert type(of_file(path, {})) is type(target), "though torch programs end in .pt2, too"
    runner: Any = target.load(path, case.float_model)
    comparison = case.compared(runner)
    assert comparison.mean_steps <= 0.05 and comparison.agreement >= 0.9
    assert np.allclose(runner(case.x[:5].numpy()), runner(case.x.numpy())[:5], atol=comparison.step / 10)
    assert runner.batches == [32]
    verdict = proven(target, case, path, runner)
    assert verdict.passed and verdict.facts["integer_nodes"] == 3
    assert case.compared(target.load(path, case.float_model, optimize=False)).mean_steps <= 0.05
