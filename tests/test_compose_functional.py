"""`torch.func` on quantized models: calls with other tensors compute with them; transforms are refused in words."""

import pytest
import torch
from small_models import quantized
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, vmap

from qat.errors import UserError
from qat.insert import named_quantizers
from qat.layers import shared


@torch.no_grad()
def _tangent(model: nn.Module, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


class Residual(nn.Module):
    """Has a site, whose grid is the layer's, too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x


@pytest.fixture(params=[True, False], ids=["training", "evaluation"])
def model(request) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), Residual())
    quantized(model, torch.randn(4, 8), {role: {"bits": 4} for role in ("weight", "act")})
    return model.train(request.param)


def test_a_call_with_other_tensors_computes_with_them_and_gives_the_model_back(model):
    x = torch.randn(4, 8)
    own = dict(model.named_parameters(remove_duplicate=False))
    assert len(own) > len(dict(model.named_parameters()))  # a quantizer has two names
    with torch.no_grad():
        before = model(x)
        other = functional_call(model, {n: p * 1.5 for n, p in model.named_parameters()}, (x,), tie_weights=False)
        assert all(p is own[n] for n, p in model.named_parameters(remove_duplicate=False))
        assert torch.equal(model(x), before)
        for parameter in model.parameters():
            parameter.mul_(1.5)
        assert torch.equal(model(x), other) and not torch.equal(other, before)


@pytest.mark.parametrize(
    "transform",
    [
        pytest.param(lambda model, x: vmap(model)(x), id="vmap"),
        pytest.param(lambda model, x: grad(lambda x: model(x).sum())(x), id="grad"),
        pytest.param(lambda model, x: _tangent(model, x), id="forward-mode"),
    ],
)
def test_a_transform_is_refused_in_words_and_leaves_the_model_usable(model, transform):
    x = torch.randn(4, 8)
    before = model(x)
    with pytest.raises(UserError, match=r"torch\.func transforms .* switch the quantizers off"):
        transform(model, x)
    assert torch.equal(model(x), before) and not shared.here.forwards
    for _, quantizer in named_quantizers(model):
        quantizer.enable(False)
    transform(model, x)  # as the message says
