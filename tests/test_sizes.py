"""How large exported files are beside the float file, all bytes counted: file, companions and manifest."""

from pathlib import Path

import pytest
import torch
from small_models import lived, quantized
from test_sites_policy import preset

from qat.convert import convert
from qat.export.manifest import companions
from qat.export.onnx import OnnxTarget, export_onnx
from qat.models import ResNet


@pytest.fixture(scope="module")
def float_bytes(tmp_path_factory) -> int:
    path = tmp_path_factory.mktemp("float") / "float.onnx"
    export_onnx(lived(ResNet(20)), torch.randn(2, 3, 32, 32), path)
    return path.stat().st_size


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "most"), [pytest.param("w8a8", 0.27, id="w8a8"), pytest.param("w4a4", 0.15, id="w4a4")]
)
def test_resnet20_takes_the_bits_of_its_weights_and_little_more(name, most, float_bytes, tmp_path: Path):
    torch.manual_seed(0)
    model, x = lived(ResNet(20)), torch.randn(8, 3, 32, 32)
    plan = quantized(model, x, preset(name))
    OnnxTarget().export(convert(model, plan), plan, x[:2], tmp_path / "model.onnx")
    size = sum(path.stat().st_size for path in companions(tmp_path / "model.onnx"))
    assert size == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert size / float_bytes <= most
