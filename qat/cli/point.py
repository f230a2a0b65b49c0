"""The process of one point: `qat train`, but it ends when the process that started it does.

Its standard input is a pipe whose other end the parent holds and never writes to. However the parent dies, kill -9
included, the system closes that end. The other ranks of a distributed run inherit the pipe and end likewise.
"""

import os
import sys
import threading

from qat.cli import main


def _end_with_the_parent() -> None:
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    sys.exit(main(["train", *sys.argv[1:]]))
