"""`qat verify [FILE] RUN_DIR`: the proof of a finished run, made again from the files alone.

Without FILE, it checks what `qat train` wrote; with it, any file that `qat export` made of the run. RUN_DIR may be the
checkpoint that FILE was made of. Settings of the target (min_agreement=0.9) may follow FILE; where the data lie
elsewhere than for the run, data.root=DIR says so.
"""

from pathlib import Path

from qat.cli.arguments import Parser
from qat.config.exports import of_file, split
from qat.errors import UserError

USAGE = "qat verify [FILE] RUN_DIR [key=value ...]"


def main(argv: list[str]) -> int:
    """Verifies exported files; status 0 if all agree with the trained model, 1 if one does not."""
    parser = Parser(usage=USAGE, description=__doc__)
    parser.add_argument("arguments", metavar="[FILE] RUN_DIR [key=value ...]", nargs="+")
    paths, settings = split(parser.parse_args(argv).arguments)
    if len(paths) not in (1, 2):
        raise UserError(f"write {USAGE}")
    run_dir = Path(paths[-1]).absolute()
    if not run_dir.exists() or (len(paths) == 1 and not run_dir.is_dir()):
        raise UserError(f"RUN_DIR {run_dir} is not a directory")
    data = {key: settings.pop(key) for key in list(settings) if key.startswith("data.")}
    if len(paths) == 1:
        if settings:
            raise UserError(f"{next(iter(settings))}=...: name the FILE that it is for")
        target, file = None, None
    else:
        file = Path(paths[0]).absolute()
        target = of_file(file, settings)
    from qat.lightning.runs.deploy import verify  # imports torch: only once there is something to verify

    return 0 if verify(run_dir, target, file, data) else 1
