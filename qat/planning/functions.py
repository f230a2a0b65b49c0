"""Facts about torch's functions: which are sites and where their operands are, which change no value, which make or
keep values non-negative.

Recording (`qat.planning.probe`) and running (`qat.layers.sites`) ask the same `FUNCTIONS`, so that both count alike.
Python's operators are among them: a mode sees the tensor's method in their place, but `operator.add` itself under a
strict torch.export.
"""

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

T = torch.Tensor
EXPERTS = "grouped_mm"
"""Kind of the products of a mixture's experts, all of one matrix at once; `qat.layers.experts` quantizes them."""


@dataclass(frozen=True)
class Function:
    """A function that is a site where its operands are float tensors.

    Attributes:
        kind: Its name in policies and in names of sites (`layer1.0.add_0`).
        slots: Position and name of each operand among the arguments.
        sequence: The only slot holds a list of operands (or, of einsum, begins them).
        output: The site quantizes what the function returns, and no operand.
        channel_axis: Output-channel axis of the second operand, should it be a parameter; -1 is the last.
        in_place: It writes to its first operand.
        summed: Axis of the first operand that a product sums over, counted from the end.
    """

    kind: str
    slots: tuple[tuple[int, str], ...]
    sequence: bool = False
    output: bool = False
    channel_axis: int | None = None
    in_place: bool = False
    summed: int = -1

    @property
    def accumulates(self) -> bool:
        """Whether it adds its product to a tensor that comes first: `torch.addmm`."""
        return self.kind == "matmul" and self.slots[0][0] == 1

    def operands(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor] | None:
        """The operands of a call, or `None` if it is no site: it computes with numbers, integers or masks."""
        found: list[Any] = [args[i] if i < len(args) else kwargs.get(name) for i, name in self.slots]
        if self.sequence:
            found = list(found[0]) if isinstance(found[0], list | tuple) else list(args[self.slots[0][0] :])
        return found if found and all(_is_float(value) for value in found) else None

    def with_operands(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], operands: list[Tensor]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with other operands in their places."""
        if self.sequence:
            position, name = self.slots[0]
            if position >= len(args):
                return args, {**kwargs, name: operands}
            if isinstance(args[position], list | tuple):
                return (*args[:position], operands, *args[position + 1 :]), kwargs
            return (*args[:position], *operands), kwargs
        changed, named = list(args), dict(kwargs)
        for (position, name), operand in zip(self.slots, operands, strict=True):
            if position < len(args):
                changed[position] = operand
            else:
                named[name] = operand
        return tuple(changed), named


_ONE, _TWO = ((0, "input"),), ((0, "input"), (1, "other"))
_WEIGHTED = ((0, "input"), (1, "weight"))


def _table() -> Iterator[tuple[Any, Function]]:
    binary = {
        "add": ((torch.add, T.add, T.__add__, T.__radd__, operator.add), (T.add_, T.__iadd__, operator.iadd)),
        "sub": (
            (torch.sub, torch.subtract, torch.rsub, T.sub, T.subtract, T.__sub__, T.__rsub__, operator.sub),
            (T.sub_, T.__isub__, operator.isub),
        ),
        "mul": (
            (torch.mul, torch.multiply, T.mul, T.multiply, T.__mul__, T.__rmul__, operator.mul),
            (T.mul_, T.__imul__, operator.imul),
        ),
    }
    for kind, (plain, in_place) in binary.items():
        yield from ((f, Function(kind, _TWO)) for f in plain)
        yield from ((f, Function(kind, _TWO, in_place=True)) for f in in_place)
    for f in (torch.matmul, T.matmul, T.__matmul__, operator.matmul):
        yield f, Function("matmul", _TWO, channel_axis=-1)
    yield T.__rmatmul__, Function("matmul", _TWO[::-1])
    for f in (torch.bmm, T.bmm, torch.mm, T.mm):
        yield f, Function("matmul", ((0, "input"), (1, "mat2")), channel_axis=-1)
    for f in (torch.addmm, T.addmm):
        yield f, Function("matmul", ((1, "mat1"), (2, "mat2")), channel_axis=-1)
    for f in (torch.baddbmm, T.baddbmm):
        yield f, Function("matmul", ((1, "batch1"), (2, "batch2")), channel_axis=-1)
    yield torch.einsum, Function("einsum", ((1, "operands"),), sequence=True)
    yield F.scaled_dot_product_attention, Function("attention", ((0, "query"), (1, "key"), (2, "value")))
    for f in (torch.cat, torch.concat, torch.concatenate, torch.stack, torch.hstack, torch.vstack, torch.dstack):
        yield f, Function("cat", ((0, "tensors"),), sequence=True)
    for f in (F.interpolate, F.upsample):
        yield f, Function("interpolate", _ONE)
    for f in (*POOL, *MEAN):
        yield f, Function("avg_pool", _ONE)
    outputs = {
        "softmax": (F.softmax, torch.softmax, T.softmax), "gelu": (F.gelu,), "silu": (F.silu,),
        "layer_norm": (F.layer_norm, torch.layer_norm), "rms_norm": (F.rms_norm,), "group_norm": (F.group_norm,),
        "sigmoid": (torch.sigmoid, T.sigmoid, F.sigmoid), "tanh": (torch.tanh, T.tanh, F.tanh),
    }  # fmt: skip
    for kind, functions in outputs.items():
        yield from ((f, Function(kind, _ONE, output=True)) for f in functions)
    yield F.linear, Function("linear", _WEIGHTED, channel_axis=0)
    convolutions = {
        "conv1d": (F.conv1d, torch.conv1d), "conv2d": (F.conv2d, torch.conv2d), "conv3d": (F.conv3d, torch.conv3d),
    }  # fmt: skip
    for axes, (kind, functions) in enumerate(convolutions.items(), 1):
        yield from ((f, Function(kind, _WEIGHTED, channel_axis=0, summed=-1 - axes)) for f in functions)
    for axes, f in enumerate((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), 1):
        yield f, Function(f.__name__, _WEIGHTED, channel_axis=1, summed=-1 - axes)
    for f in (F.grouped_mm, torch._grouped_mm):
        yield f, Function(EXPERTS, ((0, "mat_a"), (1, "mat_b")), channel_axis=-1)


MEAN = {torch.mean, T.mean}
POOL = {
    F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d,
}  # fmt: skip
KEEPS_VALUES = {
    torch.flatten, T.flatten, torch.ravel, T.ravel, torch.reshape, T.reshape, T.reshape_as, T.view, T.view_as,
    torch.permute, T.permute, torch.transpose, T.transpose, torch.swapaxes, T.swapaxes, torch.swapdims, T.swapdims,
    torch.t, T.t, T.mT.__get__, T.T.__get__, T.mH.__get__, T.H.__get__,  # pyright: ignore[reportAttributeAccessIssue]
    torch.adjoint, T.adjoint, torch.movedim, T.movedim, torch.moveaxis, T.moveaxis,
    T.contiguous, torch.clone, T.clone, T.detach, T.to, T.type_as, T.float, T.half, T.bfloat16, T.cpu, T.cuda,
    torch.squeeze, T.squeeze, torch.unsqueeze, T.unsqueeze, torch.unflatten, T.unflatten,
    T.expand, T.expand_as, torch.broadcast_to, T.broadcast_to, T.repeat, torch.tile, T.tile,
    torch.repeat_interleave, T.repeat_interleave,
    T.__getitem__, torch.select, T.select, torch.narrow, T.narrow, torch.chunk, T.chunk, torch.split, T.split,
    torch.split_with_sizes, T.split_with_sizes, torch.tensor_split, T.tensor_split, torch.unbind, T.unbind, T.unfold,
    torch.index_select, T.index_select, torch.gather, T.gather, torch.take_along_dim, T.take_along_dim,
    torch.roll, T.roll, torch.flip, T.flip, torch.rot90, T.rot90,
    torch.tril, T.tril, torch.triu, T.triu, F.unfold,
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d,
    F.max_pool1d, F.max_pool2d, F.max_pool3d, torch.max_pool1d, torch.max_pool2d, torch.max_pool3d,
    F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d,
    F.pixel_shuffle, F.pixel_unshuffle, F.channel_shuffle,
}  # fmt: skip
SHAPED_ALIKE = {torch.full_like, torch.zeros_like, torch.ones_like, T.new_full, T.new_zeros, T.new_ones}
"""Take from their operand its shape and type, and none of its values."""
MADE_ALIKE = {T.to, T.type_as, T.expand_as, T.view_as, T.reshape_as}
"""Take the values of their first operand, and no other's."""
FILLS = {torch.masked_fill, T.masked_fill}
MAKES_NONNEGATIVE = {
    F.relu, F.relu_, torch.relu, torch.relu_, T.relu, T.relu_, F.relu6, torch.sigmoid, T.sigmoid, F.sigmoid, F.softmax,
    torch.softmax, T.softmax,
    F.hardsigmoid, torch.exp, T.exp, torch.abs, T.abs, torch.square, T.square, F.softplus,
}  # fmt: skip
CLAMPS = {torch.clamp, T.clamp, T.clamp_, torch.clip, T.clip, torch.clamp_min, T.clamp_min, T.clamp_min_, F.hardtanh}
OTHERS_THAT_COMPUTE = {
    F.embedding: "embedding", F.bilinear: "bilinear", F.multi_head_attention_forward: "attention",
}  # fmt: skip
"""Functions with arithmetic or weights that are no sites."""

FUNCTIONS: dict[Any, Function] = dict(_table())
ADD, MULTIPLY, JOINS = ({f for f, known in FUNCTIONS.items() if known.kind == kind} for kind in ("add", "mul", "cat"))
KINDS = tuple(dict.fromkeys(f.kind for f in FUNCTIONS.values()))
WEIGHTED = tuple(kind for kind in KINDS if kind.startswith(("linear", "conv", EXPERTS)))
"""Kinds that are layers without a module: sites only with a parameter as weight."""
PRODUCT_KINDS = (*WEIGHTED, "matmul", "einsum", "attention")
"""Kinds that multiply and accumulate."""
ELEMENTWISE = ("add", "sub", "mul")
"""Kinds whose operands are alike: one that is a parameter has a grid as any other tensor."""
PROBABILITIES = "probabilities"
"""Kind of the second product's left operand in an attention site, a place of its own below it."""
KV_CACHE = "kv_cache"
"""Kind of the keys and values of an attention site: a place below it, too, which takes them from the site itself."""


def positional(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Moves operands given by name (`input=`, `other=`) to their positions."""
    for position, name in enumerate(("input", "other")):
        if len(args) == position and name in kwargs:
            args, kwargs = (*args, kwargs[name]), {k: v for k, v in kwargs.items() if k != name}
    return args, kwargs


def site_function(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Function | None:
    """The entry of a call that is a functional site.

    A mean of four dimensions counts as pooling of an image `[N, C, H, W]`; whether it is over H and W is not asked
    here. A linear layer or a convolution counts if its weight is a parameter, as it is.

    Args:
        function: The function as a `TorchFunctionMode` sees it.
        args, kwargs: Arguments of the call.
    """
    known = FUNCTIONS.get(function)
    operands = None if known is None else known.operands(args, kwargs)
    if known is None or operands is None or (function in MEAN and operands[0].ndim != 4):
        return None
    weight = operands[-1] if known.kind != EXPERTS or operands[1]._base is None else operands[1]._base
    return None if known.kind in WEIGHTED and not isinstance(weight, nn.Parameter) else known


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def keeps_values(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether every value of the output is a value of the first input, or zero (which every grid holds)."""
    if function in (F.pad, torch.constant_pad_nd):
        mode = kwargs.get("mode", args[2] if len(args) > 2 and isinstance(args[2], str) else "constant")
        value = kwargs.get("value", args[3] if len(args) > 3 else None)
        return mode != "constant" or not value
    if function in FILLS:
        value = kwargs.get("value", args[2] if len(args) > 2 else None)
        return isinstance(value, int | float) and value == 0
    return function in KEEPS_VALUES


def is_nonnegative(
    function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], known: Callable[[Tensor], bool]
) -> bool:
    """Whether every value of the output is >= 0, whatever the inputs, or because `known` says so of them."""

    def all_nonnegative(operands: Any) -> bool:
        return all(known(a) if isinstance(a, Tensor) else isinstance(a, int | float) and a >= 0 for a in operands)

    if function in CLAMPS:
        bound = kwargs.get("min", kwargs.get("min_val", args[1] if len(args) > 1 else None))
        return isinstance(bound, int | float) and bound >= 0
    if function in ADD | MULTIPLY:
        return all_nonnegative((*args[:2], kwargs.get("alpha", 1)))
    if function in POOL | MEAN or (function is F.interpolate and kwargs.get("mode") != "bicubic"):  # cubics overshoot
        return all_nonnegative(args[:1])
    if function in JOINS:
        return all_nonnegative(flat(args[:1] or (kwargs.get("tensors"),)))
    return function in MAKES_NONNEGATIVE


def flat(values: Any) -> Iterator[Any]:
    """The members of nested lists, tuples and dicts."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from flat(value)
        elif isinstance(value, dict):
            yield from flat(value.values())
        else:
            yield value


def first_tensor(output: Any) -> Tensor | None:
    """The first float tensor in nested containers."""
    return next((o for o in flat((output,)) if _is_float(o)), None)
