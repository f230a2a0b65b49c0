"""ONNX files of layers beyond convolutions and linear ones: the same codes, the same outputs, any batch size, and
integer kernels where ONNX Runtime has them.
"""

import pytest
import torch
from small_models import both, exact_where_shared, lived
from torch import Tensor, nn

from qat.export.onnx.export import export_onnx
from qat.export.onnx.runtime import OnnxRunner, weight_codes
from qat.export.onnx.target import OnnxTarget
from qat.export.verify import Verdict, check_codes

W8A8 = {"weight": {"bits": 8, "granularity": "channel"}, "act": {"bits": 8}}


class Head(nn.Module):
    """A layer and a head on the first thing that it returns."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return self.head((y[0] if isinstance(y, tuple) else y).flatten(1))


def upsampling() -> nn.Module:
    return nn.Sequential(nn.ConvTranspose2d(4, 6, 2, groups=2), nn.BatchNorm2d(6))


LAYERS = [
    # The steps of a recurrent layer are written out, each with its matrix product on integers.
    pytest.param(lambda: Head(nn.LSTM(6, 8, batch_first=True), 16), torch.randn(8, 2, 6), 3, id="lstm",
                 marks=exact_where_shared),
    pytest.param(lambda: Head(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), 24), torch.randn(8, 3, 8), 7,
                 id="transformer-layer"),
    pytest.param(lambda: Head(upsampling(), 54), torch.randn(8, 4, 2, 2), 1, id="transposed-grouped"),
    pytest.param(lambda: Head(nn.Conv3d(2, 3, 2), 3), torch.randn(8, 2, 2, 2, 2), 1, id="conv3d"),
    pytest.param(lambda: Head(nn.EmbeddingBag(11, 8), 8), torch.randint(11, (8, 5)), 1, id="bag"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "x", "integer"), LAYERS)
def test_the_file_computes_what_evaluation_did(make, x, integer, tmp_path):
    torch.manual_seed(0)
    fake, converted = both(lived(make()), x, W8A8)
    path = tmp_path / "model.onnx"
    export_onnx(converted, x, path)
    verdict, runner = Verdict(), OnnxRunner(str(path))
    check_codes(verdict, converted, weight_codes(path))
    OnnxTarget().check_kernels(verdict, converted, runner)
    found, expected = verdict.facts["integer_nodes"], verdict.facts["expected_integer_nodes"]
    assert verdict.passed and 0 < found <= expected, verdict.checks
    assert verdict.facts["codes_identical"] and runner.integer_nodes() >= integer
    with torch.no_grad():
        for batch in (x, x[:3]):
            assert abs(runner(batch.numpy()) - fake(batch).numpy()).max() < 0.05 * fake(x).abs().max()
