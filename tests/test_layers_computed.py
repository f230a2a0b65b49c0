"""Weights that a parametrization computes, and layers that learn their shapes from the first batch."""

import copy

import pytest
import torch
from small_models import POLICY, both, quantized
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from qat.convert import convert
from qat.errors import UserError
from qat.export.packed import load_packed, save_packed
from qat.insert import apply_plan, remove
from qat.planning.plan import Plan
from qat.planning.planner import make_plan
from qat.policies.policy import QuantPolicy


def model(wrap) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(wrap(nn.Conv1d(4, 4, 3)), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten(), wrap(nn.Linear(12, 3)))


def batch() -> Tensor:
    return torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(1))


WRAPS = [
    pytest.param(parametrizations.weight_norm, id="weight-norm"),
    pytest.param(parametrizations.spectral_norm, id="spectral-norm"),
    pytest.param(lambda m: parametrizations.orthogonal(m) if isinstance(m, nn.Linear) else m, id="orthogonal"),
]


@pytest.mark.parametrize("wrap", WRAPS)
def test_the_computed_weight_is_quantized_and_conversion_keeps_the_result(wrap, tmp_path):
    net, x = model(wrap), batch()
    plan = quantized(net, x)
    assert set(plan.weights) == {"0", "4"} and plan.batch_norms == {"0": "1"}
    converted = convert(net, plan)
    with torch.no_grad():
        expected = net(x)
        torch.testing.assert_close(converted(x), expected, rtol=1e-5, atol=1e-5)
        codes = net[4].weight_quantizer.quantize(net[4].weight)
        assert torch.equal(converted[4].integer_weight.codes, codes)
        assert not list(converted.parameters()) and "parametrizations" not in converted[4]._modules
        save_packed(converted, plan, tmp_path)
        assert torch.equal(load_packed(model(wrap), tmp_path)(x), converted(x))
    assert parametrize.is_parametrized(net[4])  # the trained model is left as it is


@pytest.mark.parametrize("wrap", WRAPS)
def test_training_reaches_what_the_weight_is_computed_from(wrap):
    net, x = model(wrap), batch()
    quantized(net, x, {"weight": {"bits": 4, "quantizer": "lsq"}, "act": {"bits": 8, "quantizer": "lsq"}})
    net.train()(x).square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert all(p.grad.any() for p in net[4].parametrizations.parameters())


def test_evaluation_follows_the_weight_it_is_computed_from():
    net = model(parametrizations.weight_norm)
    quantized(net, batch())
    with torch.no_grad():
        for _ in range(20):  # memory of one computed weight may serve the next
            net[4].parametrizations.weight.original0.mul_(0.9)
            assert torch.equal(net[4].quantized_weight(), net[4].weight_quantizer(net[4].weight))
            assert "weight" not in net[4].__dict__.get("_kept", {})  # an address would say that nothing changed


@pytest.mark.parametrize("wrap", WRAPS)
def test_removal_gives_the_parametrized_layer_back(wrap):
    net, x = model(wrap).eval(), batch()
    keys, classes, expected = list(net.state_dict()), [type(m) for m in net.modules()], net(x)
    quantized(net, x)
    assert [k for k in net.state_dict() if "quantizer" not in k] == keys
    twin = copy.deepcopy(net)
    assert torch.equal(twin(x), net(x))
    remove(net)
    assert [type(m) for m in net.modules()] == classes and list(net.state_dict()) == keys
    assert torch.equal(net(x), expected)


# -- lazy layers -------------------------------------------------------------------------------------------------------


def lazy() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.LazyConv1d(4, 3), nn.LazyBatchNorm1d(), nn.Flatten(), nn.LazyLinear(3))


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_lazy_layers_take_their_shapes_from_the_probe_pass():
    net, x = lazy(), batch()
    plan, _ = make_plan(net, QuantPolicy.from_dict(POLICY), lambda: net(x))
    assert [type(m) for m in net] == [nn.Conv1d, nn.BatchNorm1d, nn.Flatten, nn.Linear]
    assert set(plan.weights) == {"0", "3"} and plan.batch_norms == {"0": "1"}
    fake, converted = both(lazy(), x)
    with torch.no_grad():
        torch.testing.assert_close(converted(x), fake(x), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_plan_for_lazy_layers_that_saw_no_batch_says_what_to_do():
    net, x = lazy(), batch()
    plan, _ = make_plan(net, QuantPolicy.from_dict(POLICY), lambda: net(x))
    with pytest.raises(UserError, match=r"'0' \(LazyConv1d\) does not know its shape yet.*run the model once"):
        apply_plan(lazy(), Plan.from_dict(plan.to_dict()))


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_lazy_layer_that_the_probe_does_not_reach_is_named():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(5, 5), nn.LazyLinear(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    net, x = Net(), batch()
    with pytest.raises(UserError, match=r"'unused' \(LazyLinear\) does not know its shape"):
        make_plan(net, QuantPolicy.from_dict(POLICY), lambda: net(x))
