"""Memory that a training step frees, kept for the next one.

glibc's malloc returns large blocks to the system as soon as they are free and gets them again page by page, cleared: a
tenth of a training step on a CPU, and more of a quantized one, whose tensors are many and short-lived
(docs/lab-notes.md).
"""

import ctypes
import os
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of mallopt(3)
KEPT = 2**31 - 1
"""Free bytes at the top of the heap below which none is given back: the most that can be asked for."""
LARGEST = 2**30, 2**25
"""Bytes of a block from which it is not taken from the heap: the second is the most that older C libraries allow."""
OWN_CHOICE = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"}


def keep_freed() -> None:
    """Has malloc keep, for this process, what is freed; it then never shrinks again.

    Does nothing where malloc is not glibc's, or where the environment has settings for it (MALLOC_TRIM_THRESHOLD_,
    MALLOC_MMAP_THRESHOLD_, or GLIBC_TUNABLES).
    """
    chosen = OWN_CHOICE.intersection(os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if chosen or not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    # Any setting ends malloc's own adjustment of both thresholds, so one alone would do harm.
    if mallopt is not None and any(mallopt(MMAP_THRESHOLD, size) for size in LARGEST):
        mallopt(TRIM_THRESHOLD, KEPT)
