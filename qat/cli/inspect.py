"""`qat inspect CKPT`: how well each quantizer of a trained model does, what hurts most first.

Status 1 if a quantizer has collapsed: all its codes are equal, it clips more than a fifth of its values, or its scale
is at its floor.
"""

import json
import sys
from pathlib import Path

from qat.cli.arguments import Parser
from qat.errors import UserError
from qat.run_files import LAST_CHECKPOINT, TRAINED


def main(argv: list[str]) -> int:
    """Prints the health of the quantizers in a checkpoint; status 1 if one has collapsed."""
    parser = Parser(usage="qat inspect [--json] CKPT", description=__doc__)
    parser.add_argument("path", metavar="CKPT", type=Path, help="a checkpoint, or a directory that `qat train` wrote")
    parser.add_argument("--json", action="store_true", help="print one JSON object per quantizer instead of a table")
    args = parser.parse_args(argv)
    path = _checkpoint(args.path)
    from qat.lightning.weights import read_checkpoint
    from qat.measure.health import from_checkpoint, worst_first  # imports torch: only once there is something to read

    rows, why, left_out = from_checkpoint(read_checkpoint(path), path)
    if left_out:
        print(
            f"qat: left out, as the checkpoint alone does not tell the weight: {', '.join(left_out)}; "
            "qat.measure.stats.weight_stats measures it in the loaded model",
            file=sys.stderr,
        )
    rows = worst_first(rows)
    if args.json:
        for row in rows:
            print(json.dumps({**row.to_dict(), "findings": row.findings()}))
    else:
        from rich.console import Console

        from qat.report.health import health_table

        Console().print(health_table(rows, why))
    return int(any(row.findings() for row in rows))


def _checkpoint(path: Path) -> Path:
    if not path.is_dir():
        return path
    options = [path / LAST_CHECKPOINT, path / TRAINED]
    found = next((option for option in options if option.is_file()), None)
    if found is None:
        raise UserError(f"{path} holds no quantized checkpoint: there is neither {options[0]} nor {options[1].name}")
    return found
