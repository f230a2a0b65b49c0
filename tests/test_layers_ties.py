"""One weight stays one weight: tied layers, modules that run twice, and modules under two names, from insertion over a
training step and a checkpoint to the packed file.
"""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from small_models import POLICY, quantized
from torch import Tensor, nn

from qat.convert import convert
from qat.export.packed import MANIFEST, WEIGHTS, load_packed, save_packed
from qat.insert import apply_plan, named_quantizers
from qat.planning.plan import Plan

LSQ = {"weight": {"bits": 4, "granularity": "channel", "quantizer": "lsq"}, "act": {"bits": 8, "quantizer": "lsq"}}


class Language(nn.Module):
    """The table of the embedding is the head's matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.mix(self.embed(tokens)))


class Twice(nn.Module):
    """A block that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.block = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.block(self.block(self.embed(tokens)))


class Named(nn.Module):
    """A layer under two names, called by the second."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layer = nn.Linear(8, 8)
        self.alias = self.layer

    def forward(self, tokens: Tensor) -> Tensor:
        return self.alias(self.embed(tokens))


class Recurrent(nn.Module):
    """Two recurrent layers that share their matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.a, self.b = nn.GRU(8, 8), nn.GRU(8, 8)
        for name in ("weight_ih_l0", "weight_hh_l0"):
            setattr(self.b, name, getattr(self.a, name))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.b(self.a(self.embed(tokens))[0])[0]


# model, its weights' grids, and pairs of (layer, layer) that share theirs
MODELS = [
    pytest.param(Language, {"embed", "mix"}, [("embed", "head")], id="embedding-and-head"),
    pytest.param(Twice, {"embed", "block.0", "block.2"}, [], id="block-called-twice"),
    pytest.param(Named, {"embed", "layer"}, [("layer", "alias")], id="module-with-two-names"),
    pytest.param(Recurrent, {"embed", "a.ih_l0", "a.hh_l0"}, [("a.ih_l0", "b.ih_l0"), ("a.hh_l0", "b.hh_l0")],
                 id="recurrent-layers"),
]  # fmt: skip


def made(make) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return make(), torch.randint(11, (4, 5))


@pytest.mark.parametrize(("make", "grids", "pairs"), MODELS)
def test_one_weight_has_one_grid_through_a_training_step(make, grids, pairs):
    model, tokens = made(make)
    count = len(list(model.parameters()))
    plan = quantized(model, tokens, LSQ)
    assert set(plan.weights) == grids
    weights = [q for _, q in named_quantizers(model) if q.is_weight]
    assert len(weights) == len(grids)
    assert len(list(model.parameters())) == count + len(list(named_quantizers(model)))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = {q: q.scale.detach().clone() for q in weights}
    model.train()(tokens).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(q.scale, old) for q, old in before.items())
    for first, second in pairs:
        one, other = model.get_submodule(first), model.get_submodule(second)
        assert one.weight_quantizer is other.weight_quantizer
        assert torch.equal(one.quantized_weight(), other.quantized_weight())


@pytest.mark.parametrize(("make", "grids", "pairs"), MODELS)
def test_a_checkpoint_brings_weights_and_grids_into_a_fresh_model_and_ties_stay(make, grids, pairs):
    model, tokens = made(make)
    plan = quantized(model, tokens, LSQ)
    fresh = make()
    apply_plan(fresh, Plan.from_dict(plan.to_dict()))
    fresh.load_state_dict(model.state_dict())
    for other in (fresh.eval(), copy.deepcopy(model)):
        assert torch.equal(other(tokens), model(tokens))
        assert len([q for _, q in named_quantizers(other) if q.is_weight]) == len(grids)
        for first, second in pairs:
            assert other.get_submodule(first).weight_quantizer is other.get_submodule(second).weight_quantizer


@pytest.mark.parametrize(("make", "grids", "pairs"), MODELS)
def test_the_packed_file_stores_a_tied_weight_once(make, grids, pairs, tmp_path):
    model, tokens = made(make)
    plan = quantized(model, tokens)
    converted = convert(model, plan)
    for first, second in pairs:
        assert converted.get_submodule(first).integer_weight is converted.get_submodule(second).integer_weight
    save_packed(converted, plan, tmp_path)
    stored = [key for key in load_file(tmp_path / WEIGHTS) if key.endswith("integer_weight.codes")]
    assert {key.removesuffix(".integer_weight.codes") for key in stored} == grids
    packed = json.loads((tmp_path / MANIFEST).read_text())["packed"]
    assert set(packed) == set(stored) and {how["bits"] for how in packed.values()} == {4}
    loaded = load_packed(make(), tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(tokens), converted(tokens))
        torch.testing.assert_close(converted(tokens), model(tokens), rtol=0, atol=1e-5)


def test_a_tied_weight_costs_the_file_nothing(tmp_path):
    sizes = []
    for tied in (True, False):
        torch.manual_seed(0)
        model = Language()
        if not tied:
            model.head.weight = nn.Parameter(model.embed.weight.detach().clone())
        plan = quantized(model, torch.randint(11, (4, 5)))
        save_packed(convert(model, plan), plan, tmp_path / str(tied))
        tensors = load_file(tmp_path / str(tied) / WEIGHTS)
        sizes.append(
            sum(t.numel() * t.element_size() for k, t in tensors.items() if k.endswith("integer_weight.codes"))
        )
    assert sizes[1] - sizes[0] == 11 * 8 // 2


def test_files_written_before_ties_were_shared_still_load(tmp_path):
    model, tokens = made(Language)
    plan = quantized(model, tokens)
    converted = convert(model, plan)
    converted.head.integer_weight = copy.deepcopy(converted.embed.integer_weight)
    save_packed(converted, plan, tmp_path)
    loaded = load_packed(Language(), tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(tokens), converted(tokens))


def test_a_tied_weight_that_a_batch_norm_folds_into_is_not_shared_any_more():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.BatchNorm1d(8)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.b(self.a(x)))

    torch.manual_seed(0)
    model, x = Net(), torch.randn(6, 8)
    model.norm.running_var.uniform_(0.5, 2)
    plan = quantized(model, x, POLICY)
    assert plan.batch_norms == {"b": "norm"}
    converted = convert(model, plan)
    assert converted.a.integer_weight is not converted.b.integer_weight
    with torch.no_grad():
        torch.testing.assert_close(converted(x), model(x), rtol=1e-5, atol=1e-5)
