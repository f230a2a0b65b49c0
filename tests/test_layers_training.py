"""Training of the layers beyond convolutions and linear ones: biases learn, in float until conversion has made codes of
them, and those stay codes in whatever mode the model is put.
"""

import pytest
import torch
from small_models import POLICY, both, quantized
from torch import Tensor, nn

FINE = {"weight": {"bits": 16, "granularity": "channel"}, "act": {"bits": 16}}


class Net(nn.Module):
    """A layer with biases on its input, as often as it takes inputs; a tensor comes out."""

    def __init__(self, layer: nn.Module, inputs: int = 1) -> None:
        super().__init__()
        self.layer, self.inputs = layer, inputs
        for bias in biases(self).values():
            nn.init.normal_(bias, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(*[x] * self.inputs)
        return y[0] if isinstance(y, tuple) else y


LAYERS = [
    pytest.param(lambda: Net(nn.Conv3d(2, 4, 2)), (3, 2, 4, 4, 4), id="conv3d"),
    pytest.param(lambda: Net(nn.ConvTranspose1d(4, 6, 3)), (3, 4, 7), id="transposed1d"),
    pytest.param(lambda: Net(nn.ConvTranspose2d(4, 6, 2, groups=2)), (3, 4, 5, 5), id="transposed2d-grouped"),
    pytest.param(lambda: Net(nn.ConvTranspose3d(2, 4, 2)), (3, 2, 3, 3, 3), id="transposed3d"),
    pytest.param(lambda: Net(nn.Bilinear(6, 6, 5), 2), (4, 6), id="bilinear"),
    pytest.param(lambda: Net(nn.LSTM(6, 8)), (5, 4, 6), id="lstm"),
    pytest.param(lambda: Net(nn.GRU(6, 8)), (5, 4, 6), id="gru"),
    pytest.param(lambda: Net(nn.MultiheadAttention(8, 2, batch_first=True), 3), (4, 5, 8), id="attention"),
]


def biases(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if "bias" in name}


@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_the_gradient_of_a_bias_is_that_of_the_float_layer(make, shape):
    torch.manual_seed(0)
    model, x = make().train(), torch.randn(shape)
    model(x).square().sum().backward()
    expected = {name: bias.grad.clone() for name, bias in biases(model).items() if bias.grad is not None}
    model.zero_grad()
    quantized(model, 3 * x, FINE)  # ranges with room: what is clipped has no gradient
    model.train()
    model(x).square().sum().backward()
    assert expected
    for name, bias in biases(model).items():
        assert expected[name].abs().max() > 0
        torch.testing.assert_close(bias.grad, expected[name], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_training_adds_the_float_bias_and_evaluation_the_rounded_one(make, shape):
    torch.manual_seed(0)
    model, x = make(), torch.randn(shape)
    quantized(model, x, {"weight": {"bits": 2}, "act": {"bits": 2}})
    with torch.no_grad():
        evaluated, trained = model.eval()(x), model.train()(x)
    rounds = not isinstance(model.layer, nn.Bilinear)  # which has no accumulator of one scale
    assert torch.equal(evaluated, trained) != rounds


@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_a_converted_layer_keeps_its_integer_bias_in_training_mode(make, shape):
    torch.manual_seed(0)
    model, x = make(), torch.randn(shape)
    _, converted = both(model, x, POLICY)
    with torch.no_grad():
        expected = converted(x)
        assert torch.equal(converted.train()(x), expected)


class Mixed(nn.Module):
    """A layer of several matrices beside functional products of the module around it."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.rnn = nn.MultiheadAttention(8, 2, batch_first=True), nn.GRU(8, 8, batch_first=True)
        self.up = nn.ConvTranspose1d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.attn(x, x, x)[0]
        y = y @ y.mT @ self.rnn(y)[0]
        return y + self.up(y.mT).mT


def test_products_inside_of_layers_are_no_sites_of_the_module_around():
    torch.manual_seed(0)
    model, x = Mixed(), torch.randn(3, 5, 8)
    plan = quantized(model, x, FINE)
    assert plan.owners == {"": ["add", "matmul", "matmul", "add"]}
    assert {"add_0", "add_1", "matmul_0", "matmul_1", "attn.matmul_0", "attn.matmul_1"} == set(plan.sites)
    fake, converted = both(Mixed(), x)
    with torch.no_grad():
        torch.testing.assert_close(converted(x), fake(x), rtol=0, atol=1e-3)
    fake.train()(x).sum().backward()
    assert all(p.grad is not None for p in fake.parameters())
