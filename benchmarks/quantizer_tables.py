"""The tables of docs/quantizers.md, made from the signatures and docstrings of quantizers and range estimators.

    python benchmarks/quantizer_tables.py

writes them into the page. tests/test_docs.py fails where the page says something else. A quantizer has a row as soon as
it has a file: the first paragraph of that file says what it does and ends in its paper, and a paragraph of its class
that begins with "Use it" says when to take it.
"""

import inspect
import itertools
import re
import textwrap
from collections.abc import Iterator

import torch
from pages import DOCS, between, put

from qat import quantizers
from qat.errors import UserError
from qat.grid.formats import FLOATS
from qat.grid.ranges import ESTIMATORS
from qat.grid.spec import FIXED_BITS, QuantSpec
from qat.quantizers import Quantizer

PAGE = "quantizers.md"
FORMATS = ("int", "midrise", *FIXED_BITS)
ROLES = {"weights": torch.Size((4, 4)), "activations": None}
"""The shape that each kind of tensor is tried out with."""


def paragraphs(text: str | None) -> list[str]:
    """Each paragraph of a docstring in one line."""
    return [" ".join(part.split()) for part in inspect.cleandoc(text or "").split("\n\n")]


def summary(name: str) -> tuple[str, str]:
    """What a quantizer does, and its paper, which the first paragraph of its file ends in, in parentheses."""
    first = paragraphs(inspect.getmodule(quantizers.find(name)).__doc__)[0]
    depth, start = 0, len(first) - 1
    for start in range(len(first) - 2, -1, -1):
        depth += (first[start] == ")") - (first[start] == "(")
        if not depth:
            break
    return first[:start].strip(), first[start + 1 : -2]


def use(name: str) -> str:
    [found] = [text for text in paragraphs(quantizers.find(name).__doc__) if text.startswith("Use it")]
    return found


def accepted(name: str, role: str) -> Iterator[Quantizer]:
    """The quantizer for every format and symmetry that it takes."""
    for form, symmetric, bits in itertools.product(FORMATS, (True, False), (8, 2)):
        try:
            spec = QuantSpec(bits=FIXED_BITS.get(form, bits), format=form, symmetric=symmetric, quantizer=name)
            yield quantizers.create(spec.resolved(nonnegative=False, weight=role == "weights"), ROLES[role])
        except UserError:
            continue


def formats(found: list[Quantizer]) -> str:
    """Formats in words; `affine` where a zero point is taken, too."""
    taken = dict.fromkeys("floats" if q.spec.format in FLOATS else q.spec.format for q in found)
    affine = ["affine"] if any(not q.spec.symmetric for q in found) else []
    return ", ".join([*taken, *affine]) or "-"


def learns(found: list[Quantizer]) -> str:
    names = dict.fromkeys(name for quantizer in found for name, _ in quantizer.named_parameters())
    return ", ".join(f"`{name}`" for name in names) or "nothing"


def arguments(name: str) -> dict[str, str]:
    """What the docstring of a class says of each argument."""
    text = inspect.cleandoc(quantizers.find(name).__doc__ or "").partition("Args:\n")[2].partition("\n\n")[0]
    found = re.findall(r"^    (\w[\w, ]*): (.*(?:\n {8}.*)*)", text, re.M)
    return {each: " ".join(meaning.split()) for names, meaning in found for each in names.split(", ")}


def overview() -> str:
    """One row for each quantizer."""
    rows = ["| quantizer | what it does | learns | formats of weights | of activations |", "|---|---|---|---|---|"]
    for name in quantizers.names():
        weights, activations = (list(accepted(name, role)) for role in ROLES)
        every = learns([*weights, *activations])
        rows.append(f"| `{name}` | {summary(name)[0]} | {every} | {formats(weights)} | {formats(activations)} |")
    return "\n".join(rows)


def uses() -> str:
    """One entry for each quantizer: when to use it, and its paper."""
    entries = [f"- **`{name}`**: {use(name)} Paper: {summary(name)[1]}." for name in quantizers.names()]
    return "\n".join(textwrap.fill(text, 140, subsequent_indent="  ", break_on_hyphens=False) for text in entries)


def options() -> str:
    """One row for each option."""
    rows = ["| quantizer | option | default | meaning |", "|---|---|---|---|"]
    for name in quantizers.names():
        said = arguments(name)
        for option, parameter in list(inspect.signature(quantizers.find(name)).parameters.items())[3:]:
            rows.append(f"| `{name}` | `{option}` | `{parameter.default}` | {said[option]} |")
    return "\n".join(rows)


def ranges() -> str:
    """One row for each range estimator: the first paragraph of its docstring."""
    rows = ["| range | the first interval of a grid |", "|---|---|"]
    for name, estimator in ESTIMATORS.items():
        described = paragraphs(estimator.__doc__)[0].replace("|", r"\|")
        rows.append(f"| `{name}` | {described} |")
    return "\n".join(rows)


TABLES = {"overview": overview, "uses": uses, "options": options, "ranges": ranges}


def written(text: str) -> str:
    """The page with tables made anew."""
    for name, table in TABLES.items():
        text = between(text, name, table(), PAGE)
    return text


def main() -> None:
    for name, table in TABLES.items():
        put(PAGE, name, table())
    print(f"written: {DOCS / PAGE}")


if __name__ == "__main__":
    main()
