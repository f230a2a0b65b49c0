"""`qat export RUN_DIR target=NAME`: a finished run, or any checkpoint of it, as another file, on CPU,
without data.

RUN_DIR may also be a checkpoint below a run's folder:
`qat export RUN_DIR/checkpoints/best.ckpt target=onnx out=best.onnx`.
"""

from pathlib import Path

from qat.cli.arguments import Parser
from qat.cli.targets import build, split
from qat.errors import UserError

USAGE = "qat export RUN_DIR target=NAME [out=FILE|FOLDER] [key=value ...]"


def main(argv: list[str]) -> int:
    """Writes the file and its manifest, and prints its name and size."""
    parser = Parser(USAGE, __doc__)
    parser.add_argument(
        "arguments", metavar="RUN_DIR target=NAME [out=FILE|FOLDER] [key=value ...]", nargs="+", help="settings"
    )
    paths, settings = split(parser.parse_args(argv).arguments)
    if len(paths) != 1 or "target" not in settings:
        raise UserError(f"write {USAGE}")
    path = Path(paths[0]).absolute()
    if not path.exists():
        raise UserError(f"RUN_DIR {path}: no such file or directory")
    out = settings.pop("out", None)
    target = build(settings.pop("target"), settings)
    from qat.export.manifest import files_bytes  # these import torch: only once there is something to do
    from qat.lightning.deploy import export
    from qat.report.format import size

    if out is not None:
        folder = out.endswith("/") or not Path(out).suffix  # files of a target that has a suffix have one
        out = Path(out).absolute()
        if (folder or out.is_dir()) and not out.is_file() and Path(target.file).suffix:
            out = out / target.file
    written = export(path, target, out)
    print(f"{written}  {size(files_bytes(written))}")
    return 0
