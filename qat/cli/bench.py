"""`qat bench FILE...`: latency, throughput, memory and size of exported files against the float one.

Each FILE is one that `qat train` or `qat export` wrote; all of one run, with whose float.onnx they are compared, if it
has one.
`run=DIR` names the run for files that lie elsewhere. Each is timed for about `seconds` with every combination of
`threads` and `batch`; `out` is the chart. The defaults are threads=1,2 batch=1,16 seconds=2 out=bench.png
"""

import math
from pathlib import Path
from typing import Any

from qat.cli.arguments import Parser
from qat.config.exports import of_file, split
from qat.errors import UserError, nearest
from qat.files import make_folder
from qat.run_files import CONFIG, FLOAT_ONNX

DEFAULTS = {"threads": "1,2", "batch": "1,16", "seconds": "2", "out": "bench.png", "run": ""}
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".svg", ".pdf")
USAGE = "qat bench FILE... [threads=1,2] [batch=1,16] [seconds=2] [out=FILE|FOLDER] [run=DIR]"


class Opener:
    """Opens the files of one run.

    Args:
        run_dir: The run's folder.
    """

    def __init__(self, run_dir: Path) -> None:
        from qat.lightning.runs.deploy import restore

        self.trained = restore(run_dir)
        self.run_dir = run_dir

    def sample(self, batch: int) -> Any:
        """A random batch of the shape that training had."""
        if self.trained.example is None:
            raise UserError(f"{self.trained.checkpoint}: does not say what the model's input looks like")
        x = self.trained.example[:1]
        return x.repeat(batch, *[1] * (x.ndim - 1)).numpy()

    def prepare(self, file: Path) -> None:
        """Imports what `open` needs."""
        of_file(file, {})

    def open(self, file: Path, threads: int) -> Any:
        """A runner; the float file is no export, and has no manifest."""
        import torch

        from qat.export.onnx.runtime import OnnxRunner

        torch.set_num_threads(threads)
        if file == self.run_dir / FLOAT_ONNX:
            return OnnxRunner(file, threads=threads)
        return of_file(file, {}).load(file, self.trained.float_model, threads=threads)


def main(argv: list[str]) -> int:
    """Prints the table, draws the chart, and warns of files that are slower than the float one; status 0."""
    parser = Parser(usage=USAGE, description=__doc__)
    parser.add_argument("arguments", metavar="FILE [FILE ...] [key=value ...]", nargs="+", help="files and settings")
    names, settings = split(parser.parse_args(argv).arguments)
    if unknown := [key for key in settings if key not in DEFAULTS]:
        raise UserError(f"qat bench has no setting '{unknown[0]}'{nearest(unknown[0], DEFAULTS)}")
    settings = DEFAULTS | settings
    threads, batches = numbers("threads", settings["threads"]), numbers("batch", settings["batch"])
    seconds = duration("seconds", settings["seconds"])
    files = {name: Path(name).absolute() for name in names}
    if not files:
        raise UserError(f"write {USAGE}")
    for file in files.values():
        if not file.exists():
            raise UserError(f"{file}: no such file")
        of_file(file, {})
    run_dir = Path(settings["run"] or next(iter(files.values())).parent).absolute()
    if not (run_dir / CONFIG).is_file():
        raise UserError(f"{run_dir} is not the folder of the run that the files are of; name it with run=DIR")
    chart = _chart(settings["out"])
    make_folder(chart.parent, "out")  # what cannot be written to shows before anything is measured
    from rich.console import Console

    from qat.export.bench import FLOAT
    from qat.report.bench import bench_table, save_bench_plot, warnings

    reference = {FLOAT: run_dir / FLOAT_ONNX} if (run_dir / FLOAT_ONNX).is_file() else {}
    measured = _measure(Opener(run_dir), reference | files, threads, batches, seconds)

    console = Console()
    console.print(bench_table(measured))
    for line in warnings(measured):
        console.print(line, style="yellow", highlight=False, markup=False)
    save_bench_plot(measured, chart)
    console.print(f"chart: {chart}", highlight=False)
    return 0


def _chart(out: str) -> Path:
    """The picture that `out` names; a folder gets one of the default's name."""
    path = Path(out)
    if path.is_dir() or out.endswith("/"):
        return path / DEFAULTS["out"]
    if path.suffix.lower() not in PICTURES:  # the name of a file of the run would be one slip away
        raise UserError(f"out={out}: is for the chart, a {', '.join(PICTURES[:-1])} or {PICTURES[-1]}")
    return path


def duration(key: str, text: str) -> float:
    """Seconds, above zero."""
    try:
        found = float(text)
    except ValueError:
        raise UserError(f"{key}={text}: must be one number, {key}=2") from None
    if not 0 < found < math.inf:
        raise UserError(f"{key}={text}: must be above 0")
    return found


def numbers(key: str, text: str) -> list[int]:
    """`1,2` as whole numbers, each at least 1, in rising order: Inductor fills a batch up to a larger one that it has
    compiled already."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{key}={text}: must be whole numbers, {key}=1,2") from None
    if min(found) < 1:
        raise UserError(f"{key}={text}: must be at least 1")
    return sorted(set(found))


def _measure(opener: Opener, files: dict[str, Path], threads: list[int], batches: list[int], seconds: float) -> Any:
    from qat.export.bench import Measured, interleaved, peak_memory, rounds_in, timing
    from qat.export.manifest import files_bytes

    measured = {name: Measured(name, files_bytes(file)) for name, file in files.items()}
    for count in threads:
        runners = {name: opener.open(file, count) for name, file in files.items()}
        for name, runner in runners.items():
            measured[name].float_nodes = runner.float_layers()
        for batch in batches:
            x = opener.sample(batch)
            times = interleaved(runners, x, rounds_in(seconds * len(files), runners, x))
            for name, values in times.items():
                measured[name].timings.append(timing(values, batch, count))
    for name, file in files.items():
        arguments = [str(file), str(opener.run_dir), str(max(batches)), str(threads[0])]
        measured[name].peak_memory = peak_memory(arguments)
    return list(measured.values())
