"""`qat verify RUN_DIR`: the proof of a finished run, made again from the files alone."""

import argparse
from pathlib import Path

from qat.errors import UserError


def main(argv: list[str]) -> int:
    """Verifies the exported files under RUN_DIR; status 0 if all agree with the trained model, 1 if one does not."""
    parser = argparse.ArgumentParser(prog="qat verify", description=__doc__)
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="a directory that `qat train` wrote")
    run_dir: Path = parser.parse_args(argv).run_dir.absolute()
    if not run_dir.is_dir():
        raise UserError(f"RUN_DIR {run_dir} is not a directory")
    from qat.lightning.run import verify  # imports torch: only once there is something to verify

    return 0 if verify(run_dir) else 1
