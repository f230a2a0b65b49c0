"""Recurrent layers: with fine grids the twin is the float layer, in every configuration; every matrix has its own grid;
conversion and packed files keep the bits.
"""

import copy

import pytest
import torch
from small_models import POLICY, both, quantized
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from qat.calibrate import calibrate
from qat.convert import convert
from qat.export.packed import load_packed, save_packed
from qat.insert import apply_plan, named_quantizers, remove
from qat.layers import Part
from qat.planning.audit import audit
from qat.planning.plan import Plan
from qat.planning.planner import make_plan
from qat.policies.policy import QuantPolicy

FINE = {"weight": {"bits": 16, "granularity": "channel"}, "act": {"bits": 16}}
WEIGHTS_ONLY = {"weight": {"bits": 16, "granularity": "channel"}}


class Mine(nn.LSTM):
    """A subclass without a forward of its own."""


LAYERS = [
    pytest.param(lambda: nn.LSTM(6, 8), id="lstm"),
    pytest.param(lambda: nn.LSTM(6, 8, 2, bidirectional=True, batch_first=True), id="lstm-deep-both-ways"),
    pytest.param(lambda: nn.LSTM(6, 8, 2, proj_size=3, bidirectional=True), id="lstm-projected",
                 marks=pytest.mark.filterwarnings("ignore:LSTM with projections")),
    pytest.param(lambda: nn.LSTM(6, 8, bias=False), id="lstm-without-bias"),
    pytest.param(lambda: Mine(6, 8), id="subclass"),
    pytest.param(lambda: nn.GRU(6, 8, 2, bidirectional=True), id="gru"),
    pytest.param(lambda: nn.RNN(6, 8, 2), id="rnn-tanh"),
    pytest.param(lambda: nn.RNN(6, 8, nonlinearity="relu", batch_first=True), id="rnn-relu"),
]  # fmt: skip


def padded(layer: nn.Module) -> Tensor:
    return torch.randn(5, 4, 6)


def packed(layer) -> PackedSequence:
    return pack_padded_sequence(torch.randn(4, 7, 6), torch.tensor([3, 7, 1, 7]), True, enforce_sorted=False)


def unbatched(layer: nn.Module) -> Tensor:
    return torch.randn(5, 6)


INPUTS = [pytest.param(f, id=f.__name__) for f in (padded, packed, unbatched)]


def tensors(output) -> list[Tensor]:
    """Everything a layer returned, flat; a packed sequence is a tuple of tensors."""
    if isinstance(output, Tensor):
        return [output]
    return [t for o in output if o is not None for t in tensors(o)]


def close(a, b, tolerance: float) -> None:
    for mine, theirs in zip(tensors(a), tensors(b), strict=True):
        assert mine.shape == theirs.shape
        torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("policy", [pytest.param(FINE, id="stepwise"), pytest.param(WEIGHTS_ONLY, id="fused")])
@pytest.mark.parametrize("make_input", INPUTS)
@pytest.mark.parametrize("make", LAYERS)
def test_on_fine_grids_the_twin_is_the_float_layer(make, make_input, policy):
    torch.manual_seed(0)
    layer = make().eval()
    x = make_input(layer)
    state = layer(x)[1]
    given = tuple(s * 0.5 for s in state) if isinstance(state, tuple) else state * 0.5
    run = lambda: (layer(x), layer(x, given))  # noqa: E731
    expected = run()
    plan, _ = make_plan(layer, QuantPolicy.from_dict(policy), lambda: layer(x))
    apply_plan(layer, plan)
    calibrate(layer, run)
    assert type(layer) is not type(make())
    close(run(), expected, 1e-3)


def weights_of(plan: Plan) -> set[str]:
    return set(plan.weights)


def test_every_matrix_of_every_layer_and_direction_has_a_grid_of_its_own():
    x = torch.randn(5, 4, 6)
    plan = quantized(nn.Sequential(nn.LSTM(6, 8, 2, bidirectional=True)), x)
    assert weights_of(plan) == {
        f"0.{kind}_l{layer}{way}" for kind in ("ih", "hh") for layer in (0, 1) for way in ("", "_reverse")
    }


def test_a_layers_state_is_one_tensor_for_its_next_step_and_the_layer_above():
    layer = nn.LSTM(6, 8, 2, bidirectional=True)
    plan = quantized(layer, torch.randn(5, 4, 6))
    assert plan.layers["ih_l0"].input == plan.layers["ih_l0_reverse"].input == ["ih_l0.input"]
    below = [plan.layers[n].input for n in ("hh_l0", "hh_l0_reverse", "ih_l1", "ih_l1_reverse")]
    assert below == [["hh_l0.input"]] * 4
    assert layer.ih_l1.input_quantizer is layer.hh_l0_reverse.input_quantizer


@pytest.mark.parametrize(("given", "signed"), [(False, False), (True, True)])
def test_the_state_of_a_relu_network_is_unsigned_unless_it_starts_elsewhere(given, signed):
    layer, x = nn.RNN(6, 8, nonlinearity="relu"), torch.randn(5, 4, 6)
    run = (lambda: layer(x, -torch.ones(1, 4, 8))) if given else (lambda: layer(x))
    plan, _ = make_plan(layer, QuantPolicy.from_dict(POLICY), run)
    assert plan.activations["hh_l0.input"].signed is signed


def test_rules_address_a_matrix_and_the_class_of_its_layer():
    rules = {
        "recurrent": {"match": "*.hh_*", "weight": {"bits": 8}},
        "inputs": {"match": "*.ih_*", "type": "LSTM", "act": False},
    }
    plan = quantized(nn.Sequential(nn.LSTM(6, 8)), torch.randn(5, 4, 6), POLICY | {"rules": rules})
    assert (plan.weights["0.ih_l0"].bits, plan.weights["0.hh_l0"].bits) == (4, 8)
    assert plan.layers["0.ih_l0"].input == []


@pytest.mark.parametrize("make_input", INPUTS[:2])
@pytest.mark.parametrize("make", LAYERS)
def test_training_reaches_every_weight_and_every_scale(make, make_input):
    torch.manual_seed(0)
    layer = make()
    x = make_input(layer)
    policy = {"weight": {"bits": 4, "quantizer": "lsq"}, "act": {"bits": 8, "quantizer": "lsq"}}
    plan = quantized(layer, x, policy)
    assert weights_of(plan)
    layer.train()
    sum((t.float() ** 2).sum() for t in tensors(layer(x)) if t.is_floating_point()).backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


@pytest.mark.parametrize("make_input", INPUTS)
@pytest.mark.parametrize("make", LAYERS)
def test_the_converted_layer_computes_what_evaluation_did(make, make_input):
    torch.manual_seed(0)
    layer = make()
    x = make_input(layer)
    fake, converted = both(layer, x)
    with torch.no_grad():
        close(converted(x), fake(x), 1e-6)
    assert not list(converted.parameters())  # no float copy is left
    assert converted.part("ih_l0").integer_weight.bits == 4


@pytest.mark.parametrize("make", LAYERS)
def test_the_packed_file_holds_it_bit_for_bit(make, tmp_path):
    torch.manual_seed(0)
    layer, x = make(), torch.randn(5, 4, 6)
    plan = quantized(layer, x)
    converted = convert(layer, plan)
    save_packed(converted, plan, tmp_path)
    loaded = load_packed(make(), tmp_path)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(tensors(loaded(x)), tensors(converted(x)), strict=True))


@pytest.mark.parametrize("make_input", INPUTS[:2])
@pytest.mark.parametrize("make", LAYERS)
def test_a_weight_is_rounded_once_for_all_steps_and_its_gradient_is_the_sum_over_them(make, make_input, monkeypatch):
    torch.manual_seed(0)
    layer = make()
    x, seen, gradients = make_input(layer), [], []
    quantized(layer, x)
    for name, quantizer in named_quantizers(layer):
        if name.endswith("weight_quantizer"):
            quantizer.register_forward_hook(lambda *_, name=name: seen.append(name))
    for once in (True, False):
        if not once:
            monkeypatch.setattr(Part, "rounded", lambda part: part)
        layer.train().zero_grad()
        sum(t.square().sum() for t in tensors(layer(x)) if t.requires_grad).backward()
        gradients.append([p.grad.clone() for p in layer.parameters()])
        if once:
            assert len(seen) == len(set(seen)) == sum(n.startswith("weight") for n in layer._flat_weights_names)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # sums in another order


def test_float_keys_stay_and_removal_restores_the_layer():
    x = torch.randn(5, 4, 6)
    model = nn.Sequential(nn.LSTM(6, 8, 2)).eval()
    keys, attributes, expected = list(model.state_dict()), set(vars(model[0])), model(x)
    quantized(model, x)
    assert [k for k in model.state_dict() if "quantizer" not in k] == keys
    remove(model)
    assert list(model.state_dict()) == keys and set(vars(model[0])) == attributes and type(model[0]) is nn.LSTM
    close(model(x), expected, 0)


def test_copies_share_nothing_and_a_checkpoint_restores_it():
    x = torch.randn(5, 4, 6)
    layer = nn.GRU(6, 8)
    plan = quantized(layer, x)
    other = copy.deepcopy(layer)
    assert other.hh_l0.owner[0] is other and other.hh_l0.weight is other.weight_hh_l0
    again = nn.GRU(6, 8)
    apply_plan(again, Plan.from_dict(plan.to_dict()))
    again.load_state_dict(layer.state_dict())
    for twin in (other, again.eval()):
        close(twin(x), layer(x), 0)


@pytest.mark.parametrize("train", [True, False], ids=["training", "evaluation"])
@torch._dynamo.config.patch(allow_rnn=True)  # without it torch refuses recurrent layers, float ones too
def test_it_compiles_in_one_graph(train):
    torch._dynamo.reset()
    x = torch.randn(3, 4, 6)
    layer = nn.LSTM(6, 8, 2, bidirectional=True)
    quantized(layer, x)
    layer.train(train)
    close(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x), 1e-6)


def test_dropout_between_layers_works_in_training_alone():
    x = torch.randn(5, 4, 6)
    layer = nn.LSTM(6, 8, 2, dropout=0.5)
    quantized(layer, x)
    assert torch.equal(layer(x)[0], layer(x)[0])
    layer.train()
    assert not torch.equal(layer(x)[0], layer(x)[0])


def test_states_of_the_wrong_shape_are_refused_as_torch_does():
    x = torch.randn(5, 4, 6)
    layer = nn.GRU(6, 8)
    quantized(layer, x)
    with pytest.raises(RuntimeError, match="Expected hidden size"):
        layer(x, torch.zeros(1, 1, 8))


CELLS = [pytest.param(c, id=c.__name__) for c in (nn.LSTMCell, nn.GRUCell, nn.RNNCell)]


class Loop(nn.Module):
    """A cell in a loop of the user's."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor):
        state = None
        for step in x:
            state = self.cell(step, state)
        return state


@pytest.mark.parametrize("cell", CELLS)
def test_cells_in_a_loop_are_the_float_cells_and_convert(cell):
    torch.manual_seed(0)
    x, model = torch.randn(5, 4, 6), Loop(cell(6, 8)).eval()
    expected = model(x)
    plan = quantized(model, x, FINE)
    assert weights_of(plan) == {"cell.ih", "cell.hh"}
    close(model(x), expected, 1e-3)
    remove(model)
    fake, converted = both(model, x)
    with torch.no_grad():
        close(converted(x), fake(x), 1e-6)
    assert not list(converted.parameters())


@pytest.mark.parametrize(
    ("layer", "macs"),
    [
        pytest.param(nn.LSTM(6, 8, batch_first=True), {"ih_l0": 5 * 32 * 6, "hh_l0": 5 * 32 * 8}, id="lstm"),
        pytest.param(nn.GRU(6, 8, batch_first=True), {"ih_l0": 5 * 24 * 6, "hh_l0": 5 * 24 * 8}, id="gru"),
        pytest.param(
            nn.LSTM(6, 8, proj_size=3, batch_first=True),
            {"ih_l0": 5 * 32 * 6, "hh_l0": 5 * 32 * 3, "hr_l0": 5 * 3 * 8}, id="projected",
            marks=pytest.mark.filterwarnings("ignore:LSTM with projections"),
        ),
    ],
)  # fmt: skip
def test_the_audit_counts_every_matrix_at_every_step(layer, macs):
    x = torch.randn(4, 5, 6)
    count = sum(p.numel() for p in layer.parameters())
    plan, recording = make_plan(layer, QuantPolicy.from_dict(POLICY), lambda: layer(x))
    before = audit(layer, plan, recording)
    apply_plan(layer, plan)
    rows = audit(layer, plan, recording)
    assert rows == before
    assert {r.name: r.macs for r in rows} == macs
    assert sum(r.params for r in rows) == count
    assert {r.type for r in rows} == {"LSTM" if isinstance(layer, nn.LSTM) else "GRU"}
    assert all(r.reason is None and r.weight == "int4/channel" for r in rows)


def test_one_quantizer_per_tensor():
    layer = nn.LSTM(6, 8, 2)
    quantized(layer, torch.randn(5, 4, 6))
    names = [n for n, _ in named_quantizers(layer)]
    assert len(names) == 4 + 3  # four matrices; the input and two states
