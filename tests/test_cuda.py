"""On a GPU: the same codes as on the CPU, compiled or not, and training in every way that Lightning offers there."""

import copy
import json

import pytest
import pytorch_lightning as pl
import torch
from test_quantizers import CASES, each, ready
from tiny_module import Tiny, images, loader, trainer
from torch.utils.data import DataLoader, TensorDataset

from qat import kernels
from qat.cli import main
from qat.convert import convert
from qat.grid.spec import QuantSpec
from qat.lightning import Compile, QATCallback
from qat.lightning.runs.evaluate import full_precision
from qat.models import ResNet
from qat.quantizers import create

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

GRIDS = {
    "act-u8": {"bits": 8, "signed": False},
    "act-s4": {"bits": 4},
    "act-s8-affine": {"bits": 8, "signed": True, "symmetric": False},
    "act-e4m3": {"bits": None, "format": "e4m3"},
    "w4-channel": {"bits": 4, "granularity": "channel"},
    "w2-group": {"bits": 2, "granularity": "group", "group_size": 32},
}


@each(CASES)
def test_every_quantizer_gives_the_codes_and_gradients_of_the_cpu(name, grid):
    here, x = ready(name, grid)
    there = copy.deepcopy(here).cuda()
    assert torch.equal(there.quantize(x.cuda()).cpu(), here.quantize(x))
    ys, grads = [], []
    for quantizer, leaf in ((here, x.clone()), (there, x.cuda())):
        y = quantizer(leaf.requires_grad_())
        y.square().sum().backward()
        ys.append(y.detach().cpu())
        grads.append([leaf.grad.cpu(), *(p.grad.cpu() for p in quantizer.parameters() if p.grad is not None)])
    torch.testing.assert_close(*ys, rtol=1e-6, atol=0)  # a tanh, or a mean, of its own
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("grid", GRIDS)
def test_compiled_kernels_round_a_million_ratios_as_plain_torch_does(grid, dtype):
    spec = QuantSpec.from_dict({"range": "minmax", **GRIDS[grid]}).resolved(nonnegative=False, weight=grid[0] == "w")
    x = torch.randn(256, 4096)
    quantizer = create(spec, x.shape if grid[0] == "w" else None)
    quantizer.calibrate(x)
    if quantizer.scale.numel() == 1:  # half of them as close to ties as float32 gets
        ties = (torch.randint(-8, 8, x.shape) + 0.5) * quantizer.scale.detach()
        x = torch.where(torch.rand(x.shape) < 0.5, torch.nextafter(ties, x), x)
    quantizer, x = quantizer.cuda(), x.cuda().to(dtype)
    results = {}
    for mode in ("never", "always"):
        kernels.configure(mode)
        leaf = x.clone().requires_grad_()
        quantizer.zero_grad()
        y = quantizer(leaf)
        y.float().square().sum().backward()
        with torch.no_grad():
            assert torch.equal(quantizer(x), y)
        results[mode] = y.detach(), leaf.grad, quantizer.scale.grad
    assert torch.equal(results["always"][0], results["never"][0])
    assert torch.equal(results["always"][1], results["never"][1])
    torch.testing.assert_close(results["always"][2], results["never"][2], rtol=1e-3, atol=1e-2)
    assert torch.equal(results["always"][0].cpu(), quantizer.cpu()(x.cpu()))


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
def test_training_converts_to_integers_that_compute_what_it_measured(precision, tmp_path):
    model = Tiny()
    trainer(tmp_path, accelerator="gpu", precision=precision, max_epochs=4).fit(model, loader(64), loader())
    assert all(p.isfinite().all() for p in model.parameters())
    model = model.cuda().eval()
    with torch.no_grad(), full_precision():
        found, expected = convert(model, model.quantization_plan)(images()), model(images().cuda()).cpu()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def trained(*callbacks: pl.Callback, precision: str = "32-true") -> pl.LightningModule:
    """A ResNet-8 after eight batches."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(128, 3, 16, 16, generator=generator), torch.randint(10, (128,), generator=generator)
    torch.manual_seed(0)
    model = ResNet(8, lr=0.01)
    policy = {"weight": {"bits": 4, "granularity": "channel"}, "act": {"bits": 4}}
    pl.Trainer(
        max_epochs=2, callbacks=[QATCallback(policy), *callbacks], accelerator="gpu", precision=precision, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    ).fit(model, DataLoader(TensorDataset(x, y), batch_size=32))  # fmt: skip
    return model


@pytest.mark.parametrize("cudagraphs", [False, True], ids=["compiled", "recorded"])
def test_compiled_training_takes_the_same_steps(cudagraphs):
    plain, fast = trained(), trained(Compile(fullgraph=True, cudagraphs=cudagraphs))
    for name, value in plain.state_dict().items():
        # Sums in another order: now and then a value falls on the other side of a border between two codes.
        torch.testing.assert_close(fast.state_dict()[name], value, rtol=0.02, atol=4e-3, msg=name)


@pytest.mark.parametrize("made", ["data.num_workers=2", "data.on_device=true"])
def test_a_run_on_a_gpu_exports_a_file_that_computes_what_it_measured(made, tmp_path):
    overrides = ["trainer=gpu", made, "float_epochs=2", "trainer.max_epochs=2"]
    assert main(["train", *overrides, "trainer.enable_progress_bar=false", f"run_dir={tmp_path}"]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["verify"]["passed"] and report["verify"]["codes_identical"]
    assert report["stages"]["qat"]["metric"] > 0.5
