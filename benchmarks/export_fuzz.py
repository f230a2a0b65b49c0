"""Random small models with random policies, exported to ONNX and compared with training, piece by piece.

    python benchmarks/export_fuzz.py              # 3,000 cases
    python benchmarks/export_fuzz.py 17           # case 17 alone: what a failing test names
    python benchmarks/export_fuzz.py 0:500 --blocks 3

What is compared, and why a deviation of the outputs is no measure, says tests/forced.py.
"""

import argparse
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from forced import Outcome, compare, packs
from random_models import draw


def attempt(seeds: list[int], blocks: int, folder: Path) -> Outcome:
    """Compares some cases; what raises is a problem, too."""
    try:
        return compare([draw(seed, blocks) for seed in seeds], folder / "model.onnx")
    except Exception as error:  # the runtime's exceptions have no base of their own
        return Outcome([f"{type(error).__name__}: {error}"], 0, 0, np.zeros((0, len(seeds))))


def main() -> int:
    """Prints each problem with the command that repeats it, and a summary; status 1 if there was any."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="?", default="0:3000", help="a number, or first:last")
    parser.add_argument("--blocks", type=int, default=2, help="most blocks of a model")
    arguments = parser.parse_args()
    first, _, last = arguments.cases.partition(":")
    seeds = list(range(int(first), int(last or int(first) + 1)))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    failed, codes, flipped, deviations = [], 0, 0, []
    with tempfile.TemporaryDirectory() as folder:
        for some in packs(seeds, arguments.blocks):
            outcome = attempt(some, arguments.blocks, Path(folder))
            if outcome.wrong and len(some) > 1:  # which of them?
                single = {seed: attempt([seed], arguments.blocks, Path(folder)).wrong for seed in some}
                lines = [(seed, line) for seed, wrong in single.items() for line in wrong]
                lines = lines or [(some[0], f"with the {len(some) - 1} after it: {line}") for line in outcome.wrong]
            else:
                lines = [(some[0], line) for line in outcome.wrong]
            for seed, line in lines:
                print(f"export_fuzz.py {seed} --blocks {arguments.blocks}: {line}", flush=True)
            failed += sorted({seed for seed, _ in lines})
            codes, flipped = codes + outcome.codes, flipped + outcome.flipped
            deviations.append(outcome.deviations.max(0, initial=0))
    worst = np.concatenate(deviations)
    print(
        f"{len(seeds)} cases, {len(failed)} failed; of {codes} activation codes {flipped} are neighbours at a tie; "
        f"outputs within one step in {(worst <= 1).sum()} cases, equal in {(worst <= 2**-7).sum()}"
    )
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
