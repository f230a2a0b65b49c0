"""What a point of a sweep costs beside a run of its own, in seconds of processor time: docs/sweeps.md.

    python benchmarks/sweep_cost.py FOLDER [--points 10] [-- key=value ...]

Runs a grid over the bits of weights and of activations as single runs and as one sweep. Processor time, not time on the
clock, so that other work on the machine does not count.
"""

import argparse
import resource
import subprocess
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

WIDTHS = (2, 3, 4, 5, 6, 8)


def used(words: Sequence[str]) -> float:
    """Processor seconds of one command and its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", "import sys; from qat.cli import main; sys.exit(main(sys.argv[1:]))", "train"]
    subprocess.run([*command, *words], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--points", type=int, default=10)
    parser.add_argument("words", nargs="*")
    given = parser.parse_args()
    words = [*given.words, "trainer.enable_progress_bar=false"]
    shared = f"cache_dir='{given.folder.absolute() / 'cache'}'"
    alone: list[float] = []
    together: list[float] = []
    for number, (act, weight) in enumerate(list(product((4, 8), WIDTHS))[: given.points]):
        bits = [f"quant.weight.bits={weight}", f"quant.act.bits={act}"]
        for kind, times, more in (("alone", alone, []), ("together", together, [shared])):
            folder = given.folder.absolute() / f"{kind}_{number}"
            times.append(used([*words, *bits, *more, f"run_dir='{folder}'"]))
        print(f"w{weight}a{act}: alone {alone[-1]:.1f} s, in a sweep {together[-1]:.1f} s", flush=True)
    less = 1 - sum(together) / sum(alone)
    print(f"{len(alone)} points: {sum(alone):.0f} s alone, {sum(together):.0f} s in a sweep: {less:.0%} less")


if __name__ == "__main__":
    main()
