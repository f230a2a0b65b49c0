"""Takes out our handling of each thing that others get silently wrong, once, and shows that its test then fails.

    python benchmarks/break_each.py [WORD ...]

benchmarks/breaks.py lists them; with words, only those that have one of them in what goes wrong are tried. Everything
happens in a copy. An entry is good if its test passes in the copy as it is, and fails in the broken one with the
message that the entry says (mostly an assertion, and never an import or a syntax that the break itself made wrong).
Takes a few minutes; exits with 1 if an entry is not good.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree

from breaks import BREAKS, Break
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("qat", "tests", "benchmarks", "configs", "pyproject.toml")


def environment(tree: Path) -> dict[str, str]:
    """In which the copy's own package is imported. Files change faster than the time stamps that bytecode goes by."""
    return {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}


def outcomes(tree: Path, tests: Iterable[str]) -> dict[str, str]:
    """Runs tests of a copy.

    Returns:
        By node id, "passed", or the first line of what it failed with; nothing for a test that did not run.
    """
    report = tree / "report.xml"
    report.unlink(missing_ok=True)
    asked = dict.fromkeys(tests)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}", *asked]
    subprocess.run(command, cwd=tree, env=environment(tree), capture_output=True)
    if not report.is_file():
        return {}
    return {
        f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}": outcome(case)
        for case in ElementTree.parse(report).iter("testcase")
    }


def outcome(case: ElementTree.Element) -> str:
    """Of one test case of a report; `assert` of pytest's own rewriting says so without the name of the error."""
    for kind in ("failure", "error", "skipped"):
        if (found := case.find(kind)) is not None:
            line = (found.get("message") or "").splitlines()[0] if found.get("message") else ""
            message = f"AssertionError: {line}" if line.startswith("assert ") else line
            return message if kind == "failure" else f"{kind}: {message}"
    return "passed"


def broken(tree: Path, entry: Break) -> str:
    """The outcome of an entry's test with its handling taken out of the copy, which is put back."""
    file = tree / entry.file
    text = file.read_text()
    if text.count(entry.old) != 1:
        return f"'{entry.old.strip()}' occurs {text.count(entry.old)} times in {entry.file}"
    file.write_text(text.replace(entry.old, entry.new))
    try:
        return outcomes(tree, [entry.test]).get(entry.test, "did not run")
    finally:
        file.write_text(text)


def chosen() -> list[Break]:
    """The entries that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="WORD", help="try what has one of these in what goes wrong")
    words = [word.lower() for word in parser.parse_args().words]
    if unknown := [word for word in words if not any(word in e.what.lower() for e in BREAKS)]:
        parser.error(f"nothing that goes wrong has '{unknown[0]}' in it; benchmarks/breaks.py lists what does")
    return [e for e in BREAKS if not words or any(word in e.what.lower() for word in words)]


def main() -> None:
    entries = chosen()
    table = Table("goes wrong elsewhere", "test", "as it is", "broken", "good")
    good = True
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder).resolve() / "copy"
        tree.mkdir()
        for name in COPIED:
            source = ROOT / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, tree / name)
        imported = [sys.executable, "-c", "import qat; print(qat.__file__)"]
        if not subprocess.check_output(imported, cwd=tree, env=environment(tree), text=True).startswith(str(tree)):
            raise SystemExit(f"{tree}: another copy of the package is imported first")
        whole = outcomes(tree, (e.test for e in entries))
        for entry in entries:
            before, after = whole.get(entry.test, "did not run"), broken(tree, entry)
            fits = before == "passed" and after.startswith(entry.fails)
            good &= fits
            table.add_row(entry.what, entry.test.partition("::test_")[2], before, after[:100], "yes" if fits else "NO")
            print(f"{'good' if fits else 'NOT GOOD'}: {entry.what}: {after[:160]}", flush=True)
    Console().print(table)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
