"""Readers of one tensor share what its quantizer made of it."""

import copy
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from small_models import both, quantized
from torch import Tensor, nn

from qat.insert import named_quantizers
from qat.layers import shared
from qat.quantizers import Quantizer

MINMAX = {role: {"bits": 8, "quantizer": "minmax", "symmetric": role == "weight"} for role in ("weight", "act")}
LSQ = {role: {"bits": 8} for role in ("weight", "act")}


class Residual(nn.Module):
    """Its input is read by a layer and by the addition, its rectified sum by nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.layer(x) + x)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), Residual(), Residual())


def shared_grid(model: nn.Module) -> Quantizer:
    return dict(named_quantizers(model))["1.layer.input_quantizer"]


def test_a_tensor_with_two_readers_is_rounded_once_in_training_and_for_each_in_evaluation(model):
    x, seen = torch.randn(16, 8), []
    quantized(model, x, LSQ)
    assert model[1].add_0.input_quantizer_1 is shared_grid(model)
    shared_grid(model).register_forward_hook(lambda *_: seen.append(1))
    model.train()(x)
    assert len(seen) == 1
    model.eval()(x)
    assert len(seen) == 3


def test_gradients_are_those_of_rounding_for_each_reader(model, monkeypatch):
    x, gradients = torch.randn(16, 8), []
    quantized(model, x, LSQ)
    for together in (True, False):
        if not together:
            monkeypatch.setattr("qat.layers.base.read", lambda quantizer, x: quantizer(x))
            monkeypatch.setattr("qat.layers.site.read", lambda quantizer, x: quantizer(x))
        model.zero_grad()
        model.train()(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # sums in another order


def test_a_range_that_follows_the_data_moves_once_for_each_tensor(model):
    x = torch.randn(16, 8)
    quantized(model, x, MINMAX)
    grid, seen = shared_grid(model), []
    grid.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    before = grid.running_high.clone()
    model.train()(10 * x)
    (read,) = seen
    torch.testing.assert_close(grid.running_high, torch.lerp(before, read.max(), grid.momentum))


def test_a_range_that_follows_the_data_moves_as_often_where_a_compiler_rounds_for_each_reader(model):
    x = torch.randn(16, 8)
    quantized(model, x, MINMAX)
    again = copy.deepcopy(model).train()
    model.train()(10 * x)
    torch.compile(again, backend="eager")(10 * x)
    torch.testing.assert_close(shared_grid(again).running_high, shared_grid(model).running_high)


def test_a_tensor_that_is_written_to_between_two_readers_is_rounded_again():
    class Writes(Residual):
        def forward(self, x: Tensor) -> Tensor:
            x = x * 1.0
            with torch.no_grad():
                y = self.layer(x)
                x.mul_(2.0)
            return y + x

    torch.manual_seed(0)
    model, x = Writes(), torch.randn(16, 8)
    quantized(model, x, LSQ)
    for quantizer in [q for _, q in named_quantizers(model) if not q.is_weight]:
        quantizer.readers = 2  # as if one grid had both readers
    assert torch.equal(model.train()(x), model.eval()(x))


def test_nothing_is_kept_after_a_forward_that_failed(model):
    x = torch.randn(16, 8)
    quantized(model, x, LSQ)
    model[1].layer.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.train()(x)
    assert not shared.here.forwards


def test_a_tensor_of_inference_mode_is_rounded_for_each_reader(model):
    x = torch.randn(16, 8)
    quantized(model, x, LSQ)
    expected = model.train()(x)
    with torch.inference_mode():
        assert torch.equal(model(x), expected)


def test_a_converted_model_reads_its_grids_as_often_as_before(model):
    x = torch.randn(16, 8)
    fake, converted = both(model, x, LSQ | {"sites": {"bits": 8}})
    torch.testing.assert_close(converted(x), fake(x), rtol=1e-5, atol=1e-6)


@pytest.fixture
def hasty():
    """Threads take turns every few bytecodes."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("one", [True, False], ids=["one-model", "a-model-each"])
def test_threads_get_what_each_would_alone(one, training):
    torch.manual_seed(0)
    x, found = [torch.randn(16, 8), 10 * torch.randn(16, 8)], [[], []]
    models = [nn.Sequential(nn.Linear(8, 8), Residual(), Residual()) for _ in x]
    for model, of in zip(models, x, strict=True):
        quantized(model, of, LSQ)
        model.train(training)
    models = [models[0]] * 2 if one else models
    alone = [model(of).detach() for model, of in zip(models, x, strict=True)]

    def run(i: int) -> None:
        try:
            for _ in range(100):
                found[i].append(torch.equal(models[i](x[i]), alone[i]))
        except Exception as error:
            found[i].append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[True] * 100] * 2


def test_threads_that_are_within_a_forward_at_once_share_nothing():
    torch.manual_seed(0)
    meeting, depths = threading.Barrier(2, timeout=60), []
    models, x = [nn.Sequential(Residual()) for _ in range(2)], torch.randn(16, 8)
    for model in models:
        quantized(model, x, LSQ)

    def meet(*_: object) -> None:
        meeting.wait()
        depths.append(len(shared.here.forwards))
        meeting.wait()

    for model in models:
        model[0].layer.register_forward_hook(meet)
    threads = [threading.Thread(target=model.train(), args=(x,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert depths == [1, 1]
