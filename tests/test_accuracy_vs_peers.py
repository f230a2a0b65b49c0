"""The comparison with other frameworks: each is prepared and led as the benchmark says."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qat.insert import named_quantizers
from qat.models import ResNet

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import accuracy_vs_peers
from accuracy_prepare import PEERS, with_torch


@pytest.fixture
def images() -> Tensor:
    return torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_torchs_modules_quantize_the_same_tensors_as_ours_at_the_same_bits(images):
    mine = PEERS["ours"].prepare(ResNet(8).eval(), images, 4, 3)
    theirs = with_torch(ResNet(8).eval(), images, 4, 3)
    ours = {n: q.quant_max - q.quant_min for n, q in named_quantizers(mine) if not n.startswith(("conv1", "linear"))}
    fakes = {n: m.quant_max - m.quant_min for n, m in theirs.named_modules() if hasattr(m, "disable_observer")}
    inner = {n: levels for n, levels in fakes.items() if not n.startswith(("conv1", "linear"))}
    assert len(ours) == len(inner) == 2 * 7 - 2
    assert sorted(inner.values()) == [7] * 6 + [15] * 6
    assert sorted(ours.values()) == [7] * 6 + [14] * 6  # a weight's grid is narrow, -7 .. 7
    assert [fakes[n] for n in fakes if n not in inner] == [255] * 4


def test_torchs_modules_stop_to_follow_where_its_tutorials_stop(images):
    peer, model = PEERS["torch_frozen"], with_torch(ResNet(8).eval(), images, 4, 4).train()

    def moved(share: float) -> set[str]:
        before = {n: b.clone() for n, b in model.named_buffers()}
        peer.settle(model, share)
        model(3 * images)
        return {n.rpartition(".")[2] for n, b in model.named_buffers() if not torch.equal(b, before[n])}

    assert moved(0.1) >= {"running_mean", "scale"}
    assert "scale" in (half := moved(0.4)) and "running_mean" not in half
    assert not moved(0.5) & {"running_mean", "scale", "min_val", "max_val"}


def test_the_progressive_one_comes_to_two_bits_by_way_of_four_and_three(images):
    peer = PEERS["ours_progressive"]
    model = peer.prepare(ResNet(8).eval(), images, 2, 2)
    seen = []
    for share in (0, 0.1, 0.5):
        peer.settle(model, share)
        seen.append({q.spec.width for _, q in named_quantizers(model)})
    assert seen == [{8, 4}, {8, 3}, {8, 2}]


def test_what_the_output_holds_is_not_run_again(monkeypatch, tmp_path, capsys):
    ran = []

    def apart(args, row):
        ran.append((row["bits"], row["peer"], row["seed"]))
        return {"accuracy": 90.0 + row["seed"]}

    monkeypatch.setattr(accuracy_vs_peers, "apart", apart)
    for bits in (["W4A4"], ["W4A4", "W2A2"]):
        options = ["--root=r", "--ckpt=c", "--seeds=2", f"--output={tmp_path / 'out.json'}", "--peers", "torch"]
        monkeypatch.setattr(sys, "argv", ["accuracy_vs_peers.py", *options, "ours_progressive", "--bits", *bits])
        accuracy_vs_peers.main()
    assert ran == [("W4A4", "torch", 0), ("W4A4", "torch", 1)] + [
        ("W2A2", peer, seed) for seed in (0, 1) for peer in ("torch", "ours_progressive")
    ]
    assert len(json.loads((tmp_path / "out.json").read_text())) == 6
    assert "| W4A4 | 0.02 | torch | 90.50 (90.00 to 91.00) | 2 |" in capsys.readouterr().out


def test_scales_that_a_peer_learns_do_not_decay():
    model = nn.ModuleDict({"scaling_impl": nn.Linear(1, 1, bias=False), "conv": nn.Linear(2, 2, bias=False)})
    weights, scales = accuracy_vs_peers.groups(model)
    assert [p.numel() for p in weights["params"]] == [4]
    assert [p.numel() for p in scales["params"]] == [1] and scales["weight_decay"] == 0
