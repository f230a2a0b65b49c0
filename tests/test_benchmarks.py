"""The measuring instruments: what they report of known cases, and that a peer which fails does not end the run."""

import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from qat import kernels

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import break_each
import export_fuzz
import forced
import overhead
import peers
import quantizers
import timing
import train_step


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


def test_quantization_adds_two_modules_and_25_python_calls_to_a_small_linear():
    calls, modules = overhead.added("qat", [])
    assert int(calls) <= 25 and int(modules) == 2


@pytest.mark.parametrize(("rows", "calls"), [(4, 25), (64, 25), (256, 40)])
def test_python_calls_by_the_size_of_the_input_are_bounded(rows, calls):
    model, x = nn.Sequential(nn.Linear(256, 256)), torch.randn(rows, 256)
    twin = train_step.quantized(copy.deepcopy(model), x)
    assert overhead.python_calls(twin, x) - overhead.python_calls(model, x) <= calls


def test_the_work_of_insertion_grows_as_the_number_of_layers():
    def calls(layers: int) -> int:
        model, x = nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers))), torch.randn(2, 4)
        return overhead.python_calls(lambda x: train_step.inserted(copy.deepcopy(model), x), x)

    few, more, most = map(calls, (10, 20, 40))
    assert most - more < 2.1 * (more - few)


def test_fake_quantization_is_timed_on_the_processor_and_on_the_clock_and_its_memory_is_shown(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["quantizers.py", "--sizes", "1e3", "--seconds", "0.001"])
    monkeypatch.setattr(quantizers, "keep_freed", lambda: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    try:
        quantizers.main()
    finally:
        kernels.configure()
    shown = capsys.readouterr().out
    assert "time on the clock, and memory" in shown and "peak" in shown
    rows = [line for line in shown.splitlines() if "LSQ per tensor, eager" in line]
    assert len(rows) == 2 and float(rows[1].split("│")[-2]) > 0


def test_a_word_that_no_break_has_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["break_each.py", "LOAD_from", "nosuch"])
    with pytest.raises(SystemExit):
        break_each.chosen()
    assert "nothing that goes wrong has 'nosuch' in it" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["break_each.py", "LOAD_from"])
    assert [entry.what for entry in break_each.chosen()] == ["load_from_checkpoint"]


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


def test_a_stopped_fuzz_run_goes_on_behind_the_cases_in_its_file(tmp_path, monkeypatch, capsys):
    file, ran = tmp_path / "results.jsonl", []

    def attempt(seeds: list[int], blocks: int, folder: Path) -> forced.Outcome:
        ran.append(seeds)
        return forced.Outcome(["broken"] * (4 in seeds), 10, 1, np.zeros((2, len(seeds))))

    def run(cases: str) -> int:
        monkeypatch.setattr(sys, "argv", ["export_fuzz.py", cases, "--results", str(file)])
        return export_fuzz.main()

    monkeypatch.setattr(export_fuzz, "attempt", attempt)
    monkeypatch.setattr(forced, "PACK", 2)
    assert run("0:2") == 0
    ran.clear()
    assert run("0:5") == 1
    assert sorted({seed for seeds in ran for seed in seeds}) == [2, 3, 4]
    assert "export_fuzz.py 4 --blocks 2: broken" in capsys.readouterr().out
    ran.clear()
    assert run("0:5") == 1 and not ran
    assert "5 cases, 1 failed" in capsys.readouterr().out
