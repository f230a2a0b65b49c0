"""How large exported files are beside the float file, all bytes counted: file, companions and manifest."""

from pathlib import Path

import pytest
import torch
from small_models import lived, quantized
from test_targets import target_of

from qat.config.presets import preset
from qat.convert import convert
from qat.export.manifest import companions
from qat.export.onnx.export import export_onnx
from qat.models import ResNet


@pytest.fixture(scope="module")
def float_bytes(tmp_path_factory) -> int:
    path = tmp_path_factory.mktemp("float") / "float.onnx"
    export_onnx(lived(ResNet(20)), torch.randn(2, 3, 32, 32), path)
    return path.stat().st_size


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "target", "most"),
    [
        pytest.param("w8a8", "onnx", 0.27, id="w8a8"),
        pytest.param("w4a4", "onnx", 0.15, id="w4a4"),
        pytest.param("w8a8", "litert", 0.27, id="w8a8-litert"),
    ],
)
def test_resnet20_takes_the_bits_of_its_weights_and_little_more(name, target, most, float_bytes, tmp_path: Path):
    exporter, path = target_of(target), tmp_path / target_of(target).file
    torch.manual_seed(0)
    model, x = lived(ResNet(20)), torch.randn(8, 3, 32, 32)
    plan = quantized(model, x, preset(name))
    exporter.export(convert(model, plan), plan, x[:2], path)
    size = sum(each.stat().st_size for each in companions(path))
    assert size == sum(each.stat().st_size for each in tmp_path.iterdir())
    assert size / float_bytes <= most
