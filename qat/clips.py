"""Clips in one instruction each.

For `maximum` and `minimum` torch's compiler writes C++ that passes NaN on from either operand: around the instruction a
comparison, a mask and a blend, and branches where the operands are single numbers (torch 2.13). They took 40% of a
forward kernel's time on a tensor in cache. Kernels clip what may hold NaN, the first operand, to limits that are none;
then the instruction alone will do, since it returns what is clipped where it cannot compare. torch's vectors have it
under the names of `clamp_min` and `clamp_max`.
"""

from collections.abc import Iterator
from contextlib import contextmanager


def _numbers() -> dict[str, staticmethod]:
    """What to write for single numbers; the names are looked up by torch."""

    def maximum(x: object, low: object) -> str:
        return f"({x} < {low} ? {low} : {x})"

    def minimum(x: object, high: object) -> str:
        return f"({x} > {high} ? {high} : {x})"

    return {"maximum": staticmethod(maximum), "minimum": staticmethod(minimum)}


def _vectors() -> dict[str, staticmethod]:
    """What to write for vectors."""

    def maximum(x: object, low: object) -> str:
        return f"at::vec::clamp_min({x}, {low})"

    def minimum(x: object, high: object) -> str:
        return f"at::vec::clamp_max({x}, {high})"

    return {"maximum": staticmethod(maximum), "minimum": staticmethod(minimum)}


@contextmanager
def in_one_instruction() -> Iterator[None]:
    """Within it, torch's compiler writes clips that pass on NaN of their first operand alone.

    For code that nobody else compiles: it is kept on disk under a tag of its own.
    """
    from torch._inductor.codegen import cpp
    from torch.compiler import config

    tag = f"{config.cache_key_tag} qat: clips in one instruction"
    ours = {cpp.CppOverrides: _numbers(), cpp.CppVecOverrides: _vectors()}
    theirs = {kind: {name: vars(kind)[name] for name in written} for kind, written in ours.items()}
    with config.patch(cache_key_tag=tag):  # pyright: ignore[reportAttributeAccessIssue]
        try:
            _write(ours)
            yield
        finally:
            _write(theirs)


def _write(written: dict[type, dict[str, staticmethod]]) -> None:
    for kind, functions in written.items():
        for name, function in functions.items():
            setattr(kind, name, function)
