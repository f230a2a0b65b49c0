"""`qat report`: the table, the picture, and the page in a real browser."""

import json
import re
import shutil
import struct

import pytest
from sweeps import write_point, write_sweep

from qat.cli import main
from qat.report.sweep import sweep_rows
from qat.sweep.results import read_sweep


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    return write_sweep(tmp_path_factory.mktemp("sweeps") / "bits <grid>")


@pytest.fixture(scope="module")
def page(sweep):
    assert main(["report", str(sweep)]) == 0
    return sweep / "report.html"


def test_the_table_marks_the_front_and_what_went_wrong(sweep, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["report", str(sweep)]) == 0
    lines = capfd.readouterr().out.splitlines()
    rows = {cells[0]: cells for line in lines if (cells := line.split()) and re.fullmatch(r"\*?\d", cells[0])}
    assert list(rows) == ["*2", "*0", "1", "3"], "best metric first, failed last"
    assert rows["*0"][1:6] == ["weight.bits=2", "0.2000", "0.8000", "300", "B"]
    assert "NOT VERIFIED" in " ".join(rows["*2"]) and "failed" in rows["3"]
    assert "metric max, packed min" in "\n".join(lines) and "float: 0.9500" in "\n".join(lines)


def test_a_point_whose_metric_is_not_finite_is_named(tmp_path, capfd):
    (tmp_path / "sweep.json").write_text(json.dumps({"kind": "grid", "objectives": {"metric": "max"}}))
    write_point(tmp_path, 0, {"model.lr": "0.1"}, metric=0.8)
    write_point(tmp_path, 1, {"model.lr": "9"}, metric=float("nan"))
    assert main(["report", str(tmp_path)]) == 0
    said = [line for line in capfd.readouterr().out.splitlines() if line.startswith("point ")]
    assert said == [f"point 1: test/acc is not finite: training diverged ({tmp_path / 'points' / '1'})"]


@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_point_whose_metric_is_not_finite_is_below_all_that_have_one(mode, tmp_path):
    (tmp_path / "sweep.json").write_text(json.dumps({"kind": "grid", "objectives": {"metric": mode}}))
    for number, value in enumerate((float("nan"), 0.2, -0.1)):
        write_point(tmp_path, number, {"seed": str(number)}, metric=value)
    _, rows = sweep_rows(read_sweep(tmp_path))
    assert [row[0].strip("*") for row in rows] == (["2", "1", "0"] if mode == "min" else ["1", "2", "0"])
    assert rows[-1][3] == "nan"


def test_the_picture_is_a_png_that_grows_with_the_points(sweep, page, tmp_path):
    head = (sweep / "report.png").read_bytes()[:24]
    width, height = struct.unpack(">II", head[16:24])
    assert head.startswith(b"\x89PNG") and width > 1000
    more = write_sweep(tmp_path / "more")
    for number in range(4, 12):
        write_point(more, number, {"seed": str(number)}, metric=0.5)
    assert main(["report", str(more)]) == 0
    assert struct.unpack(">II", (more / "report.png").read_bytes()[16:24])[1] > height


def test_the_page_stands_alone(page):
    text = page.read_text()
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", text) and "@import" not in text
    embedded = re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.S)
    assert embedded, "a name with </script> in it does not end the data"
    points = json.loads(embedded[1])["points"]
    assert [p["number"] for p in points] == [0, 1, 2, 3] and points[0]["layers"][1]["name"] == "</script>fc2"
    assert "scale/fc1" not in points[0]["curves"] and points[0]["folder"] == "points/0"


def _embedded(page):
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page.read_text(), re.S)[1])


def _diverged(folder):
    """A sweep whose second point met NaN and infinities: in its log, before training and in its float model."""
    write_sweep(folder)
    point = write_point(folder, 4, {"seed": "1"}, metric=0.5, ptq=float("inf"), curve=[0.3, 0.5, float("nan"), 0.4])
    report = (point / "report.json").read_text()
    (point / "report.json").write_text(report.replace('"float": {"metric": 0.95', '"float": {"metric": NaN'))
    return folder


def test_a_report_has_gaps_where_a_number_is_not_finite(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["report", str(_diverged(tmp_path))]) == 0
    assert "float: 0.9500\n" in re.sub(" *\n", "\n", capfd.readouterr().out) and (tmp_path / "report.png").is_file()
    point = _embedded(tmp_path / "report.html")["points"][4]
    assert point["curves"]["val/acc"] == [[9, 0.3], [19, 0.5], [29, None], [39, 0.4]]
    assert point["float"] is None and point["ptq"] is None


def test_what_all_points_have_in_common_is_said_once(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    (tmp_path / "sweep.json").write_text(json.dumps({"kind": "grid", "objectives": {"metric": "max"}}))
    for number in range(3):
        write_point(tmp_path, number, {"model": "mine", "seed": str(number)}, metric=0.5)
    assert main(["report", str(tmp_path)]) == 0
    said = capfd.readouterr().out
    assert said.count("model=mine") == 1 and all(f"seed={number}" in said for number in range(3))


def test_a_point_is_labelled_by_what_sets_it_apart_as_short_as_tells_keys_apart(tmp_path):
    for number, bits in enumerate("248"):
        varied = {"quant.weight.bits": bits, "quant.act.bits": "8" if number else "4", "model.lr": f"0.{bits}"}
        folder = write_point(tmp_path, number, {}, metric=0.5)
        overrides = [f"{k}={v}" for k, v in {"experiment": "reg", **varied, "float_epochs": "1"}.items()]
        (folder / ".hydra" / "overrides.yaml").write_text(json.dumps(overrides))
    labels = read_sweep(tmp_path).labels
    assert labels[0] == "weight.bits=2 act.bits=4 lr=0.2" and labels[2] == "weight.bits=8 act.bits=8 lr=0.8"
    assert main(["report", str(tmp_path)]) == 0
    page = _embedded(tmp_path / "report.html")
    assert [p["label"] for p in page["points"]] == list(labels.values()) and page["exported"]


def test_a_result_is_called_exported_only_where_a_file_was(tmp_path, monkeypatch):
    path = write_point(tmp_path, 0, {}, metric=0.5) / "report.json"
    report = json.loads(path.read_text())
    del report["stages"]["exported"]
    path.write_text(json.dumps(report))
    legends = []
    monkeypatch.setattr("qat.report.sweep_plot.save", lambda figure, path: legends.append(figure.axes[0].get_legend()))
    assert main(["report", str(tmp_path)]) == 0
    assert [text.get_text() for text in legends[0].get_texts()] == ["result", "PTQ", "front", "float"]
    assert not _embedded(tmp_path / "report.html")["exported"]


def test_runs_of_several_metrics_have_a_table_a_page_and_a_front_for_each(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    measured = [("test/acc", True, 0.8), ("test/loss", False, 0.3), ("test/acc", True, 0.7), ("test/loss", False, 0.2)]
    for number, (metric, higher, value) in enumerate(measured):
        path = write_point(tmp_path, number, {}, metric=value) / "report.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"metric": metric, "higher_is_better": higher}))
    (write_point(tmp_path, 4, {}, metric=0) / "report.json").write_text("[")
    assert main(["report", str(tmp_path)]) == 0
    said = capfd.readouterr().out
    rows = [cells[0] for line in said.splitlines() if (cells := line.split()) and re.fullmatch(r"\*?\d", cells[0])]
    assert rows == ["*0", "2", "4", "*3", "1"] and said.count("point 4:") == 1
    assert {p.name for p in tmp_path.glob("report*")} == {
        f"report-test-{of}.{suffix}" for of in ("acc-max", "loss-min") for suffix in ("html", "png")
    }
    text = (tmp_path / "report-test-loss-min.html").read_text()
    page = json.loads(re.search(r'json">(.*?)</script>', text, re.S)[1])
    assert page["metric"] == "test/loss" and page["objectives"]["metric"] == "min" and page["front"] == [3]


def test_a_sweep_of_several_metrics_keeps_its_other_objectives(tmp_path):
    objectives = {"metric": "max", "bops": "min"}
    (tmp_path / "sweep.json").write_text(json.dumps({"objectives": objectives}))
    for number, higher in enumerate((True, False)):
        path = write_point(tmp_path, number, {}, metric=0.5) / "report.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"metric": f"m{number}", "higher_is_better": higher}))
    parts = read_sweep(tmp_path).by_metric()
    assert [part.objectives for part in parts] == [objectives, objectives | {"metric": "min"}]


@pytest.fixture(scope="module")
def browser():
    sync = pytest.importorskip("playwright.sync_api", reason="driving a browser needs playwright")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium on this machine")
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def view(browser, page):
    """The page, opened from disk without a network; fails on whatever the browser complains of."""
    said = []
    context = browser.new_context(offline=True)
    view = context.new_page()
    view.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    view.on("pageerror", lambda error: said.append(str(error)))
    view.on("requestfailed", lambda request: said.append(request.url))
    view.goto(page.as_uri())
    yield view
    context.close()
    assert said == []


def _plot(view, cost: str, number: int):
    return view.locator(f"svg[data-cost={cost}] circle.point[data-number='{number}']")


def test_a_curve_is_broken_where_a_number_is_not_finite(browser, tmp_path):
    assert main(["report", str(_diverged(tmp_path))]) == 0
    view = browser.new_page()
    view.goto((tmp_path / "report.html").as_uri())
    paths = [path.get_attribute("d") for path in view.locator("path.curve").all()]
    assert [(d.count("M"), d.count("L")) for d in paths] == [*[(1, 1)] * 4, (2, 1)] and "NaN" not in "".join(paths)


def test_the_page_shows_each_plot_with_every_finished_point_and_its_references(view):
    assert view.locator("#plots figcaption").all_inner_texts() == [
        "test/acc against packed weights", "test/acc against exported file", "test/acc against BOPs",
        "test/acc against CPU p50 (ms)",
    ]  # fmt: skip
    for cost in ("packed", "bops", "latency"):
        plot = view.locator(f"svg[data-cost={cost}]")
        assert plot.locator("circle.point").count() == plot.locator("circle.ptq").count() == 3
        assert plot.locator("line.float").count() == 1
    assert view.locator("svg[data-cost=packed] circle.point.front").count() == 2
    assert "3 of 4 points finished; 2 on the Pareto front" in view.locator("#summary").inner_text()


def test_better_is_higher_and_cheaper_is_left(view):
    at = {
        n: (float(c.get_attribute("cx")), float(c.get_attribute("cy")))
        for n in (0, 2)
        for c in [_plot(view, "packed", n)]
    }
    assert at[0][0] < at[2][0] and at[0][1] > at[2][1]


def test_a_click_on_a_point_shows_its_config_and_links_to_its_run(view, sweep):
    _plot(view, "packed", 2).click()
    card = view.locator(".card")
    assert "point 2: quant.weight.bits=8" in card.inner_text() and "NOT VERIFIED" in card.inner_text()
    rows = card.locator(".config tr").all_inner_texts()
    assert "quant.weight.bits\t8" in rows and not [row for row in rows if row.startswith("run_dir")]
    link = card.locator("a").get_attribute("href")
    assert (sweep / link / "report.json").is_file()


def test_a_second_click_compares_two_points_and_a_third_takes_back(view):
    _plot(view, "packed", 0).click()
    _plot(view, "bops", 2).click()
    assert view.locator(".diff tbody tr").all_inner_texts() == ["quant.weight.bits\t2\t8"]
    assert view.locator("path.curve.a").count() == view.locator("path.curve.b").count() == 1
    _plot(view, "packed", 0).click()
    assert view.locator(".diff").count() == 0 and view.locator(".card").count() == 1


def test_the_heat_map_has_the_bits_of_every_layer(view):
    weights = view.locator("table.heat").first
    assert weights.locator("th.layer").all_inner_texts() == ["fc1", "</script>fc2"]
    assert [row.split("\t")[1:] for row in weights.locator("tbody tr").all_inner_texts()] == [
        ["2", "2"],
        ["4", "4"],
        ["8", "8"],
    ]


def test_curves_are_those_of_the_chosen_log_and_the_table_sorts(view):
    assert view.locator("#curve option").all_inner_texts() == ["val/acc"]
    assert view.locator("path.curve").count() == 4, "the failed point's, too"
    view.locator("#table th", has_text="packed").click()
    first = view.locator("#table tbody tr").first
    assert first.locator("td").first.inner_text() == "★ 0"
