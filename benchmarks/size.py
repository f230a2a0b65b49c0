"""How long the files and functions of the package are: `make size`. The budget is 250 lines a file, 50 a function."""

import ast
from pathlib import Path
from statistics import median

FILE_BUDGET, FUNCTION_BUDGET = 250, 50


def main() -> None:
    """Prints the distribution of both lengths, and every file and function over its budget."""
    root = Path(__file__).parents[1]
    files: dict[str, int] = {}
    functions: dict[str, int] = {}
    for path in sorted((root / "qat").rglob("*.py")):
        name, text = str(path.relative_to(root)), path.read_text(encoding="utf-8")
        files[name] = len(text.splitlines())
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                functions[f"{name}:{node.lineno} {node.name}"] = node.end_lineno - node.lineno + 1
    for kind, lengths, budget in (("files", files, FILE_BUDGET), ("functions", functions, FUNCTION_BUDGET)):
        ordered = sorted(lengths.values())
        p90 = ordered[int(0.9 * (len(ordered) - 1))]
        spread = f"median {median(ordered):.0f}, 90% {p90}, max {ordered[-1]}"
        print(f"{len(ordered)} {kind}, {sum(ordered)} lines: {spread}")
        for name, length in lengths.items():
            if length > budget:
                print(f"  over {budget}: {length} {name}")


if __name__ == "__main__":
    main()
