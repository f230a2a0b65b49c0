"""Joins what the audit and the statistics say about each layer, for `report["layers"]`."""

from collections.abc import Iterable
from typing import Any

from qat.measure.stats import QuantizerStats
from qat.planning.audit import AuditRow


def layer_rows(audit_rows: Iterable[AuditRow], stats: Iterable[QuantizerStats]) -> list[dict[str, Any]]:
    """One plain dict per layer or site, in execution order, without those that fold into another.

    A layer that reads through several activation grids gets the lowest of their SQNRs. `None` stands for float, for
    nothing to quantize, and, as an SQNR, also for exact or not measured.
    """
    sqnr: dict[tuple[str, str], float] = {}
    for entry in stats:
        for reader in entry.readers:
            if entry.sqnr_db is not None:
                key = reader, entry.role
                sqnr[key] = min(entry.sqnr_db, sqnr.get(key, entry.sqnr_db))
    return [
        {
            "name": row.name,
            "type": row.type,
            "weight_bits": row.weight_bits,
            "act_bits": row.act_bits,
            "weight_label": row.weight,
            "act_label": row.act,
            "weight_sqnr_db": sqnr.get((row.name, "weight")),
            "act_sqnr_db": sqnr.get((row.name, "act")),
            "macs": row.macs,
            "bops": row.bops,
            "params": row.params,
            "bytes": row.bytes,
        }
        for row in audit_rows
        if not row.folds
    ]
