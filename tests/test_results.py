"""The tables of docs/results.md say what the runs' reports say."""

import json
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import results  # noqa: E402  # pyright: ignore[reportMissingImports]


@pytest.fixture
def run(tmp_path):
    """Makes the folder of a finished run."""

    def made(seed: int, qat: float, **stages):
        folder = tmp_path / f"run{seed}"
        (folder / ".hydra").mkdir(parents=True)
        overrides = ["experiment=cifar10/net", f"run_dir={folder}", "data.root=/a/b", "ckpt=/c/net.safetensors"]
        (folder / ".hydra" / "overrides.yaml").write_text(OmegaConf.to_yaml([*overrides, f"seed={seed}"]))
        config = {"seed": seed, "trainer": {"max_epochs": 3}, "float_epochs": 1}
        (folder / ".hydra" / "config.yaml").write_text(OmegaConf.to_yaml(config))
        report = {
            "name": "net", "higher_is_better": True, "seconds": {"qat": 60.0}, "packed_bytes": 2000,
            "stages": {
                "float": {"metric": 0.9, "bytes": 9000}, "ptq": {"metric": 0.5}, "qat": {"metric": qat}, **stages,
            },
        }  # fmt: skip
        (folder / "report.json").write_text(json.dumps(report))
        return folder

    return made


def test_a_command_says_nothing_of_where_things_are_and_seeds_share_one(run):
    rows = [results.collected(run(seed, 0.8)) for seed in (0, 1)]
    assert {row["command"] for row in rows} == {"qat train experiment=cifar10/net data.root=DIR ckpt=net.safetensors"}
    assert "/a/" not in json.dumps(rows)


def test_the_same_command_and_seed_again_replaces_the_run(run):
    first, second = results.collected(run(0, 0.8)), results.collected(run(1, 0.7))
    assert results.merged([first, second], [{**first, "qat": 0.6}]) == [{**first, "qat": 0.6}, second]


def test_a_table_has_the_mean_and_range_over_seeds(run):
    rows = [results.collected(run(0, 0.81)), results.collected(run(1, 0.79))]
    page = results.written("before\n<!-- cifar10 -->\nold\n<!-- end cifar10 -->\nafter", rows)
    assert "| `net` | 3 | 90.00 | 50.00 | 80.00 (79.00 to 81.00) |" in page
    assert page.startswith("before") and page.endswith("after") and "old" not in page


def test_what_is_recovered_is_measured_against_float_runs_of_the_same_seeds():
    row = {"qat": 1.5, "ptq": 2.0, "float": 1.9}
    floats = [{"seed": seed, "float": value, "qat": None} for seed, value in ((0, 1.0), (1, 1.6))]
    assert results.recovered([row | {"seed": 1}], floats) == "125%"
    assert results.recovered([row | {"seed": 0}, row | {"seed": 1}], floats) == "71%"
    assert results.recovered([row | {"seed": 2}], floats) == "-"


def test_a_page_without_a_place_for_a_table_is_an_error(run):
    with pytest.raises(SystemExit, match="cifar10"):
        results.written("", [results.collected(run(0, 0.8))])


def test_the_committed_page_is_what_the_committed_runs_give():
    runs = json.loads((ROOT / "docs" / "results.json").read_text())
    page = (ROOT / "docs" / "results.md").read_text()
    assert results.written(page, runs) == page


def test_budgets_are_named_behind_their_recipe():
    command = "qat train experiment=[cifar10/net,cifar10/taught] data.root=DIR"
    assert results.label({"name": "net", "command": command}) == "`net`, taught"
    command = "qat train experiment=cifar10/net ckpt=net.safetensors quant.round_bias=eval"
    assert results.label({"name": "net", "command": command}) == "`net`, quant.round_bias=eval"
