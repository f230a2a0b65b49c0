"""`qat sensitivity [key=value ...]`: how much each width of each layer's weight and input hurts, one at a time."""

from qat.cli.search import main as search


def main(argv: list[str]) -> int:
    """Measures and shows; `qat search` with the same settings goes on from there."""
    return search(argv, "sensitivity")
