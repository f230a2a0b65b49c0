"""Tables that a benchmark writes into a page, between `<!-- NAME -->` and `<!-- end NAME -->`; all else is written by
hand.
"""

import re
from pathlib import Path

from qat.files import atomic

DOCS = Path(__file__).parents[1] / "docs"


def between(text: str, name: str, content: str, page: str) -> str:
    """`text` with what stands between the marks replaced by `content`.

    Raises:
        SystemExit: if `page`, which it is called, has no such marks.
    """
    pattern = rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)"
    text, count = re.subn(pattern, lambda m: f"{m[1]}{content}\n{m[2]}", text, flags=re.DOTALL)
    if not count:
        raise SystemExit(f"docs/{page}: no '<!-- {name} -->' ... '<!-- end {name} -->' to write a table between")
    return text


def put(page: str, name: str, content: str) -> None:
    """Writes `content` between the marks of `docs/PAGE`; the page is whole at any time."""
    text = between((DOCS / page).read_text(), name, content, page)
    with atomic(DOCS / page) as temporary:
        temporary.write_text(text)
