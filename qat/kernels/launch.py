"""Launching compiled code at the price of a function call.

Whoever calls what torch.compile returns pays 40 microseconds for guards: a training step over a tensor of 100,000
elements could be done meanwhile. Kernels need none. What they are called with differs in types and in numbers of axes
alone, so each such signature has a program of its own, compiled for all sizes, and is its only guard. What is called is
the code that the compiler wrote, without the dozen Python calls that torch puts around it for aliases, mutations,
subclasses and random numbers, none of which a kernel has: run from cold caches, they took as long as the arithmetic of
100,000 elements.
"""

import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import count
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.overrides import _pop_mode_temporarily

from qat.kernels.clips import in_one_instruction
from qat.kernels.layout import Layout

PLAIN = (Tensor, torch.nn.Parameter)
"""The types of tensors that have memory of their own."""
ADDRESSABLE = 1 << 31
"""Programs may count elements in 32 bits, as GPUs like to."""

Argument = tuple[int, int | None]
"""An argument of a program: one of a kernel's arguments, or the size of one of its axes."""


Launch = Callable[[Sequence[Tensor]], Any]
"""Runs a program on a kernel's arguments."""


class Program(NamedTuple):
    """A compiled kernel.

    Attributes:
        run: Takes a list of its inputs; returns the tensors it makes.
        takes: Where each input comes from.
        tensors: How many of the kernel's first arguments are large.
        present: Which of the kernel's results are tensors, not `None`; `None` if it returns a tensor alone.
        code: The object that owns `run`.
    """

    run: Callable[[list[Any]], Sequence[Tensor]]
    takes: list[Argument]
    tensors: int
    present: list[bool] | None
    code: Any

    def launch(self, layout: Layout, args: Sequence[Tensor]) -> Launch:
        """How to run it on arguments of the types, shapes and strides of `args`.

        Args:
            layout: Layout of the large arguments, and of the first result.
            args: A kernel's arguments.
        """
        seen = [layout.view if i < self.tensors else layout.per_row(arg).shape for i, arg in enumerate(args)]
        inputs: list[Any] = [None if axis is None else seen[i][axis] for i, axis in self.takes]
        places = [(at, i) for at, (i, axis) in enumerate(self.takes) if axis is None]
        parameters = [(at, i) for at, i in places if i >= self.tensors]
        reshaped = [(at, i) for at, i in parameters if args[i].shape != seen[i] or not args[i].is_contiguous()]
        as_they_are = [pair for pair in parameters if pair not in reshaped]
        strided = [(at, i) for at, i in places if i < self.tensors and args[i].stride() == layout.strides]
        copied = [(at, i) for at, i in places if i < self.tensors and (at, i) not in strided]
        run, present, view, steps = self.run, self.present, layout.view, layout.steps
        shape, strides = layout.shape, layout.strides

        def launch(args: Sequence[Tensor]) -> Any:
            taken = inputs.copy()
            for at, i in strided:
                taken[at] = args[i].as_strided(view, steps)
            for at, i in as_they_are:
                taken[at] = args[i]
            for at, i in copied:
                taken[at] = layout.rows(args[i])
            for at, i in reshaped:
                taken[at] = layout.per_row(args[i])
            made = run(taken)
            made[0].as_strided_(shape, strides)  # in place: in-place operations would refuse a view
            if present is None:
                return made[0]
            found = iter(made)
            return tuple([next(found) if there else None for there in present])

        return launch


def launchable(x: Tensor, args: Sequence[Tensor]) -> bool:
    """Whether programs can run on tensors like `args`, the large ones being like `x`, of any size."""
    plain = all(type(arg) in PLAIN for arg in args) and not x.is_neg()
    return plain and x.device.type != "meta" and 1 < x.numel() < ADDRESSABLE


def signature(tensors: int, args: Sequence[Tensor]) -> tuple[Any, ...]:
    """Types and forms of arguments that a program is made for; see `program`."""
    x, parameters = args[0], args[tensors:]
    forms = [p.shape if p.ndim == 1 else tuple(size > 1 for size in p.shape) for p in parameters]
    return x.device, x.ndim, *[a.dtype for a in args], *forms


def program(function: Callable[..., Any], tensors: int, args: Sequence[Tensor]) -> Program:
    """Compiles `function` for all arguments of this signature.

    Args:
        function: Positional tensors in; a tensor, or a tuple of tensors and `None`, out.
        tensors: How many of its first arguments are large.
        args: First the large tensors, dense, of one shape with no axis of size 1, then parameters of shape `[k]`, or
            such as broadcast against them: `[rows, 1]`.

    Raises:
        Exception: whatever goes wrong in compiling.
    """
    graphs: list[fx.GraphModule] = []
    written: list[Any] = []

    def capture(graph: fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        import torch._functorch.config as around  # seconds, which only those pay who compile
        from torch._inductor import config
        from torch._inductor.compile_fx import compile_fx, compile_fx_inner

        def write(*args: Any, **kwargs: Any) -> Any:
            with in_one_instruction():
                written.append(compile_fx_inner(*args, **kwargs))
            return written[0]

        graphs.append(graph)
        # What a cache keeps of all that is around the written code would hide it.
        with config.patch({**exact_division(), **_settings()}), around.patch(enable_autograd_cache=False):
            return compile_fx(graph, examples, inner_compile=write)  # pyright: ignore[reportReturnType]

    examples = _examples(tensors, args)
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(args[0].device.type, enabled=False),
        torch._C._EnableTorchFunction(),  # layers run without it, and compilers need it
        torch.compiler.set_stance("default"),  # whatever has been said about the user's own programs
        torch._dynamo.config.patch(specialize_int=True),  # numbers of a format are no sizes, which may vary
        ExitStack() as unfollowed,
    ):
        for _ in range(torch._C._len_torch_function_stack()):
            unfollowed.enter_context(_pop_mode_temporarily())
        results = torch.compile(own_code(function), dynamic=True, fullgraph=True, backend=capture)(*examples)
    if not graphs:
        raise RuntimeError("it is disabled")
    [graph], [code] = graphs, written
    present = None if isinstance(results, Tensor) else [result is not None for result in results]
    returned: Any = graph.graph.output_node().args[0]
    if (1 if present is None else sum(present)) != len(returned):
        raise RuntimeError("a kernel returned one of its arguments, or one tensor twice")
    return Program(code.current_callable, _arguments(graph), tensors, present, code)


def exact_division() -> dict[str, Any]:
    """Options of torch's compiler with which a GPU rounds quotients as everybody else does; its fast division, which
    may be two units in the last place off, would now and then give the code beside.
    """
    from torch._inductor import config

    names = ("eager_numerics.division_rounding", "emulate_divison_rounding")  # the second up to torch 2.10
    return {name: True for name in names if name in config.get_config_copy()}


def _settings() -> dict[str, Any]:
    """Options of torch's compiler for programs: no checks of sizes, which are what the program was made for; and sums
    in at least so many parts on a GPU. Otherwise there are as many as the first tensor asks for, and few parts of a
    large one leave most of the GPU idle: 10 ms for 1e8 bfloat16 elements, by a program that was made for 1e6.
    """
    from torch._inductor import config

    wanted = {"size_asserts": False, "min_num_split": 512}  # torch 2.10 may not have the second
    return {name: value for name, value in wanted.items() if name in config.get_config_copy()}


def _examples(tensors: int, args: Sequence[Tensor]) -> list[Tensor]:
    """Tensors like `args` whose sizes differ wherever they may: torch takes equal ones to be equal forever.

    They are as large, because compilers look at that.
    """
    taken = {p.shape[0] for p in args[tensors:] if p.ndim == 1}
    sizes: list[int] = []
    for size in reversed(args[0].shape):
        sizes.insert(0, next(n for n in count(size) if n not in taken))
        taken.add(sizes[0])
    with torch.inference_mode(False):
        large = [x.new_zeros(sizes) for x in args[:tensors]]
        return large + [p.new_ones(_like(p.shape, sizes)) for p in args[tensors:]]


def _like(shape: torch.Size, sizes: list[int]) -> Sequence[int]:
    """The shape of a parameter beside large tensors of other sizes."""
    return shape if len(shape) == 1 else [1 if own == 1 else size for own, size in zip(shape, sizes, strict=True)]


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


def own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` under a code object of its own: torch keeps and counts what it compiles by code object, and kernels
    must not use up each other's count.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return FunctionType(run.__code__.replace(), run.__globals__, run.__name__, None, run.__closure__)
