"""`qat report SWEEP_DIR`: the points of a sweep, or of any folder of runs, as a table, a page and a picture."""

from pathlib import Path

from qat.cli.arguments import Parser


def main(argv: list[str]) -> int:
    """Prints the table and writes report.html and report.png (sweep.* beside a run's own) under SWEEP_DIR; of runs with
    several metrics, one of each for each metric (report-test-acc-max.html)."""
    parser = Parser(usage="qat report SWEEP_DIR", description=__doc__)
    parser.add_argument("sweep_dir", metavar="SWEEP_DIR", type=Path, help="a folder of `qat train -m`, or one of runs")
    folder: Path = parser.parse_args(argv).sweep_dir.absolute()
    from rich.console import Console

    from qat.report.sweep import tell_bad, write_reports
    from qat.sweep.results import read_sweep

    sweep, console = read_sweep(folder), Console(highlight=False)
    write_reports(sweep, console)
    tell_bad(sweep, console)
    return 0
