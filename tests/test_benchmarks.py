"""The measuring instruments: what they report of known cases, and that a peer which fails does not end the run."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import peers
import timing


def test_peak_memory_is_the_most_that_was_alive_at_once():
    def step() -> None:
        a, b = torch.empty(1000), torch.empty(2000)
        del a
        c = torch.empty(500)
        del b, c

    assert timing.peak_memory(step) == 4 * 3000


def test_bytes_saved_for_backward_leave_out_the_inputs():
    x = torch.randn(100, requires_grad=True)

    assert timing.bytes_saved_for_backward(lambda: x * x) == 0
    assert timing.bytes_saved_for_backward(lambda: x.exp()) == 4 * 100


def wrong(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        next(model.parameters()).zero_()
    return model


def frozen(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        next(model.parameters()).mul_(1.01)
    next(model.parameters()).requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        pytest.param(lambda model, x: model, "off by 0.0e+00", id="does-not-quantize"),
        pytest.param(lambda model, x: wrong(model), "off by 1.0e+00", id="computes-something-else"),
        pytest.param(lambda model, x: frozen(model), "no gradient", id="does-not-learn"),
        pytest.param(lambda model, x: 1 / 0, "ZeroDivisionError", id="raises"),
    ],
)
def test_a_peer_that_is_not_comparable_says_so_in_its_cell(monkeypatch, prepare, says):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)), torch.randn(4, 8)
    monkeypatch.setitem(peers.PEERS, "odd", peers.Peer("torch", prepare, lambda t: (torch.relu, [])))

    assert peers.attempt("odd", lambda peer: peers.prepared(peer, model, x), []) == says


def test_a_peer_that_is_not_installed_is_absent(monkeypatch):
    monkeypatch.setitem(peers.PEERS, "odd", peers.Peer("no_such_framework.qat", wrong, lambda t: (torch.relu, [])))

    assert peers.attempt("odd", lambda peer: peer.prepare, []) == "absent"


@pytest.mark.parametrize("name", peers.PEERS)
def test_an_installed_peer_quantizes_and_learns(name):
    pytest.importorskip(peers.PEERS[name].module)
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)), torch.randn(8, 16)
    notes: list[str] = []

    assert not isinstance(peers.attempt(name, lambda peer: peers.prepared(peer, model, x), notes), str), notes
