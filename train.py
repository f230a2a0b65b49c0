"""`python train.py key=value ...` is `qat train key=value ...` from a checkout."""

import sys

from qat.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
