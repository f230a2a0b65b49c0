"""The table of `qat inspect`."""

import re
from collections.abc import Sequence

from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from qat.measure.health import Health
from qat.numbers import NONE

COLUMNS = ("SQNR\ndB", "clipped", "codes", "drift", "flips", "scale\ngrad")
TAIL = re.compile(r"_quantizer(?=(_\d+)?(\.\d+)?$)")
"""Part that all names of quantizers have, and tables leave out: `fc1.weight_quantizer`, `cat.input_quantizer_1`."""


def health_table(rows: Sequence[Health], why: str | None) -> Group:
    """One line per quantizer, in the order given, and below them what has collapsed; names are whole at 80 columns, but
    for long ones.

    Args:
        rows: See `qat.measure.health`.
        why: Why there are weights alone; `None` if training recorded everything.
    """
    note = None if why is None else f"weights alone: {why}"
    table = Table(box=box.SIMPLE_HEAD, padding=0, caption=note, caption_justify="left")
    table.add_column("quantizer", overflow="fold")
    table.add_column("grid", overflow="fold")
    for column in COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    found = []
    for row in rows:
        name = TAIL.sub("", row.name)
        numbers = (
            "exact" if row.sqnr_db is None else f"{row.sqnr_db:.1f}",
            f"{row.clip_rate:.2%}",
            str(row.codes),
            *(NONE if v is None else f"{v:.2g}" for v in (row.drift, row.oscillation, row.grad_norm)),
        )
        findings = row.findings()
        table.add_row(escape(name), escape(row.spec), *numbers, style="red" if findings else None)
        found += [Text(f"{name}: {finding}", style="red") for finding in findings]
    return Group(table, *found)
