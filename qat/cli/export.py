"""`qat export RUN_DIR target=NAME`: a finished run, or any checkpoint of it, as another file, on CPU, without data.

NAME is a format: onnx, openvino, torch, executorch, litert, gguf, compressed_tensors, packed, ... (the files of
configs/export, whose keys are the settings that may follow). RUN_DIR may also be a checkpoint below a run's folder:
`qat export RUN_DIR/checkpoints/best.ckpt target=onnx out=best.onnx`. Without `out`, a run's file lies in its folder, a
checkpoint's in a folder that is called like it (RUN_DIR/checkpoints/best/model.onnx).
"""

from pathlib import Path
from typing import Any

from qat.cli.arguments import Parser
from qat.config.exports import split, target_named
from qat.errors import UserError
from qat.numbers import size

USAGE = "qat export RUN_DIR target=NAME [out=FILE|FOLDER] [key=value ...]"


def main(argv: list[str]) -> int:
    """Writes the file and its manifest, and prints its name and size."""
    parser = Parser(usage=USAGE, description=__doc__)
    parser.add_argument(
        "arguments",
        metavar="RUN_DIR target=NAME [out=FILE|FOLDER] [key=value ...]",
        nargs="+",
        help="the run; settings",
    )
    paths, settings = split(parser.parse_args(argv).arguments)
    if len(paths) != 1 or "target" not in settings:
        raise UserError(f"write {USAGE}")
    path = Path(paths[0]).absolute()
    if not path.exists():
        raise UserError(f"RUN_DIR {path}: no such file or directory")
    out = settings.pop("out", None)
    target = target_named(settings.pop("target"), settings)
    from qat.export.manifest import files_bytes  # these import torch: only once there is something to do
    from qat.lightning.runs.deploy import export

    if out is not None:
        out = _file(out, target)
    written = export(path, target, out)
    print(f"{written}  {size(files_bytes(written))}")
    return 0


def _file(out: str, target: Any) -> Path:
    """The path that `out` means: a file, or the target's own file name in a folder.

    Of a target that writes a folder, one that is there is written into, too, unless it is an earlier export.
    """
    from qat.export.manifest import made_by

    path = Path(out).absolute()
    if not Path(target.file).suffix:
        into = path.is_dir() and made_by(path) != type(target).__name__
    else:  # files of a target that has a suffix have one
        into = path.is_dir() or ((out.endswith("/") or not path.suffix) and not path.is_file())
    return path / target.file if into else path
