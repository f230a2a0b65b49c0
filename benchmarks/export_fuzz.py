"""Random small models with random policies, exported to ONNX and compared with training, piece by piece.

    python benchmarks/export_fuzz.py              # 3,000 cases, about an hour
    python benchmarks/export_fuzz.py --results FILE.jsonl   # the same, to be stopped and gone on with
    python benchmarks/export_fuzz.py 17           # case 17 alone: what a failing test names
    python benchmarks/export_fuzz.py 0:500 --blocks 3

What is compared, and why a deviation of the outputs is no measure, says tests/forced.py.
"""

import argparse
import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

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


def measured(seeds: list[int], blocks: int, folder: Path) -> dict[str, Any]:
    """What came of the cases of one file, ready for JSON.

    Returns:
        `cases`, the seeds; `wrong`, a pair of seed and sentence each; `codes` and `flipped` as in `Outcome`; `worst`,
        each case's largest deviation.
    """
    outcome = attempt(seeds, blocks, folder)
    wrong = [(seeds[0], line) for line in outcome.wrong]
    if wrong and len(seeds) > 1:  # which of them?
        alone = [(seed, line) for seed in seeds for line in attempt([seed], blocks, folder).wrong]
        wrong = alone or [(seed, f"with the {len(seeds) - 1} after it: {line}") for seed, line in wrong]
    worst = outcome.deviations.max(0, initial=0).tolist()
    counts = {"codes": outcome.codes, "flipped": outcome.flipped}
    return {"blocks": blocks, "cases": seeds, "wrong": wrong, **counts, "worst": worst}


def summary(results: list[dict[str, Any]]) -> str:
    """One sentence about all results."""
    worst = np.array([steps for result in results for steps in result["worst"]])
    codes, flipped = (sum(result[key] for result in results) for key in ("codes", "flipped"))
    failed = {seed for result in results for seed, _ in result["wrong"]}
    return (
        f"{len(worst)} cases, {len(failed)} failed; of {codes} activation codes {flipped} are neighbours at a tie; "
        f"outputs within one step in {(worst <= 1).sum()} cases, equal in {(worst <= 2**-7).sum()}"
    )


def main() -> int:
    """Prints each problem with the command that repeats it, and a summary; status 1 if there was any."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="?", default="0:3000", help="a number, or first:last")
    parser.add_argument("--blocks", type=int, default=2, help="most blocks of a model")
    parser.add_argument("--results", type=Path, help="a file that results are added to; what it holds is not run again")
    given = parser.parse_args()
    first, _, last = given.cases.partition(":")
    seeds = list(range(int(first), int(last or int(first) + 1)))
    lines = given.results.read_text().splitlines() if given.results and given.results.is_file() else []
    results = [result for line in lines if (result := json.loads(line))["blocks"] == given.blocks]
    done = {seed for result in results for seed in result["cases"]}
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        for some in packs([seed for seed in seeds if seed not in done], given.blocks):
            results.append(measured(some, given.blocks, Path(folder)))
            for seed, line in results[-1]["wrong"]:
                print(f"export_fuzz.py {seed} --blocks {given.blocks}: {line}", flush=True)
            if given.results:
                with given.results.open("a") as file:
                    file.write(json.dumps(results[-1]) + "\n")
            print(summary(results), file=sys.stderr, flush=True)
    print(summary(results))
    return any(result["wrong"] for result in results)


if __name__ == "__main__":
    sys.exit(main())
