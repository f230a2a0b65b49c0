"""A process that opens one file and runs it, and prints how much memory that took: `qat bench` starts it."""

import sys
from pathlib import Path

from qat.cli.bench import Opener
from qat.export.bench import high_water


def main(argv: list[str]) -> int:
    """Prints peak bytes above those before the file was opened, or `unknown`; arguments: FILE RUN_DIR BATCH THREADS."""
    file, run_dir, batch, threads = argv
    opener = Opener(Path(run_dir))
    x = opener.sample(int(batch))
    opener.prepare(Path(file))
    before = high_water()
    runner = opener.open(Path(file), int(threads))
    for _ in range(3):
        runner(x)
    after = high_water()
    print("unknown" if before is None or after is None else after - before)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
