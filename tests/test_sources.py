"""A training step keeps no fake-quantized copy: backward makes them again."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import qat
from qat.insert import named_quantizers
from qat.kernels import dispatch


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch):
    monkeypatch.setattr(dispatch, "SMALL", 0)
    monkeypatch.setattr("qat.kernels.gradient.SAVED", 0)


def quantized(model: nn.Module, x: torch.Tensor) -> nn.Module:
    qat.quantize(model, {"weight": {"bits": 4, "granularity": "channel"}, "act": {"bits": 4}}, x)
    return model.train()


class First(nn.Module):
    """What a layer of several inputs or outputs makes of one tensor, first."""

    def __init__(self, layer: nn.Module, inputs: int = 1) -> None:
        super().__init__()
        self.layer, self.inputs = layer, inputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(*[x] * self.inputs)
        return y[0] if isinstance(y, tuple) else y


MODELS = {
    "linear": (lambda: nn.Linear(6, 5), (4, 6)),
    "linear of sequences": (lambda: nn.Linear(6, 5), (4, 3, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1, groups=2), (3, 4, 9)),
    "conv2d, circular": (lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), (3, 2, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2, groups=2), (3, 2, 4, 4, 4)),
    "conv_transpose2d, grouped": (lambda: nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), (3, 4, 5, 5)),
    "bilinear": (lambda: First(nn.Bilinear(6, 6, 5), 2), (4, 3, 6)),
    "attention": (lambda: First(nn.MultiheadAttention(8, 2, batch_first=True), 3), (2, 5, 8)),
    "lstm": (lambda: First(nn.LSTM(6, 8)), (5, 2, 6)),
    "gru": (lambda: First(nn.GRU(6, 8, bidirectional=True)), (5, 2, 6)),
    "two convs": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3)), (2, 2, 8, 8)),
}
each_model = pytest.mark.parametrize(("make", "shape"), [pytest.param(*v, id=k) for k, v in MODELS.items()])


def gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    model(leaf).square().sum().backward()
    assert leaf.grad is not None
    return [leaf.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@each_model
def test_gradients_are_those_of_saved_copies_to_the_bit(make, shape, monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(shape)
    model = quantized(make(), x)
    found = gradients(model, x)
    monkeypatch.setattr("qat.kernels.gradient.SAVED", 10**9)
    for a, b in zip(found, gradients(model, x), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("of", ["input", "weight"])
def test_what_a_hook_writes_into_is_not_made_again(of, monkeypatch):
    x = torch.randn(4, 16)
    model = quantized(nn.Linear(16, 8), x)
    getattr(model, f"{of}_quantizer").register_forward_hook(lambda m, args, y: y.mul_(2))
    found = gradients(model, x)
    monkeypatch.setattr("qat.kernels.gradient.SAVED", 10**9)
    for a, b in zip(found, gradients(model, x), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("strict", [True, False])
def test_training_graphs_with_large_tensors_are_exported(strict):
    x = torch.randn(4, 16)
    model = quantized(nn.Linear(16, 8), x)
    torch.testing.assert_close(torch.export.export(model, (x,), strict=strict).module()(x), model(x))


def test_what_was_quantized_outside_of_a_compiled_layer_goes_into_its_graph():
    x = torch.randn(4, 16)
    model, other = quantized(nn.Linear(16, 16), x), quantized(nn.Linear(16, 8), x)
    y, other.input_quantizer = model.input_quantizer(x), None
    assert hasattr(y, "made")
    torch.testing.assert_close(torch.compile(other, fullgraph=True, backend="eager")(y), other(y))


def test_no_copy_outlives_the_forward_pass():
    x = torch.randn(8, 16)
    model = quantized(nn.Linear(16, 16), x)
    seen = []
    for _, quantizer in named_quantizers(model):
        quantizer.register_forward_hook(lambda m, args, y: seen.append(weakref.ref(y.untyped_storage())))
    loss = model(x).sum()
    gc.collect()
    assert len(seen) == 2 and all(storage() is None for storage in seen)
    loss.backward()


def test_activations_die_with_the_step_not_with_the_next_garbage_collection():
    x = torch.randn(2, 2, 8, 8)
    model = quantized(nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3)), x)
    seen = []
    model[1].register_forward_hook(lambda m, args, y: seen.append(weakref.ref(y)))
    gc.collect()
    gc.disable()
    try:
        model(x).sum().backward()
        assert seen[0]() is None
    finally:
        gc.enable()


def test_second_derivatives_pass_through_what_is_made_again(monkeypatch):
    x = torch.randn(4, 6, dtype=torch.float32)
    model = quantized(nn.Linear(6, 5), x)
    results = []
    for small in (0, 10**9):
        monkeypatch.setattr(dispatch, "SMALL", small)
        monkeypatch.setattr("qat.kernels.gradient.SAVED", small)
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(model(leaf).square().sum(), leaf, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), [leaf, model.weight]))
    for a, b in zip(*results, strict=True):
        assert a.abs().sum() > 0
        assert torch.equal(a, b)


def test_a_float_weight_that_is_changed_in_place_before_backward_is_an_error():
    x = torch.randn(4, 6)
    model = quantized(nn.Linear(6, 5), x)
    model.weight_quantizer.enable(False)
    y = model(x.clone().requires_grad_())
    with torch.no_grad():
        model.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified"):
        y.sum().backward()


def test_an_input_that_is_changed_in_place_before_backward_is_an_error():
    x = torch.randn(4, 6)
    model = quantized(nn.Linear(6, 5), x)
    hidden = x.clone().requires_grad_() * 1
    y = model(hidden)
    with torch.no_grad():
        hidden.mul_(2)
    with pytest.raises(RuntimeError, match="modified"):
        y.sum().backward()


def test_hooks_that_are_there_already_see_every_saved_tensor():
    x = torch.randn(8, 16)
    model = quantized(nn.Linear(16, 16), x)
    shapes = []
    with saved_tensors_hooks(lambda t: shapes.append(t.shape) or t, lambda t: t):
        model(x.clone().requires_grad_())
    assert torch.Size((8, 16)) in shapes


@pytest.mark.parametrize("reentrant", [pytest.param(r, id=f"reentrant={r}") for r in (False, True)])
def test_checkpointed_layers_have_the_same_gradients(reentrant):
    x = torch.randn(2, 2, 8, 8)
    model = quantized(nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3)), x)
    expected = gradients(model, x)
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    checkpoint(model, leaf, use_reentrant=reentrant).square().sum().backward()
    found = [leaf.grad, *(p.grad for p in model.parameters() if p.grad is not None)]
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
