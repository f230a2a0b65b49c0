"""The table of `qat inspect`."""

from collections.abc import Sequence

from rich import box
from rich.markup import escape
from rich.table import Table

from qat.health import Health
from qat.report.format import NONE

COLUMNS = ("SQNR dB", "clipped", "codes", "drift", "flips", "scale grad")


def health_table(rows: Sequence[Health], recorded: bool) -> Table:
    """One line per quantizer, in the order given.

    Args:
        rows: See `qat.health`.
        recorded: Whether training recorded them; a note says what is missing if not.
    """
    note = None if recorded else "weights alone: the checkpoint was written without the callback QuantizerHealth"
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=note, caption_justify="left")
    table.add_column("quantizer", overflow="fold")
    table.add_column("grid", overflow="fold")
    for column in COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for row in rows:
        numbers = (
            "exact" if row.sqnr_db is None else f"{row.sqnr_db:.1f}",
            f"{row.clip_rate:.2%}",
            str(row.codes),
            *(NONE if v is None else f"{v:.3g}" for v in (row.drift, row.oscillation, row.grad_norm)),
        )
        findings = "; ".join(row.findings())
        table.add_row(escape(row.name), escape(row.spec), *numbers, findings, style="red" if findings else None)
    return table
