"""Ranges calibrated once for many runs: the same to the bit, and looked for under all that they follow from."""

import copy
import json

import pytest
import torch
from tiny_module import Tiny, images, quantizer_state, same

from qat.calibrate import calibrate
from qat.cli import main
from qat.errors import UserError
from qat.insert import apply_plan
from qat.lightning import QATCallback
from qat.lightning.shared_ranges import RangeCache
from qat.planning.planner import make_plan
from qat.policies.policy import QuantPolicy
from qat.starts import CorrectBias

FLOAT = Tiny().eval()


def _quantized(weight: int, act: int, sites: int = 8):
    model, x = copy.deepcopy(FLOAT), images()
    policy = QuantPolicy.from_dict({"weight": {"bits": weight}, "act": {"bits": act}, "sites": {"bits": sites}})
    apply_plan(model, make_plan(model, policy, lambda: model(x))[0])
    return model


def _calibrated(cache: RangeCache | None, weight: int, act: int, run=None, sites: int = 8, seed: int = 2):
    model = _quantized(weight, act, sites)
    missing = None if cache is None else cache.load(model)
    calibrate(model, run or (lambda: model(images(seed))), missing)
    if cache is not None:
        cache.save(model, missing or ())
    return model, missing


def _refuse() -> None:
    raise AssertionError("data were looked at")


def test_a_second_run_has_the_same_ranges_without_a_look_at_data(tmp_path):
    alone, _ = _calibrated(None, 4, 4)
    first, missing = _calibrated(RangeCache(tmp_path, 16), 4, 4)
    assert missing
    again, missing = _calibrated(RangeCache(tmp_path, 16), 4, 4, run=_refuse)
    assert not missing
    for model in (first, again):
        assert same(quantizer_state(model), quantizer_state(alone))
        assert torch.equal(model(images()), alone(images()))


def test_other_bits_of_activations_leave_the_weights_ranges_and_those_of_sites(tmp_path):
    cache = RangeCache(tmp_path, 16)
    _calibrated(cache, 4, 4)
    mixed, missing = _calibrated(cache, 4, 3)
    assert missing and all(q.spec.bits == 3 and not q.is_weight for q in missing)
    assert same(quantizer_state(mixed), quantizer_state(_calibrated(None, 4, 3)[0]))


def test_a_grid_behind_one_of_other_bits_is_untied_of_that_whoever_came_first(tmp_path):
    for seed in range(100):
        alone = {bits: quantizer_state(_calibrated(None, 4, 4, sites=bits, seed=seed)[0]) for bits in (8, 6)}
        second = next(name for name in alone[8] if name.endswith("input_quantizer.1.scale"))
        if not torch.equal(alone[8][second], alone[6][second]):
            break
    assert not torch.equal(alone[8][second], alone[6][second]), "the grid in front mattered to none of them"
    for order in ((8, 6), (6, 8)):
        cache = RangeCache(tmp_path / str(order), 16)
        for bits in order:
            model, missing = _calibrated(cache, 4, 4, sites=bits, seed=seed)
            assert same(quantizer_state(model), alone[bits]) and missing
    assert not any(q.is_weight for q in missing), "a weight has no grid in front"


def test_another_number_of_samples_is_another_calibration(tmp_path):
    _calibrated(RangeCache(tmp_path, 16), 4, 4)
    assert len(_calibrated(RangeCache(tmp_path, 32), 4, 4)[1]) > 0


def test_a_process_that_does_not_write_leaves_nothing(tmp_path):
    _calibrated(RangeCache(tmp_path / "ranges", 16, writes=False), 4, 4)
    assert not (tmp_path / "ranges").exists()


def test_starts_change_what_is_calibrated_so_nothing_is_known(tmp_path):
    with pytest.raises(UserError, match="with starts there is no range that could be known"):
        QATCallback({"weight": {"bits": 4}}, starts=[CorrectBias()], ranges=RangeCache(tmp_path, 16))


def test_runs_with_a_cache_dir_share_ranges_and_measure_what_they_do_alone(tmp_path):
    tiny = """train model=mlp model.width=16 data.train_limit=192 data.val_limit=64 data.test_limit=128 float_epochs=1
        trainer.max_epochs=1 quant.calibration_samples=64 trainer.enable_progress_bar=false export=none""".split()  # noqa: SIM905
    shared = f"cache_dir={tmp_path / 'cache'}"
    for name, words in {"alone": [], "first": [shared], "second": [shared]}.items():
        assert main([*tiny, *words, f"run_dir={tmp_path / name}"]) == 0
        if name == "first":
            times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cache/*/ranges/*.safetensors")}
    assert times and times == {p: p.stat().st_mtime_ns for p in tmp_path.glob("cache/*/ranges/*.safetensors")}
    reports = [json.loads((tmp_path / n / "report.json").read_text()) for n in ("alone", "first", "second")]
    assert reports[0]["layers"] == reports[1]["layers"] == reports[2]["layers"]
    stages = [{k: v["metric"] for k, v in report["stages"].items()} for report in reports]
    assert stages[0] == stages[1] == stages[2]
