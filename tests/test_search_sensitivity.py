"""What widths do to a model: against quadratic losses whose Hessian is known, and through being killed."""

import copy
import itertools
from types import SimpleNamespace

import pytest
import torch
import yaml
from small_models import Drawn, Shape
from torch import nn

from qat.errors import UserError
from qat.planning.audit import audit, bops
from qat.planning.planner import make_plan
from qat.policies.networks import NetworkPolicies, policy_of
from qat.policies.policy import QuantPolicy
from qat.search import Search
from qat.search.costs import Files, make_costs, make_harms
from qat.search.emit import write
from qat.search.hessian import traces
from qat.search.measured import Measured
from qat.search.sensitivity import mean_loss, measure, missing
from qat.search.space import Layer, make_space, with_bits

POLICY = QuantPolicy.from_dict({"weight": {"bits": 4, "granularity": "channel"}, "act": {"bits": 8}})


class Quadratic(nn.Module):
    """y = W x: the Hessian of mean |y - t|^2 / 2 is that of linear regression."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 3, bias=False)

    def forward(self, x):
        return self.fc(x)


def _squared(x, target):
    def losses(model):
        yield 0.5 * (model(x) - target).square().sum(1).mean(), len(x)

    return losses


def _cross_entropy(model, batches=2):
    xs = [model.example(16, seed) for seed in range(batches)]
    ys = [torch.randint(0, 5, (16,), generator=torch.Generator().manual_seed(seed)) for seed in range(batches)]

    def losses(module):
        for x, y in zip(xs, ys, strict=True):
            yield nn.functional.cross_entropy(module(x), y), len(x)

    return losses


def _space(model, x, **settings):
    settings = {"weight_bits": [2, 4, 8], "act_bits": [4, 8], **settings}
    return make_space(model.eval(), POLICY, Search(**settings), lambda: model(x))


def test_the_traces_of_a_linear_regression_are_those_of_its_hessian():
    torch.manual_seed(0)
    model, x = Quadratic().eval(), torch.randn(64, 6)
    found = traces(model, {"fc.weight": ["fc"], "fc.input": ["fc"]}, _squared(x, torch.randn(64, 3)), probes=400)
    # H of W is E[x x'] for each of 3 rows; H of the inputs is W'W / B for each of B samples.
    assert found["fc.weight"] == pytest.approx(3 * x.square().sum(1).mean().item(), rel=0.1)
    assert found["fc.input"] == pytest.approx(model.fc.weight.square().sum().item(), rel=0.1)
    assert all(p.grad is None for p in model.parameters())


def test_a_last_batch_that_is_smaller_counts_by_its_samples():
    model, batches = Quadratic().eval(), [torch.randn(n, 6) for n in (12, 4)]
    with torch.no_grad():
        model.fc.weight.copy_(2 * torch.eye(3, 6))  # W'W is diagonal, so one probe is exact

    def losses(model):
        for x in batches:
            yield 0.5 * model(x).square().sum(1).mean(), len(x)

    found = traces(model, {"fc.input": ["fc"]}, losses, probes=1)
    assert found["fc.input"] == pytest.approx(3 * 2.0**2)


def test_the_traces_of_a_network_are_the_sums_of_its_second_derivatives():
    torch.manual_seed(0)
    model = Drawn(Shape(kind="linear", norm=False)).eval()
    losses = _cross_entropy(model, batches=1)
    found = traces(model, {"body.weight": ["body"]}, losses, probes=300)["body.weight"]
    weight = model.body.weight.detach()

    def loss(w):
        other = copy.deepcopy(model)
        del other.body.weight
        other.body.weight = w
        return next(losses(other))[0]

    hessian = torch.autograd.functional.hessian(loss, weight).view(weight.numel(), weight.numel())
    assert found == pytest.approx(hessian.trace().item(), rel=0.2)


class Attending(nn.Module):
    """Attention, whose float form never calls `out_proj`."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attn(x, x, x)[0].mean(1)[:, :5]


def test_the_input_of_an_attentions_last_projection_has_a_trace():
    torch.manual_seed(0)
    model, x, target = Attending().eval(), torch.randn(6, 4, 8), torch.randn(6, 5)
    found = traces(model, {"attn.out_proj.input": ["attn.out_proj"]}, _squared(x, target), probes=400)
    # The output is linear in it: W'W summed over the 5 outputs and 4 tokens, each of which counts for 1/4.
    weight = model.attn.out_proj.weight[:5]
    assert found["attn.out_proj.input"] == pytest.approx(weight.square().sum().item() / 4, rel=0.1)
    assert type(model.attn) is nn.MultiheadAttention


def test_small_noise_raises_the_loss_by_what_the_hessian_says(tmp_path):
    torch.manual_seed(0)
    model, x = Quadratic().eval(), torch.randn(256, 6)
    target = model(x).detach()  # at the minimum, the first-order term vanishes
    space = make_space(model, POLICY, Search([4, 6, 8], [4, 6, 8]), lambda: model(x))
    measured = Measured(tmp_path / "s.json")
    measure(space, measured, _squared(x, target), probes=200)
    for tensor in ("fc.weight", "fc.input"):
        for bits in (4, 6):
            loss, estimate = (measured.harm(tensor, bits, by) for by in ("loss", "hessian"))
            assert estimate == pytest.approx(loss, rel=0.5), "mse x trace ignores that columns of x differ"


def test_more_bits_hurt_less_by_every_measure(tmp_path):
    torch.manual_seed(0)
    model = Drawn(Shape(norm=False))
    space, measured = _space(model, model.example(8)), Measured(tmp_path / "s.json")
    measure(space, measured, _cross_entropy(model), probes=4)
    for tensor in space.tensors:
        at = {bits: measured.tensors[tensor]["bits"][str(bits)] for bits in space.widths(tensor)}
        widths = sorted(at)
        for few, many in itertools.pairwise(widths):
            gain = at[many]["sqnr_db"] - at[few]["sqnr_db"]
            assert 3.5 * (many - few) < gain < 9 * (many - few), "about 6 dB a bit, in small tensors more or less"
            for by in ("loss", "hessian", "sqnr"):
                assert measured.harm(tensor, few, by) >= measured.harm(tensor, many, by) >= 0


def test_one_grid_at_a_time_and_the_model_stays_as_it_is(tmp_path):
    torch.manual_seed(0)
    model = Drawn(Shape())
    before = copy.deepcopy(model.state_dict())
    space, measured = _space(model, model.example(8)), Measured(tmp_path / "s.json")
    losses = _cross_entropy(model)
    measure(space, measured, losses, probes=0)
    assert type(model.stem) is nn.Conv2d and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    by_hand = copy.deepcopy(model)
    from qat.insert import apply_plan, named_quantizers

    apply_plan(by_hand, space.plans[2])
    for name in ("stem", "head"):  # the first to be measured, and one behind others
        weight = model.get_parameter(f"{name}.weight").detach()
        quantizer = dict(named_quantizers(by_hand))[f"{name}.weight_quantizer"]
        quantizer.calibrate(weight)
        rounded = copy.deepcopy(model)
        rounded.get_parameter(f"{name}.weight").data = quantizer(weight).detach()
        pairs = zip(losses(rounded), losses(model), strict=True)
        expected = sum(noisy.item() - exact.item() for (noisy, _), (exact, _) in pairs) / 2
        assert measured.tensors[f"{name}.weight"]["bits"]["2"]["loss_increase"] == pytest.approx(expected, abs=1e-6)


def test_a_mean_loss_is_that_of_all_samples():
    assert mean_loss(nn.Identity(), lambda _: iter([(torch.tensor(1.0), 3), (torch.tensor(5.0), 1)])) == 2


def test_what_was_measured_before_a_kill_is_not_measured_again(tmp_path):
    torch.manual_seed(0)
    model, path = Drawn(Shape()), tmp_path / "s.json"
    space, losses = _space(model, model.example(8)), _cross_entropy(model)
    whole = Measured(tmp_path / "whole.json")
    measure(space, whole, losses, probes=1)

    class KilledError(Exception):
        pass

    done = []

    def die():
        done.append(1)
        if len(done) == 5:
            raise KilledError

    measured = Measured(path)
    measured.save = lambda now=True: Measured.save(measured, now=True)  # a real kill loses up to two seconds
    with pytest.raises(KilledError):
        measure(space, measured, losses, probes=1, step=die)
    resumed, left = Measured(path), []
    total = missing(space, Measured(tmp_path / "none.json"), 1)
    assert missing(space, resumed, 1) == total - 5
    measure(space, resumed, losses, probes=1, step=lambda: left.append(1))
    assert len(left) == total - 5 and resumed.tensors == whole.tensors
    assert missing(space, Measured(path), 1) == 0


def test_new_widths_add_to_what_is_known(tmp_path):
    torch.manual_seed(0)
    model, path = Drawn(Shape()), tmp_path / "s.json"
    losses, x = _cross_entropy(model), model.example(8)
    measure(_space(model, x, weight_bits=[4], act_bits=[8]), Measured(path), losses, probes=0)
    wider, steps = _space(model, x, weight_bits=[2, 4], act_bits=[8]), []
    measure(wider, Measured(path), losses, probes=0, step=lambda: steps.append(1))
    assert len(steps) == 3, "the three weights at two bits"


def test_another_number_of_probes_estimates_the_traces_anew(tmp_path):
    torch.manual_seed(0)
    model, found = Drawn(Shape()), {}
    space, losses = _space(model, model.example(8), weight_bits=[4], act_bits=[8]), _cross_entropy(model)
    for name, probes in (("both", 1), ("both", 8), ("alone", 8), ("both", 0)):
        measured = Measured(tmp_path / f"{name}.json")
        assert (missing(space, measured, probes) > 0) == (probes > 0)
        measure(space, measured, losses, probes)
        assert missing(space, measured, probes) == 0
        found[name, probes] = {t: entry["trace"] for t, entry in measured.tensors.items()}
    assert found["both", 1] != found["both", 8] == found["alone", 8] == found["both", 0]


def test_layers_that_read_one_tensor_share_a_grid_and_layers_of_one_weight_share_its_bits():
    model = Drawn(Shape(kind="strided"))
    space = _space(model, model.example(2))
    layers = {layer.name: layer for layer in space.layers}
    assert layers["body"].act == layers["down"].act and layers["body"].weight != layers["down"].weight
    assert space.tensors[layers["body"].act or ""] == ["body", "down"]


def test_a_grid_harms_once_however_many_layers_have_it():
    grids = {"first": ("w", "x"), "same-weight": ("w", "x"), "same-input": ("v", "x")}
    layers = [Layer(name, weight, act, ((4, 8),)) for name, (weight, act) in grids.items()]
    harms = make_harms(SimpleNamespace(layers=layers), lambda *of: {("w", 4): 1.0, ("v", 4): 2.0, ("x", 8): 4.0}[of])
    assert list(harms.values()) == [5, 0, 2]


def test_codes_of_a_tied_weight_are_in_an_exported_file_once():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    table = make_costs(_space(model, torch.randn(2, 8)), Files(size={2: 1000}))["size"].table
    assert [table[name, (4, 8)] for name in ("0", "2")] == [32, 0]


def test_no_allocation_of_one_width_is_predicted_smaller_than_the_file_that_was_made_of_it():
    model = Drawn(Shape())
    space, sizes = _space(model, model.example(2)), {2: 10_000, 8: 10_001}
    cost = make_costs(space, Files(packed=sizes))["packed"]
    widths = {width: {layer.name: (width, 8) for layer in space.layers} for width in sizes}
    assert min(cost.total(widths[width]) - size for width, size in sizes.items()) == 0


def test_costs_of_an_encoder_are_those_that_its_audit_shows():
    model, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.randn(2, 5, 8)
    space = _space(model, x)
    pairs = {layer.name: layer.options[i] for i, layer in enumerate(space.layers)}
    assert set(pairs) == {"self_attn.out_proj", "linear1", "linear2"}
    weights, acts = ({name: pair[i] for name, pair in pairs.items()} for i in (0, 1))
    rows = audit(model, *make_plan(model, with_bits(POLICY, weights, acts), lambda: model(x)))
    costs, sized = make_costs(space, Files()), [row for row in rows if row.weight_bits]
    assert costs["bops"].total(pairs) == bops(rows)
    average = sum(row.weight_bits * row.params for row in sized) / sum(row.params for row in sized)
    assert costs["avg_bits"].total(pairs) == pytest.approx(average)


def test_a_loss_that_is_not_finite_is_no_ground_to_stand_on(tmp_path):
    model, x = Quadratic(), torch.full((4, 6), 1e30)
    space = make_space(model.eval(), POLICY, Search([4], [8]), lambda: model(torch.ones(4, 6)))
    with pytest.raises(UserError, match="the float model's loss is inf"):
        measure(space, Measured(tmp_path / "s.json"), _squared(x, torch.zeros(4, 3)), probes=0)


def test_a_damaged_cache_says_so(tmp_path):
    (tmp_path / "s.json").write_text('{"loss"')
    with pytest.raises(UserError, match=r"s\.json: is damaged: no JSON; delete it"):
        Measured(tmp_path / "s.json")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"weight_bits": []}, "weight_bits: needs at least one width"),
        ({"weight_bits": [9]}, "weight_bits=9: widths go from 1 to 8"),
        ({"pairs": [[4]]}, r"pairs: \[4\] is no pair"),
        ({"samples": 0}, "samples=0: must be at least 1"),
        ({"points": 1}, "points=1: must be at least 2"),
        ({"by": "hessian", "probes": 0}, "by=hessian needs probes"),
        ({"budget": {"packt": 1}}, "'packt' is no cost; did you mean 'packed'"),
        ({"front": "acc"}, "'acc' is no cost; .*all: packed, size, avg_bits, bops, latency"),
        ({"least": {"stm": 8}}, "search.least: no layer matches 'stm'; did you mean 'stem'"),
        ({"tie": ["blocks.*"]}, r"search.tie: no layer matches 'blocks.\*'"),
        ({"least": {"stem": 6}, "weight_bits": [2, 4]}, "search.least: 'stem' gets at least 6 bits"),
    ],
)
def test_mistakes_in_the_settings_are_named(settings, said):
    model = Drawn(Shape())
    with pytest.raises(UserError, match=said):
        _space(model, model.example(2), **settings)


def test_a_policy_without_integer_weights_leaves_nothing_to_choose():
    model = Drawn(Shape()).eval()
    policy = QuantPolicy.from_dict({"weight": {"bits": None, "format": "e4m3"}, "act": {"bits": 8}})
    with pytest.raises(UserError, match="gives no weight an integer grid"):
        make_space(model, policy, Search([4], [8]), lambda: model(model.example(2)))


def test_weights_of_a_module_that_has_several_are_named_and_not_chosen():
    class Spotter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru, self.head = nn.GRU(4, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.gru(x)[0][:, -1])

    model, x = Spotter().eval(), torch.randn(2, 5, 4)
    space = make_space(model, POLICY, Search([4, 8], [8]), lambda: model(x))
    assert [layer.name for layer in space.layers] == ["head"] and space.parts == ["gru.ih_l0", "gru.hh_l0"]
    float_head = {**POLICY.settings, "rules": {"head": {"match": "head", "weight": "off", "act": "off"}}}
    with pytest.raises(UserError, match=r"no weight an integer grid but to gru.ih_l0, gru.hh_l0 \(modules of several"):
        make_space(model, QuantPolicy.from_dict(float_head), Search([4, 8], [8]), lambda: model(x))


def test_a_search_within_a_network_chooses_for_its_layers_alone(tmp_path):
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(6, 6)
            self.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

        def forward(self, x):
            return self.body(self.stem(x))

    model, x = Two().eval(), torch.randn(4, 6)
    search = Search([2, 4, 8], [4, 8], least={"@first": 8})
    space = make_space(model, NetworkPolicies({"body": POLICY}), search, lambda: model(x))
    options = {layer.name: {weight for weight, _ in layer.options} for layer in space.layers}
    assert options == {"body.0": {8}, "body.2": {2, 4, 8}}, "the first layer is the network's"
    assert {name: spec.bits for name, spec in space.plans[2].weights.items()} == {"body.0": 2, "body.2": 2}

    path = tmp_path / "mine.yaml"
    write(path, space.policy, {"body.0": (8, 8), "body.2": (2, 4)}, {}, {}, "qat search")
    content = yaml.safe_load(path.read_text())
    del content["predicted"]
    plan, _ = make_plan(model, policy_of(content), lambda: model(x))
    assert {name: spec.bits for name, spec in plan.weights.items()} == {"body.0": 8, "body.2": 2}
