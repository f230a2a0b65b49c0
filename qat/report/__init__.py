"""Reports of a run: tables for the terminal and one picture, both drawn from plain containers."""

from qat.report.layers import layer_rows
from qat.report.plot import save_plot
from qat.report.tables import audit_table, report_table

__all__ = ["audit_table", "layer_rows", "report_table", "save_plot"]
