"""Tables and the picture of a run."""

import copy
import io
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from rich.console import Console
from torch import nn

from qat.calibrate import calibrate
from qat.insert import apply_plan
from qat.measure.stats import QuantizerStats, quantizer_stats
from qat.numbers import count, size
from qat.planning.audit import AuditRow, audit, coverage
from qat.planning.planner import make_plan
from qat.policies.policy import QuantPolicy
from qat.report import audit_table, layer_rows, report_table, save_plot
from qat.report.search import sensitivity_table

REPORT = {
    "name": "resnet20_w4a4",
    "metric": "test/acc",
    "higher_is_better": True,
    "stages": {
        "float": {"metric": 0.9231, "bytes": 1_089_234, "latency_ms": 1.234},
        "ptq": {"metric": 0.8571},
        "qat": {"metric": 0.9278},
        "exported": {"metric": 0.9278, "bytes": 169_123, "latency_ms": 0.612, "agreement": 0.99987},
    },
    "verify": {
        "passed": True,
        "codes_identical": True,
        "max_deviation_steps": 1.0,
        "integer_nodes": 22,
        "expected_integer_nodes": 22,
        "checks": [{"name": "codes", "passed": True, "detail": ""}],
    },
}


def rendered(table, width: int = 80, color: bool = False) -> str:
    console = Console(width=width, record=True, file=io.StringIO(), force_terminal=color, color_system="standard")
    console.print(table)
    return console.export_text(styles=color)


def cells(line: str) -> list[str]:
    return [part.strip() for part in line.split("  ") if part.strip()]


def layers(number: int) -> list[dict]:
    return [
        {
            "name": f"layer{i}.conv", "type": "Conv2d", "weight_bits": 4, "act_bits": 4, "weight_label": "int4",
            "act_label": "uint4", "weight_sqnr_db": 20.0, "act_sqnr_db": 22.0, "macs": 100, "params": 10,
        }
        for i in range(number)
    ]  # fmt: skip


def test_the_report_has_a_line_per_stage_at_80_columns():
    lines = [cells(line) for line in rendered(report_table(REPORT)).splitlines()]
    assert ["float", "0.9231", "-", "1.09 MB", "1.23 ms", "-"] in lines
    assert ["PTQ", "0.8571", "-0.0660", "-", "-", "-"] in lines
    assert ["QAT", "0.9278", "+0.0047", "-", "-", "-"] in lines
    assert ["exported", "0.9278", "+0.0047", "169 kB", "0.612 ms", "99.99%"] in lines


def test_the_verdict_is_one_line_and_failures_are_listed():
    passed = " ".join(rendered(report_table(REPORT)).split())
    assert "verified: weight codes identical, outputs within 1 step, 22 of 22 layers run on integers" in passed
    report = copy.deepcopy(REPORT)
    report["verify"] |= {"integer_nodes": 15, "no_integer_kernel": "nothing quantizes the output"}
    lacking = " ".join(rendered(report_table(report)).split())
    assert "15 of 22 layers run on integers (7 without an integer kernel: nothing quantizes the output)" in lacking
    report = copy.deepcopy(REPORT)
    report["verify"] |= {"integer_nodes": 0, "expected_integer_nodes": 0}
    assert "0 of 0" not in " ".join(rendered(report_table(report)).split()), "of a file that runs elsewhere"
    report = copy.deepcopy(REPORT)
    report["verify"] |= {"passed": False, "integer_nodes": 20}
    report["verify"]["checks"].append({"name": "integer nodes", "passed": False, "detail": "conv1 runs in float"})
    failed = rendered(report_table(report))
    assert "NOT VERIFIED: weight codes identical" in failed and "20 of 22" in failed
    assert "integer nodes: conv1 runs in float" in failed
    assert "codes: " not in failed


@pytest.mark.parametrize(
    ("higher", "ptq", "qat"),
    [pytest.param(True, "31", "32", id="accuracy"), pytest.param(False, "32", "31", id="loss")],
)
def test_worse_is_red_and_better_is_green(higher, ptq, qat):
    text = rendered(report_table({**REPORT, "higher_is_better": higher}), color=True)
    assert re.search(rf"\x1b\[{ptq}m *-0\.0660", text)
    assert re.search(rf"\x1b\[{qat}m *\+0\.0047", text)


@pytest.mark.parametrize(
    "report",
    [
        pytest.param({"name": "float", "stages": {"float": {"metric": 0.9}}}, id="float-alone"),
        pytest.param({"stages": {"qat": {}, "exported": {"bytes": 10}}}, id="no-float-no-metric"),
        pytest.param({"stages": {"float": {"metric": float("nan")}, "qat": {"metric": 1.0}}}, id="nan"),
        pytest.param({"name": "$x_1$ [bold]", "stages": {}, "verify": {"passed": False}}, id="markup-and-no-stages"),
        pytest.param({}, id="empty"),
    ],
)
def test_any_stage_and_field_may_be_absent(report, tmp_path):
    text = rendered(report_table(report))
    assert ("[bold]" in text) == ("[bold]" in report.get("name", ""))
    assert [stage for stage in ("float", "QAT", "exported") if f" {stage} " in text.split("agreement")[1]] == [
        {"qat": "QAT"}.get(stage, stage) for stage in report.get("stages", {})
    ]
    save_plot(report, tmp_path / "report.png")
    assert imread(tmp_path / "report.png").size


@pytest.mark.parametrize(
    ("number", "text"),
    [
        pytest.param(0, "0", id="zero"),
        pytest.param(999, "999", id="below-a-thousand"),
        pytest.param(1000, "1k", id="thousand"),
        pytest.param(40_551_234, "40.6M", id="millions"),
        pytest.param(999_700, "1000k", id="rounds-up"),
        pytest.param(4_100_000_000, "4.1G", id="billions"),
    ],
)
def test_large_numbers_are_short(number, text):
    assert count(number) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        pytest.param(None, "-", id="absent"),
        pytest.param(999, "999 B", id="bytes"),
        pytest.param(1_089_234, "1.09 MB", id="megabytes"),
    ],
)
def test_file_sizes_have_units(number, text):
    assert size(number) == text


def test_the_audit_folds_words_and_never_numbers_at_80_columns():
    long = "model.encoder.layers.11.attention.self.query_projection"
    rows = [
        AuditRow(long, "Linear", "int4/group128", "uint8 > uint4", 4, 4, 589_824_123, 590_592),
        AuditRow("bn", "BatchNorm2d", reason=f"folds into {long}"),
        AuditRow("", "Linear", macs=640, params=650, reason="rule '[head]' leaves it float"),
    ]
    text = rendered(audit_table(rows, (0.9871, 0.5)))
    assert all(len(line) <= 80 for line in text.splitlines())
    lines = [cells(line) for line in text.splitlines()]
    assert any(line[-2:] == ["590M", "591k"] for line in lines)
    assert any(line[0] == "(model)" and line[-2:] == ["640", "650"] for line in lines if line)
    assert "98.7% of counted MACs, 50.0% of parameters" in text
    assert "[head]" in "".join(text.split())


def test_layers_of_the_report_join_audit_and_statistics():
    def stats(name: str, readers: tuple[str, ...], role, sqnr: float | None) -> QuantizerStats:
        return QuantizerStats(name, readers[0], readers, role, "int4", 4, 1, 1, 1, sqnr, 0, 1)

    rows = [
        AuditRow("a", "Linear", "int4", "int4", 4, 4, 64, 72),
        AuditRow("bn", "BatchNorm1d", reason="folds into a"),
        AuditRow("b", "Linear", "int4", "uint8 > uint4", 4, 4, 64, 72),
        AuditRow("norm", "LayerNorm", params=16, reason="no quantized version of LayerNorm"),
    ]
    measured = [
        stats("a.input_quantizer", ("a", "b"), "act", 40.0),
        stats("b.input_quantizer.1", ("b",), "act", 20.0),
        stats("a.weight_quantizer", ("a",), "weight", 18.0),
        stats("b.weight_quantizer", ("b",), "weight", None),
    ]
    a, b, norm = layer_rows(rows, measured)
    assert (a["weight_sqnr_db"], a["act_sqnr_db"]) == (18.0, 40.0)
    assert (b["weight_sqnr_db"], b["act_sqnr_db"]) == (None, 20.0)
    assert (b["act_label"], b["act_bits"], b["macs"], b["params"]) == ("uint8 > uint4", 4, 64, 72)
    assert norm["weight_bits"] is norm["act_bits"] is norm["weight_sqnr_db"] is None


def test_a_real_model_goes_all_the_way_to_the_picture(tmp_path):
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(16, 8)
    policy = QuantPolicy.from_dict({"weight": {"bits": 4}, "act": {"bits": 8}})
    plan, recording = make_plan(model, policy, lambda: model(x))
    apply_plan(model, plan)
    calibrate(model, lambda: model(x))
    rows = audit(model, plan, recording)
    joined = layer_rows(rows, quantizer_stats(model, lambda: model(x)))
    assert [(r["name"], r["weight_bits"], r["act_bits"]) for r in joined] == [("0", 4, 8), ("2", 4, 8)]
    assert all(10 < r["weight_sqnr_db"] < r["act_sqnr_db"] < 60 for r in joined)
    assert "100.0% of counted MACs" in rendered(audit_table(rows, coverage(rows)))
    save_plot({**REPORT, "layers": joined}, tmp_path / "report.png")
    assert [p.name for p in tmp_path.iterdir()] == ["report.png"]


def test_the_picture_grows_by_the_layer(tmp_path):
    heights = []
    for number in (0, 3, 60):
        save_plot({**REPORT, "layers": layers(number)}, tmp_path / "report.png")
        heights.append(imread(tmp_path / "report.png").shape[0])
    assert heights[2] - heights[1] == pytest.approx(57 * 0.27 * 150, abs=2)
    assert heights[0] < heights[1]


def test_the_picture_shows_layers_that_stay_float_and_odd_names(tmp_path):
    odd = [{"name": "", "type": "Linear", "params": 3}, {"name": "a_$b$" + "x" * 80, "type": "LSTM", "act_bits": 8}]
    for i, layer in enumerate(odd):
        save_plot({**REPORT, "layers": [layer]}, tmp_path / f"{i}.png")
    pictures = [imread(tmp_path / f"{i}.png") for i in range(2)]
    # "float" is red, and the verdict above is green.
    red = [((p[..., 0] > 0.6) & (p[..., 1] < 0.3) & (p[..., 2] < 0.3)).any() for p in pictures]
    assert red == [True, False]


def test_a_failed_picture_leaves_the_old_one_and_no_half(tmp_path):
    path = tmp_path / "report.png"
    path.write_bytes(b"old")
    with pytest.raises(KeyError):
        save_plot({**REPORT, "layers": [{"type": "Linear"}]}, path)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.png"]


@pytest.mark.parametrize("width", [40, 80, 120])
def test_sensitivities_are_whole_numbers_in_a_terminal_of_any_width(width):
    bits = {str(b): {"loss_increase": -0.0007, "sqnr_db": 11.0} for b in (2, 3, 4, 5, 6, 8)}
    space: Any = SimpleNamespace(tensors={"image.0.weight": None}, widths=lambda tensor: map(int, bits))
    measured: Any = SimpleNamespace(loss=1.41, tensors={"image.0.weight": {"bits": bits, "trace": 1234.5}})
    console = Console(width=width, file=io.StringIO())
    console.print(sensitivity_table(space, measured, width), crop=False)
    lines = [line.split() for line in console.file.getvalue().splitlines() if "11.0" in line]
    assert [line[-8:] for line in lines] == [["-0.0007"] * 6 + ["11.0", "1.23e+03"]]
    assert max(map(len, console.file.getvalue().splitlines())) <= max(width, 80)
