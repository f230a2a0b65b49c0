"""The pages of docs/: each is found from the index, links lead somewhere, and tables that code makes are up to date."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
sys.path.insert(0, str(ROOT / "benchmarks"))
import quantizer_tables  # noqa: E402  # pyright: ignore[reportMissingImports]


def links(page: Path) -> list[str]:
    return re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text())


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_index_has_every_page_and_the_readme_has_the_index():
    assert "docs/README.md" in links(ROOT / "README.md")
    linked = {(ROOT / "docs" / link).resolve() for link in links(ROOT / "docs" / "README.md")}
    assert {page.name for page in PAGES if page.name != "README.md" and page not in linked} == set()


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_of_a_page_lead_somewhere(page):
    for link in links(page):
        file, _, anchor = link.partition("#")
        to = page.parent / file if file else page
        assert to.exists() and (not anchor or anchor in anchors(to)), link
    named = set(re.findall(r"docs/[\w-]+\.md", page.read_text()))
    assert {name for name in named if not (ROOT / name).exists()} == set()


def test_the_tables_of_quantizers_are_what_signatures_and_docstrings_say():
    page = (ROOT / "docs" / "quantizers.md").read_text()
    assert quantizer_tables.written(page) == page, "python benchmarks/quantizer_tables.py"
