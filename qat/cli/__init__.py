"""The `qat` command: finds the subcommand and turns its outcome into an exit status.

A mistake of the user (`UserError`), or what the file system refuses, is one line on stderr and status 2. An interrupt
is status 130 and a termination 143, as shells have it. Anything else is a bug and keeps its traceback (status 1). Only
the chosen subcommand is imported, and none of them imports torch before it has something to compute.
"""

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from qat import __version__
from qat.errors import UserError, nearest, refused

COMMANDS = {
    "train": "calibrate, train, convert, export and verify: qat train [key=value ...]",
    "export": "write a finished run, or a checkpoint, in another format: qat export RUN_DIR target=NAME",
    "verify": "check exported files against the trained model: qat verify [FILE] RUN_DIR",
    "bench": "measure exported files against the float one: qat bench FILE...",
    "inspect": "how well each quantizer of a checkpoint does, what hurts most first: qat inspect CKPT",
    "sensitivity": "how much each width of each layer hurts: qat sensitivity [key=value ...]",
    "search": "bits for every layer within a budget: qat search packed=60kB [key=value ...]",
    "report": "show a sweep, or any folder of runs: table, page and picture: qat report SWEEP_DIR",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand.

    Args:
        argv: the command line without the program's name; `sys.argv[1:]` if None.

    Returns:
        The exit status: 0 done, 1 the command's own "no", 2 a mistake in the command line or config, 130 interrupted,
        143 terminated.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_help(), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"qat {__version__}")
        return 0
    try:
        return _run(argv[0], argv[1:])
    except UserError as error:
        return _mistake(error)
    except OSError as error:
        if (refusal := refused(error)) is None:
            raise
        return _mistake(refusal)
    except KeyboardInterrupt:
        print("qat: interrupted", file=sys.stderr)
        return 130
    except SystemExit as stop:
        if (status := interrupted(stop)) is None:
            raise
        return status


def interrupted(stop: BaseException) -> int | None:
    """The status of what a signal ended, as Python or Lightning (after its own clean-up) raise it; else `None`."""
    if isinstance(stop, KeyboardInterrupt) or isinstance(stop.__context__, KeyboardInterrupt):
        return 130
    return 143 if type(stop).__name__ == "SIGTERMException" else None  # Lightning's, which is slow to import


def _mistake(error: UserError) -> int:
    print(f"qat: error: {error}", file=sys.stderr)
    return 2


def _run(command: str, argv: list[str]) -> int:
    if command not in COMMANDS:
        raise UserError(f"unknown command '{command}'{nearest(command, COMMANDS)}")
    here = os.getcwd()
    if os.environ.get("QAT_TARGETS") and not {"", here} & set(sys.path):
        sys.path.append(here)  # a package beside the configs is found, as `python train.py` finds it
    return import_module(f"qat.cli.{command}").main(argv)


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(["usage: qat COMMAND ...", "", "commands:", *lines, "", "`qat COMMAND --help` says more."])
