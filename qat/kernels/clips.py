"""Clips in one instruction each.

For `maximum` and `minimum` torch's compiler writes C++ that passes NaN on from either operand: around the instruction a
comparison, a mask and a blend, and branches in scalar code (torch 2.13). They took 40% of a forward kernel's time on a
tensor in cache. Kernels clip a tensor that may hold NaN, their first operand, to limits that never are NaN; for that
the instruction alone will do, since it returns the tensor's element where it cannot compare. torch's vectors have it
under the names of `clamp_min` and `clamp_max`.

It also returns the tensor's element where both are zero, so a -0.0 that is clipped at 0 stays -0.0, which plain torch
makes 0.0 of.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Writes = Callable[..., str]
"""Writes the C++ of an operation on two operands."""
SCALAR: dict[str, Writes] = {"maximum": "({0} < {1} ? {1} : {0})".format, "minimum": "({0} > {1} ? {1} : {0})".format}
VECTOR: dict[str, Writes] = {
    "maximum": "at::vec::clamp_min({}, {})".format,
    "minimum": "at::vec::clamp_max({}, {})".format,
}


class _Here(threading.local):
    """Whether this thread is within `in_one_instruction`; others compile what others wrote."""

    entered = False


_here = _Here()


@contextmanager
def in_one_instruction() -> Iterator[None]:
    """Within it, torch's compiler writes clips that pass on NaN of their first operand alone.

    For code that nobody else compiles: it is kept on disk under a tag of its own, which changes with what is written.
    """
    from torch._inductor.codegen import cpp
    from torch.compiler import config

    both = {cpp.CppOverrides: SCALAR, cpp.CppVecOverrides: VECTOR}
    before = [(kind, name, vars(kind)[name]) for kind, writes in both.items() for name in writes]
    tag = " ".join([config.cache_key_tag, *(write("x", "y") for writes in both.values() for write in writes.values())])
    with config.patch(cache_key_tag=tag):  # pyright: ignore[reportAttributeAccessIssue]
        was, _here.entered = _here.entered, True
        try:
            for kind, name, theirs in before:
                setattr(kind, name, staticmethod(_written(name, both[kind][name], theirs.__func__)))
            yield
        finally:
            _here.entered = was
            for kind, name, theirs in before:
                setattr(kind, name, theirs)


def _written(name: str, ours: Writes, theirs: Callable[..., Any]) -> Callable[..., Any]:
    def write(x: Any, limit: Any) -> Any:
        return ours(x, limit) if _here.entered else theirs(x, limit)

    write.__name__ = name  # torch looks the scalar operation up by that of the vector's
    return write
