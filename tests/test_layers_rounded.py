"""In evaluation small tensors are rounded without a call of their quantizer: to the same bits, and only where nobody
looks.
"""

import pytest
import torch
from small_models import quantized
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils.prune import l1_unstructured

from qat.convert import convert
from qat.grid.spec import QuantSpec
from qat.insert import fold_again
from qat.layers import FoldingNorm, rounded
from qat.quantizers import create
from qat.quantizers.lsq import LSQ


def grid(x: Tensor, **spec) -> nn.Module:
    quantizer = create(QuantSpec(**{"range": "minmax", **spec}).resolved(nonnegative=False, weight=False))
    quantizer.calibrate(x[x.isfinite()].float())
    return quantizer.eval()


def values(dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)) * 2
    x[0, :6] = torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1e-30])
    return x.to(dtype)


FAST = [
    pytest.param({"bits": 8}, id="8-bits"),
    pytest.param({"bits": 3, "quantizer": "fixed"}, id="fixed"),
    pytest.param({"bits": 1, "format": "binary", "quantizer": "lsq"}, id="binary"),
    pytest.param({"format": "e4m3"}, id="fp8"),
    pytest.param({"bits": 4, "signed": False}, id="unsigned"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("spec", FAST)
@torch.no_grad()
def test_the_bits_are_those_of_the_quantizer(spec, dtype):
    x = values(dtype)
    quantizer = grid(x, **spec)
    for _ in range(2):
        y, expected = rounded.rounded(quantizer, x), quantizer(x)
        assert y is not None and y.dtype is expected.dtype and y.shape == expected.shape
        assert y.isnan().sum() == 1 == expected.isnan().sum()
        assert torch.equal(y.nan_to_num(77), expected.nan_to_num(77))
        signs = x.isfinite() & ~((x == 0) & x.signbit())  # of zeros, too, but for those that come as -0.0
        assert torch.equal(y.signbit()[signs], expected.signbit()[signs])
        quantizer.scale.data.mul_(0.7)  # which no version counts


@torch.no_grad()
def test_a_scale_that_went_below_zero_acts_as_one_above():
    quantizer = grid(values(), bits=8)
    rounded.rounded(quantizer, values())
    quantizer.scale.mul_(-1)
    assert torch.equal(rounded.rounded(quantizer, values()).nan_to_num(77), quantizer(values()).nan_to_num(77))


OTHERS = [
    pytest.param({"bits": 8, "symmetric": False}, lambda q: None, id="affine"),
    pytest.param({"bits": 8, "scale": "pow2"}, lambda q: None, id="scale-in-a-format"),
    pytest.param({"bits": 4, "quantizer": "dynamic", "granularity": "token"}, lambda q: None, id="measured"),
    pytest.param({"bits": 4, "quantizer": "pact", "signed": False}, lambda q: None, id="arithmetic-of-its-own"),
    pytest.param({"bits": 8}, lambda q: q.enable(False), id="off"),
    pytest.param({"bits": 8}, lambda q: q.observe(), id="observing"),
    pytest.param({"bits": 8}, lambda q: q.train(), id="in-training"),
    pytest.param({"bits": 8}, lambda q: q.register_forward_hook(lambda *_: None), id="hook"),
    pytest.param({"bits": 8}, lambda q: q.register_forward_pre_hook(lambda *_: None), id="pre-hook"),
    pytest.param({"bits": 8}, lambda q: setattr(q, "forward", lambda x: x), id="forward-put-in-its-place"),
]


@pytest.mark.parametrize(("spec", "change"), OTHERS)
@torch.no_grad()
def test_what_is_more_than_rounding_is_left_to_the_quantizer(spec, change):
    quantizer = grid(values(), **spec)
    change(quantizer)
    assert rounded.rounded(quantizer, values()) is None


@torch.no_grad()
def test_other_tensors_and_other_classes_are_left_to_the_quantizer():
    quantizer = grid(values(), bits=8)
    assert rounded.rounded(quantizer, torch.tensor(1.0)) is None  # its shape would become (1,)
    assert rounded.rounded(quantizer, nn.Parameter(values())) is None
    assert rounded.rounded(nn.Sequential(quantizer), values()) is None
    handle = register_module_forward_hook(lambda *_: None)
    try:
        assert rounded.rounded(quantizer, values()) is None
    finally:
        handle.remove()
    quantizer.__class__ = type("Mine", (LSQ,), {"forward": lambda self, x: x})
    assert rounded.rounded(quantizer, values()) is None


W3A3, W4A4 = ({"weight": {"bits": bits}, "act": {"bits": bits}} for bits in (3, 4))


class Activating(nn.BatchNorm2d):
    """As timm has them."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.nn.functional.silu(super().forward(input))


@torch.no_grad()
def test_a_batch_norm_that_does_more_does_not_fold():
    x, model = torch.randn(6, 4, 8, 8), nn.Sequential(nn.Conv2d(4, 6, 3), Activating(6), nn.Conv2d(6, 3, 3))
    plan = quantized(model, x, W3A3)
    assert plan.batch_norms == {} and not isinstance(model[1], FoldingNorm)
    torch.testing.assert_close(convert(model, plan)(x), model(x))


@torch.no_grad()
def test_a_pruned_batch_norm_is_rounded_as_well():
    x, model = torch.randn(6, 4, 8, 8), nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 3, 3))
    quantized(model, x, W3A3)
    expected = model(x)
    l1_unstructured(model[1], "weight", 0)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


@torch.no_grad()
def test_batch_norms_that_somebody_has_put_in_place_of_those_that_fold_fold_again():
    x, model = torch.randn(6, 4, 8, 8), nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 3, 3))
    plan = quantized(model, x, W3A3)
    model[1].running_mean.normal_()
    expected = model(x)
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert not torch.equal(model(x), expected)
    fold_again(model)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(convert(model, plan)(x), expected)


def test_a_weight_made_in_inference_mode_is_quantized_each_time():
    x, model = torch.randn(4, 8), nn.Sequential(nn.Linear(8, 8))
    quantized(model, x, W4A4)
    with torch.inference_mode():
        weight = model[0].weight.clone()  # it counts no versions
        before, expected = (torch.func.functional_call(model, {"0.weight": w}, (x,)) for w in (weight, weight.neg()))
        weight.neg_()
        assert torch.equal(torch.func.functional_call(model, {"0.weight": weight}, (x,)), expected)
        assert not torch.equal(before, expected)
