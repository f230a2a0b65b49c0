"""Twins behave as the layers they were: they copy, pickle, compile, export, keep hooks and classes; and evaluation
computes what conversion will.
"""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qat
from qat.convert import convert
from qat.insert import named_quantizers, remove
from qat.layers import QuantizedLayer, become_twin, drop_mixins, original_class
from qat.layers.modules import QuantLinear
from qat.models.resnet import BasicBlock

POLICY = {"weight": {"bits": 4, "granularity": "channel"}, "act": {"bits": 4}, "sites": {"bits": 8}}


class MyLinear(nn.Linear):
    """A subclass without a forward of its own."""

    def describe(self) -> str:
        return f"mine, {self.in_features} wide"


class Residual(nn.Sequential):
    """A Sequential with a residual around it."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) + x


class Net(nn.Module):
    """Sites, nested owners, a cascade (8-bit sums, 4-bit convolutions), a subclass, a Sequential with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.block = BasicBlock(8, 16, stride=2)
        self.res = Residual(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(inplace=True))
        self.pool = nn.AvgPool2d(2)
        self.head = MyLinear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)), inplace=True)
        x = self.pool(self.res(self.block(x)))
        return self.head(x.mean((2, 3)))


def float_net() -> Net:
    torch.manual_seed(0)
    net = Net()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)  # negative gammas too
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return net


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def net(x: Tensor) -> Net:
    return quantized(float_net(), x)


def quantized(model, x: Tensor, **policy):
    model.plan = qat.quantize(model, {**POLICY, **policy}, x)
    return model.eval()


def through_pickle(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = [pytest.param(copy.deepcopy, id="deepcopy"), pytest.param(through_pickle, id="pickle")]
MODES = [pytest.param(True, id="training"), pytest.param(False, id="evaluation")]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("copied", COPIES)
def test_a_copy_computes_the_same_and_shares_nothing(copied, mode, net, x):
    other = copied(net)
    assert [type(m) for m in other.modules()] == [type(m) for m in net.modules()]
    assert torch.equal(other.train(mode)(x), net.train(mode)(x))
    mine = {id(t) for t in (*net.parameters(), *net.buffers())} | {id(m) for m in net.modules()}
    assert not mine & {id(t) for t in (*other.parameters(), *other.buffers(), *other.modules())}
    norm = other.bn
    assert norm.host[0] is other.stem


@pytest.mark.parametrize("copied", COPIES)
def test_a_copy_can_be_taken_apart_again(copied, net, x):
    other = copied(net)
    remove(other)
    assert torch.equal(other(x), float_net().eval()(x))


def test_a_copy_keeps_shared_quantizers_shared(net):
    other = copy.deepcopy(net)
    assert [n for n, _ in named_quantizers(other)] == [n for n, _ in named_quantizers(net)]
    assert other.block.add_0.input_quantizer_1 is other.block.conv1.input_quantizer[0]


def gradients(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mode", MODES)
def test_compiled_in_one_graph_it_computes_the_same(mode, net, x):
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(net).train(mode), fullgraph=True, backend="eager")
    net.train(mode)
    for batch in (x, x.flip(0)):
        expected = net(batch)
        assert torch.equal(compiled(batch), expected)
        expected.sum().backward()
        compiled(batch).sum().backward()
    expected, own = gradients(net), gradients(compiled._orig_mod)
    assert expected and own.keys() == expected.keys()
    if not mode:  # in training the second call of `compiled` has moved the statistics
        assert all(torch.equal(own[name], g) for name, g in expected.items())


def test_compiled_evaluation_without_gradients_follows_the_weights(net, x):
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    with torch.no_grad():
        before = compiled(x)
        net.head.weight.mul_(2)
        assert torch.equal(compiled(x), net(x))
        assert not torch.equal(compiled(x), before)


def test_exported_with_torch_export_it_computes_the_same(net, x):
    program = torch.export.export(net, (x,), strict=False)
    assert torch.equal(program.module()(x), net(x))


def test_subclasses_keep_their_class_and_methods(net):
    assert isinstance(net.head, MyLinear) and isinstance(net.head, QuantLinear)
    assert net.head.describe() == "mine, 16 wide"
    assert original_class(net.head) is MyLinear
    assert type(through_pickle(net).head) is type(net.head)


def test_hooks_and_attributes_of_the_user_survive(x):
    net, calls = float_net(), []
    net.head.label = "classes"
    net.head.weight.requires_grad_(False)
    net.head.register_forward_hook(lambda module, args, output: calls.append("hook"))
    net.stem.register_forward_pre_hook(lambda module, args: calls.append("pre"))
    quantized(net, x)
    calls.clear()
    net(x)
    assert calls == ["pre", "hook"]
    assert net.head.label == "classes" and not net.head.weight.requires_grad
    remove(net)
    calls.clear()
    net(x)
    assert calls == ["pre", "hook"] and net.head.label == "classes"


def test_a_site_is_no_step_of_the_sequence(net):
    assert len(net.res) == 2 and [type(m) for m in net.res][1] is nn.ReLU
    assert net.res[-1] is net.res[1] and isinstance(net.res[-1], nn.ReLU)
    assert type(net.res[:1]) is Residual and len(net.res[:1]) == 1
    assert "res.add_0.input_quantizer_0.scale" in net.state_dict()


def test_mixins_stack_and_come_off_one_by_one():
    class First(QuantizedLayer):
        pass

    class Second(QuantizedLayer):
        pass

    layer = nn.Linear(2, 2)
    become_twin(layer, First)
    become_twin(layer, Second)
    become_twin(layer, First)
    assert type(layer).__mro__[1] is Second and isinstance(layer, First)
    drop_mixins(layer, Second)
    assert isinstance(layer, First) and not isinstance(layer, Second)
    drop_mixins(layer, QuantizedLayer)
    assert type(layer) is nn.Linear


# -- weights are quantized once per change -----------------------------------------------------------------------------


def test_without_gradients_a_weight_is_quantized_once(net, x, monkeypatch):
    calls = []
    forward = type(net.head.weight_quantizer).forward
    monkeypatch.setattr(
        type(net.head.weight_quantizer), "forward", lambda self, w: calls.append(self) or forward(self, w)
    )
    weights = sum(q.is_weight for _, q in named_quantizers(net))
    for expected in (weights, 0):
        calls.clear()
        with torch.no_grad():
            net(x)
        assert len([q for q in calls if q.is_weight]) == expected


CHANGES = [
    pytest.param(lambda net: net.head.weight.mul_(2), id="weight-in-place"),
    pytest.param(lambda net: net.head.weight_quantizer.scale.mul_(2), id="scale-in-place"),
    pytest.param(lambda net: net.head.weight_quantizer.enable(False), id="quantizer-off"),
    pytest.param(lambda net: setattr(net.head, "weight", nn.Parameter(net.head.weight * 2)), id="another-parameter"),
    pytest.param(
        lambda net: net.load_state_dict({k: v * 2 for k, v in net.state_dict().items()}), id="load-state-dict"
    ),
    pytest.param(lambda net: (net.train(), net.head.weight.data.mul_(2), net.eval()), id="data-swapped-by-an-average"),
]


@pytest.mark.parametrize("change", CHANGES)
def test_the_quantized_weight_follows_every_change(change, net):
    with torch.no_grad():
        before = net.head.quantized_weight().clone()
        change(net)
        after = net.head.quantized_weight()
        assert torch.equal(after, net.head.weight_quantizer(net.head.weight))
        assert not torch.equal(after, before)


@torch.no_grad()
def test_the_quantized_weight_follows_the_zero_of_its_grid():
    model, x = nn.Sequential(nn.Linear(8, 4)), torch.randn(4, 8)
    affine = {"bits": 4, "signed": False, "symmetric": False, "quantizer": "fixed"}
    qat.quantize(model, {**POLICY, "weight": affine, "rules": {}}, x)
    layer = model.eval()[0]
    layer.quantized_weight()
    layer.weight_quantizer.zero_point.add_(3)
    assert torch.equal(layer.quantized_weight(), layer.weight_quantizer(layer.weight))


@torch.no_grad()
def test_another_tensor_at_the_same_address_is_another_weight():
    x = torch.randn(4, 64)
    model = nn.Sequential(nn.Linear(64, 64))
    quantized(model, x, rules={})
    for name in ("weight", "weight_quantizer.scale"):
        plain = model[0].get_parameter(name)
        for i in range(20):
            replaced = {f"0.{name}": plain * (1 + i / 4)}
            y = torch.func.functional_call(model, replaced, (x,))
            fresh = copy.deepcopy(model)
            fresh[0].get_parameter(name).copy_(replaced.pop(f"0.{name}"))
            assert torch.equal(y, fresh(x))


# -- evaluation is what conversion will be -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy",
    [
        pytest.param({}, id="per-channel"),
        pytest.param({"weight": {"bits": 8}}, id="per-tensor"),
        pytest.param({"weight": {"bits": 4, "symmetric": False, "granularity": "channel"}}, id="affine-weights"),
        pytest.param({"act": {"bits": 8, "symmetric": False}}, id="affine-activations"),
        pytest.param({"sites": False}, id="float-residuals"),
        pytest.param({"act": False, "sites": False}, id="weights-only"),
        pytest.param({"rules": {"r": {"match": "@first", "weight": False, "act": False}}}, id="float-stem"),
    ],
)
def test_the_quantized_model_evaluates_as_the_converted_one(policy, x):
    net = quantized(float_net(), x, **policy)
    with torch.no_grad():
        expected, converted = net(x), convert(net, net.plan)(x)
    assert (converted - expected).abs().max() <= 1e-5 * expected.abs().max()


def layers_with_batch_norm() -> list:
    conv = lambda bias: nn.Conv2d(3, 8, 3, bias=bias)  # noqa: E731
    return [
        pytest.param(lambda: nn.Sequential(conv(False), nn.BatchNorm2d(8)), (4, 3, 8, 8), id="conv"),
        pytest.param(lambda: nn.Sequential(conv(True), nn.BatchNorm2d(8)), (4, 3, 8, 8), id="conv-with-bias"),
        pytest.param(
            lambda: nn.Sequential(conv(True), nn.BatchNorm2d(8, affine=False)), (4, 3, 8, 8), id="norm-without-affine"
        ),
        pytest.param(lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)), (4, 8), id="linear"),
        pytest.param(lambda: nn.Sequential(nn.Conv1d(8, 8, 3), nn.BatchNorm1d(8)), (4, 8, 8), id="conv1d"),
        pytest.param(lambda: nn.Sequential(nn.Linear(8, 8)), (4, 8), id="no-norm"),
    ]


@pytest.mark.parametrize(("make", "shape"), layers_with_batch_norm())
def test_biases_are_whole_steps_of_the_accumulator_as_converted(make, shape):
    torch.manual_seed(0)
    x, model = torch.randn(shape), make()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.weight is not None:
                module.weight.data.normal_()
                module.weight.data[0] = 0  # a constant channel
                module.bias.data.normal_()
    quantized(model, x)
    with torch.no_grad():
        expected, converted = model(x), convert(model, model.plan)
        assert (converted(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert converted[0].integer_bias is not None
        assert not torch.equal(model.train()(x), expected)  # training keeps the float bias and its own statistics


def test_training_normalizes_with_batch_statistics_and_moves_them(net, x):
    before = net.bn.running_mean.clone()
    net.train()(x)
    assert not torch.equal(net.bn.running_mean, before)
    assert all(p.grad is None for p in net.parameters())
    net(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
