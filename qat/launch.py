"""Compiled code at the price of a function call.

Whoever calls what torch.compile returns pays 40 microseconds for guards: a training step over a tensor of 100,000
elements could be done meanwhile. Kernels need none. What they are called with differs in types and in numbers of axes
alone, so each such signature has a program of its own, compiled for all sizes, and is its only guard.
"""

import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import _pop_mode_temporarily

ADDRESSABLE = 1 << 31
"""Programs may count elements in 32 bits, as GPUs like to."""

Argument = tuple[int, int | None]
"""What a program takes: one of a kernel's arguments, or the size of one of its axes."""


def launchable(x: Tensor) -> bool:
    """Whether programs can run on `x`, of any size: not for subclasses of tensors, nor under a mode that has to see
    each operation (tracing, counting).
    """
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        and 1 < x.numel() < ADDRESSABLE
        and not torch._C._len_torch_dispatch_stack()
    )


def signature(tensors: int, args: Sequence[Tensor]) -> tuple[Any, ...]:
    """What a program is made for; see `program`."""
    x, parameters = args[0], args[tensors:]
    return x.device, x.ndim, *[a.dtype for a in args], *[p.shape if p.ndim == 1 else None for p in parameters]


def program(function: Callable[..., Any], tensors: int, args: Sequence[Tensor]) -> Callable[..., Any]:
    """Compiles `function` for all arguments of this signature.

    Args:
        function: Positional tensors in; a tensor, or a tuple of tensors and `None`, out.
        tensors: How many of its first arguments are large.
        args: First the large tensors, dense, of one shape `[N]` or `[rows, N]` with no axis of size 1, then parameters
            of shape `[k]` or `[rows, 1]`.

    Raises:
        Exception: whatever goes wrong in compiling.
    """
    captured: list[tuple[fx.GraphModule, Callable[..., Any]]] = []

    def capture(graph: fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        from torch._inductor import config  # seconds, which only those pay who compile
        from torch._inductor.compile_fx import compile_fx

        with config.patch(exact_division()):
            captured.append((graph, compile_fx(graph, examples)))  # pyright: ignore[reportArgumentType]
        return captured[0][1]

    examples = _examples(tensors, args)
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(args[0].device.type, enabled=False),
        torch._C._EnableTorchFunction(),  # layers run without it, and compilers need it
        torch.compiler.set_stance("default"),  # whatever has been said about the user's own programs
        ExitStack() as unfollowed,
    ):
        for _ in range(torch._C._len_torch_function_stack()):
            unfollowed.enter_context(_pop_mode_temporarily())
        results = torch.compile(_own_code(function), dynamic=True, fullgraph=True, backend=capture)(*examples)
    if not captured:
        raise RuntimeError("it is disabled")
    [(graph, run)] = captured
    takes = _arguments(graph)
    single = isinstance(results, Tensor)
    present = [True] if single else [result is not None for result in results]
    if sum(present) != len(graph.graph.output_node().args[0]):  # pyright: ignore[reportArgumentType]
        raise RuntimeError("a kernel returned one of its arguments, or one tensor twice")

    def launch(*args: Tensor) -> Tensor | tuple[Tensor | None, ...]:
        found = iter(run(*[args[i] if axis is None else args[i].shape[axis] for i, axis in takes]))
        return next(found) if single else tuple([next(found) if there else None for there in present])

    return launch


def exact_division() -> dict[str, Any]:
    """Options of torch's compiler with which a GPU rounds quotients as everybody else does; its fast division, which
    may be two units in the last place off, would now and then give the code beside.
    """
    from torch._inductor import config

    names = ("eager_numerics.division_rounding", "emulate_divison_rounding")  # the second up to torch 2.10
    return {name: True for name in names if name in config.get_config_copy()}


def _examples(tensors: int, args: Sequence[Tensor]) -> list[Tensor]:
    """Tensors like `args` whose sizes differ wherever they may: torch takes equal ones to be equal forever.

    They are as large, because compilers look at that.
    """
    *rows, count = args[0].shape
    taken = {p.shape[0] for p in args[tensors:] if p.ndim == 1}
    while count in taken:
        count += 1
    rows = [next(n for n in range(rows[0], rows[0] + len(taken) + 2) if n not in {*taken, count})] if rows else []
    with torch.inference_mode(False):
        large = [x.new_zeros(*rows, count) for x in args[:tensors]]
        return large + [p.new_ones(p.shape if p.ndim == 1 else (*rows, 1)) for p in args[tensors:]]


def _arguments(graph: fx.GraphModule) -> list[Argument]:
    """Which argument, or size of one, each input of `graph` is."""
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    named = [(node, re.fullmatch(r"l_args_(\d+)_", node.name)) for node in inputs]
    sizes: dict[Any, Argument] = {}
    for node, name in named:
        if name is not None:
            for axis, size in enumerate(node.meta["example_value"].shape):
                if isinstance(size, torch.SymInt):
                    sizes.setdefault(size.node.expr, (int(name[1]), axis))
    return [
        (int(name[1]), None) if name is not None else sizes[node.meta["example_value"].node.expr]
        for node, name in named
    ]  # fmt: skip


def _own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` under a code object of its own: torch counts recompilations by code object, and kernels must not use
    up each other's.
    """

    def run(*args: Tensor) -> Any:
        return function(*args)

    return FunctionType(run.__code__.replace(), run.__globals__, run.__name__, None, run.__closure__)
