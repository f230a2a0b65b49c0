"""What is known of torch's functions: which are sites, which change no value, which make or keep values non-negative.

Recording (`qat.probe`) and running (`qat.layers.sites`) ask the same `site_kind` and `positional`, so that both count
alike.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

T = torch.Tensor
ADD = {torch.add, T.add, T.add_, T.__add__, T.__radd__, T.__iadd__}
MEAN = {torch.mean, T.mean}
POOL = {
    F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d,
}  # fmt: skip
KEEPS_VALUES = {
    torch.flatten, T.flatten, torch.reshape, T.reshape, T.view, torch.permute, T.permute, torch.transpose, T.transpose,
    T.contiguous,
    torch.squeeze, T.squeeze, torch.unsqueeze, T.unsqueeze, torch.unflatten, T.unflatten, T.__getitem__, T.expand,
    T.clone, torch.clone, T.detach,
    T.to, T.float, F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.chunk, T.chunk, torch.split, T.split,
    torch.narrow, T.narrow,
    F.max_pool1d, F.max_pool2d, F.max_pool3d, torch.max_pool1d, torch.max_pool2d, torch.max_pool3d,
    F.adaptive_max_pool1d, F.adaptive_max_pool2d,
    F.adaptive_max_pool3d, torch.swapaxes, T.swapaxes, T.mT.__get__, T.T.__get__,  # pyright: ignore[reportAttributeAccessIssue]
    torch.movedim, T.movedim,
    torch.unbind, T.unbind, torch.roll, T.roll,
    torch.flip, T.flip, T.repeat, F.pixel_shuffle, F.pixel_unshuffle,
}  # fmt: skip
MAKES_NONNEGATIVE = {
    F.relu, F.relu_, torch.relu, torch.relu_, T.relu, T.relu_, F.relu6, torch.sigmoid, T.sigmoid, F.sigmoid, F.softmax,
    torch.softmax, T.softmax,
    F.hardsigmoid, torch.exp, T.exp, torch.abs, T.abs, torch.square, T.square, F.softplus,
}  # fmt: skip
CLAMPS = {torch.clamp, T.clamp, T.clamp_, torch.clip, T.clip, torch.clamp_min, T.clamp_min, T.clamp_min_, F.hardtanh}
MULTIPLY = {torch.mul, T.mul, T.mul_, T.__mul__, T.__rmul__, T.__imul__}
JOINS = {torch.cat, torch.concat, torch.stack}
COMPUTES = {
    F.linear: "linear", F.conv1d: "conv1d", F.conv2d: "conv2d", F.conv3d: "conv3d", torch.conv1d: "conv1d",
    torch.conv2d: "conv2d",
    F.conv_transpose1d: "conv_transpose1d", F.conv_transpose2d: "conv_transpose2d",
    F.conv_transpose3d: "conv_transpose3d",
    torch.matmul: "matmul", T.matmul: "matmul", T.__matmul__: "matmul", T.__rmatmul__: "matmul", torch.bmm: "bmm",
    T.bmm: "bmm", torch.mm: "mm", T.mm: "mm",
    torch.addmm: "addmm", torch.baddbmm: "baddbmm", torch.einsum: "einsum", F.embedding: "embedding",
    F.bilinear: "bilinear",
    F.scaled_dot_product_attention: "attention", F.multi_head_attention_forward: "attention",
}  # fmt: skip


def positional(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Moves operands given by name (`input=`, `other=`) to their positions."""
    for position, name in enumerate(("input", "other")):
        if len(args) == position and name in kwargs:
            args, kwargs = (*args, kwargs[name]), {k: v for k, v in kwargs.items() if k != name}
    return args, kwargs


def site_kind(function: Any, args: tuple[Any, ...]) -> str | None:
    """The kind of functional site that a call is: `add` of two float tensors, `avg_pool` of one; `None` if it is no
    site.

    A mean of four dimensions counts as pooling of an image `[N, C, H, W]`; whether it is over H and W is not asked
    here.

    Args:
        function: As a `TorchFunctionMode` sees it.
        args: From `positional`.
    """
    if function in ADD and len(args) >= 2 and all(_is_float(a) for a in args[:2]):
        return "add"
    if args and _is_float(args[0]) and (function in POOL or (function in MEAN and args[0].ndim == 4)):
        return "avg_pool"
    return None


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def keeps_values(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether every value of the output is a value of the first input, or zero (which every grid holds)."""
    if function in (F.pad, torch.constant_pad_nd):
        mode = kwargs.get("mode", args[2] if len(args) > 2 and isinstance(args[2], str) else "constant")
        value = kwargs.get("value", args[3] if len(args) > 3 else None)
        return mode != "constant" or not value
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
