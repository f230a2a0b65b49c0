"""Memory that a step frees is there for the next one, without a page fault."""

import os
import subprocess
import sys

import pytest

from qat.kernels import memory

STEPS = """
import resource
import torch
from qat.kernels.memory import keep_freed
keep_freed()
for step in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = [torch.ones(12 << 20) for _ in range(4)]  # 48 MB each
    del kept
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = 4 * (48 << 20) // 4096

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or "glibc" not in str(os.confstr("CS_GNU_LIBC_VERSION")),
    reason="needs glibc's malloc",
)


def faults(**environment: str) -> list[int]:
    """Page faults of each of eight steps that allocate and free the same blocks."""
    result = subprocess.run(
        [sys.executable, "-c", STEPS], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    return [int(line) for line in result.stdout.split()]


def test_what_is_freed_is_used_again():
    first, *later = faults()
    assert first > PAGES / 2
    assert max(later[-2:]) < PAGES / 20  # the first few leave gaps that are too small


@pytest.mark.parametrize(
    "environment",
    [
        pytest.param({"MALLOC_MMAP_THRESHOLD_": "1000000"}, id="variables"),
        pytest.param({"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=1000000"}, id="tunables"),
    ],
)
def test_settings_of_the_environment_are_left_alone(environment):
    assert min(faults(**environment)) > PAGES / 2


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        pytest.param(2**31, {memory.MMAP_THRESHOLD: 2**30, memory.TRIM_THRESHOLD: memory.KEPT}, id="any"),
        pytest.param(2**25, {memory.MMAP_THRESHOLD: 2**25, memory.TRIM_THRESHOLD: memory.KEPT}, id="half a heap"),
        pytest.param(0, {}, id="none"),
    ],
)
def test_a_threshold_that_malloc_refuses_is_lowered_or_both_are_left(most, expected, monkeypatch):
    settings: dict[int, int] = {}

    class Library:
        @staticmethod
        def mallopt(parameter: int, value: int) -> int:
            """Like that of older versions of glibc, where the threshold is at most half of HEAP_MAX_SIZE."""
            if parameter == memory.MMAP_THRESHOLD and value > most:
                return 0
            settings[parameter] = value
            return 1

    for name in (*memory.OWN_CHOICE, "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: Library)
    memory.keep_freed()
    assert settings == expected
