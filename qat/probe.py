"""One recorded forward pass: which layers run in which order, which tensor each reads, and what happens to tensors in between.

Nothing is traced symbolically: a `TorchFunctionMode` and global module hooks watch one real batch go by. A tensor is identified by object and
version, so that in-place operations make a new one. The recording answers the questions that insertion has:

    who reads the same tensor?        `root` follows operations that change no value (reshape, max-pool, slice, zero padding, dropout)
    is it known to be >= 0?           after ReLU and the like, and what keeps that (pooling, concatenation, the sum of two such)
    which BatchNorm follows a conv?   it reads the conv's output, and nobody else does
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.overrides import TorchFunctionMode

from qat.modes import evaluating

Key = tuple[int, int]
"""A tensor at a moment: (id, version)."""

T = torch.Tensor
ADD = {torch.add, T.add, T.add_, T.__add__, T.__radd__, T.__iadd__}
MEAN = {torch.mean, T.mean}
POOL = {
    F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d,
}  # fmt: skip
KEEPS_VALUES = {
    torch.flatten, T.flatten, torch.reshape, T.reshape, T.view, torch.permute, T.permute, torch.transpose, T.transpose, T.contiguous,
    torch.squeeze, T.squeeze, torch.unsqueeze, T.unsqueeze, torch.unflatten, T.unflatten, T.__getitem__, T.expand, T.clone, torch.clone, T.detach,
    T.to, T.float, F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.chunk, T.chunk, torch.split, T.split, torch.narrow, T.narrow,
    F.max_pool1d, F.max_pool2d, F.max_pool3d, torch.max_pool1d, torch.max_pool2d, torch.max_pool3d, torch.swapaxes, T.swapaxes, T.mT.__get__, T.T.__get__,
}  # fmt: skip
MAKES_NONNEGATIVE = {
    F.relu, F.relu_, torch.relu, torch.relu_, T.relu, T.relu_, F.relu6, torch.sigmoid, T.sigmoid, F.sigmoid, F.softmax, torch.softmax, T.softmax,
    F.hardsigmoid, torch.exp, T.exp, torch.abs, T.abs, torch.square, T.square, F.softplus,
}  # fmt: skip
KEEPS_SIGN = POOL | MEAN | ADD | {torch.cat, torch.concat, torch.mul, T.mul, T.__mul__, torch.stack, F.interpolate}
COMPUTES = {
    F.linear: "linear", F.conv1d: "conv1d", F.conv2d: "conv2d", F.conv3d: "conv3d", torch.conv1d: "conv1d", torch.conv2d: "conv2d",
    F.conv_transpose1d: "conv_transpose1d", F.conv_transpose2d: "conv_transpose2d", F.conv_transpose3d: "conv_transpose3d",
    torch.matmul: "matmul", T.matmul: "matmul", T.__matmul__: "matmul", T.__rmatmul__: "matmul", torch.bmm: "bmm", T.bmm: "bmm", torch.mm: "mm", T.mm: "mm",
    torch.addmm: "addmm", torch.baddbmm: "baddbmm", torch.einsum: "einsum", F.embedding: "embedding", F.bilinear: "bilinear",
    F.scaled_dot_product_attention: "attention", F.multi_head_attention_forward: "attention",
}  # fmt: skip


def site_kind(function: Any, args: tuple[Any, ...]) -> str | None:
    """The kind of functional site that a call is: `add` of two float tensors, `avg_pool` of one; `None` if it is no site.

    A mean counts as pooling when it averages an image `[N, C, H, W]` over its last two axes; the caller's keyword arguments don't matter to the
    grid. Recording and running ask this same function, so that both count alike.
    """
    if function in ADD and len(args) >= 2 and all(isinstance(a, Tensor) and a.is_floating_point() for a in args[:2]):
        return "add"
    if function in POOL or (function in MEAN and args and isinstance(args[0], Tensor) and args[0].ndim == 4):
        return "avg_pool"
    return None


@dataclass
class Call:
    """One call of a module or a function.

    Attributes:
        name: Path of the module, or of the module whose forward called the function.
        what: The module, or the function.
        inputs: Float tensors among the positional arguments, in order (for functions also keyword arguments).
        output: The first float tensor that came out.
        shape: Shape of that output.
        input_shape: Shape of the first operand (functions only).
        site: `owner.kind_index` if this is a functional site.
        parameter: Whether an operand is a parameter.
        inside: Whether it happened inside the root's own forward.
    """

    name: str
    what: Any
    inputs: list[Key]
    output: Key | None
    shape: tuple[int, ...] = ()
    input_shape: tuple[int, ...] = ()
    site: str | None = None
    kind: str | None = None
    parameter: bool = False
    inside: bool = False


@dataclass
class Recording:
    """What one pass did; see the module's docstring."""

    modules: list[Call] = field(default_factory=list)
    functions: list[Call] = field(default_factory=list)
    source: dict[Key, Key] = field(default_factory=dict)
    nonnegative: set[Key] = field(default_factory=set)
    readers: dict[Key, int] = field(default_factory=dict)
    order: list[Call] = field(default_factory=list)

    def restrict_to_forward(self) -> None:
        """Forgets what ran outside the root's forward (losses, metrics), if the root was called at all."""
        if any(call.inside for call in self.order):
            self.modules, self.functions, self.order = (
                [c for c in calls if c.inside] for calls in (self.modules, self.functions, self.order)
            )

    def root(self, key: Key) -> Key:
        """The tensor that `key` holds the values of."""
        while key in self.source:
            key = self.source[key]
        return key

    def site_counts(self) -> dict[str, dict[str, int]]:
        """How many sites of each kind the forward of each module runs, for those that run any."""
        counts: dict[str, dict[str, int]] = {}
        for call in self.functions:
            if call.kind:
                owner = counts.setdefault(call.name, {})
                owner[call.kind] = owner.get(call.kind, 0) + 1
        return counts


class _Recorder(TorchFunctionMode):
    """Writes a `Recording` of one pass; `leaves` are the modules whose inside is nobody's business."""

    def __init__(self, root: nn.Module, is_leaf: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        # By id: metrics hash by their state, which changes.
        self.names = {id(module): name for name, module in root.named_modules() if not _is_metric(module)}
        self.root = root
        self.is_leaf = is_leaf
        self.recording = Recording()
        self.stack: list[nn.Module] = []
        self.pending: list[tuple[nn.Module, list[Key]]] = []
        self.alive: list[Any] = []  # ids are unique only among living objects
        self.counts: dict[tuple[str, str], int] = {}

    def key(self, value: Any) -> Key:
        self.alive.append(value)
        return id(value), value._version

    def keys(self, values: Any) -> list[Key]:
        return [self.key(v) for v in values if isinstance(v, Tensor) and v.is_floating_point()]

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if id(module) in self.names:
            self.stack.append(module)
            self.pending.append((module, self.keys(args)))

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self.pending or self.pending[-1][0] is not module:
            return
        self.stack.pop()
        _, inputs = self.pending.pop()
        tensor = _first_tensor(output)
        if self.is_leaf(module) and not any(self.is_leaf(m) for m in self.stack):
            call = Call(self.names[id(module)], module, inputs, self.key(tensor) if tensor is not None else None)
            call.inside = self.root in self.stack
            call.shape = tuple(tensor.shape) if tensor is not None else ()
            self.recording.modules.append(call)
            self.recording.order.append(call)
            for key in inputs:
                self.recording.readers[key] = self.recording.readers.get(key, 0) + 1

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        operands = [a for a in _flat((*args, *kwargs.values())) if isinstance(a, Tensor)]
        inputs = self.keys(operands)
        output = func(*args, **kwargs)
        outputs = [self.key(o) for o in _flat((output,)) if isinstance(o, Tensor) and o.is_floating_point()]
        if inputs and outputs:
            self.note(func, args, kwargs, operands, inputs, outputs, _first_tensor(output).shape)  # pyright: ignore
        return output

    def note(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        operands: list[Tensor],
        inputs: list[Key],
        outputs: list[Key],
        output_shape: torch.Size,
    ) -> None:
        recording = self.recording
        if keeps_values(func, args, kwargs):
            recording.source.update((o, inputs[0]) for o in outputs if o != inputs[0])
        elif makes_nonnegative(func, args, kwargs):
            recording.nonnegative.update(outputs)
        elif func in KEEPS_SIGN and all(recording.root(k) in recording.nonnegative for k in inputs):
            recording.nonnegative.update(outputs)
        if not self.stack or any(self.is_leaf(m) for m in self.stack):
            return
        for key in dict.fromkeys(inputs):
            recording.readers[key] = recording.readers.get(key, 0) + 1
        name, kind = self.names[id(self.stack[-1])], site_kind(func, args)
        if kind is None and func not in COMPUTES:
            return
        call = Call(
            name, func, inputs, outputs[0], kind=kind, parameter=any(isinstance(a, nn.Parameter) for a in operands)
        )
        call.shape, call.input_shape = tuple(output_shape), tuple(operands[0].shape)
        call.inside = self.root in self.stack
        if kind is not None:
            index = self.counts.get((name, kind), 0)
            self.counts[name, kind] = index + 1
            call.site = f"{name}.{kind}_{index}" if name else f"{kind}_{index}"
        recording.functions.append(call)
        recording.order.append(call)


def keeps_values(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether every value of the output is a value of the first input, or zero (which every grid holds)."""
    if func in (F.pad, torch.constant_pad_nd):
        mode = kwargs.get("mode", args[2] if len(args) > 2 and isinstance(args[2], str) else "constant")
        value = kwargs.get("value", args[3] if len(args) > 3 else None)
        return mode != "constant" or not value
    return func in KEEPS_VALUES


def makes_nonnegative(func: Any, args: Any, kwargs: Any) -> bool:
    if func in (torch.clamp, T.clamp, T.clamp_, torch.clip, T.clip, F.hardtanh):
        bound = kwargs.get("min", kwargs.get("min_val", args[1] if len(args) > 1 else None))
        return isinstance(bound, int | float) and bound >= 0
    return func in MAKES_NONNEGATIVE


def _is_metric(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torchmetrics")


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flat(value)
        elif isinstance(value, dict):
            yield from _flat(value.values())
        else:
            yield value


def _first_tensor(output: Any) -> Tensor | None:
    return next((o for o in _flat((output,)) if isinstance(o, Tensor) and o.is_floating_point()), None)


@contextmanager
def _global_hooks(recorder: _Recorder) -> Iterator[None]:
    handles = [
        module_hooks.register_module_forward_pre_hook(recorder.before),
        module_hooks.register_module_forward_hook(recorder.after),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def record(model: nn.Module, run: Callable[[], Any], is_leaf: Callable[[nn.Module], bool]) -> Recording:
    """Runs `run()`, which calls `model` in its own way on one batch, and reports what happened. Nothing is changed.

    Args:
        model: The root; module paths are relative to it.
        run: Performs the pass. It runs in evaluation mode without gradients.
        is_leaf: Which modules count as one operation.
    """
    recorder = _Recorder(model, is_leaf)
    # Tensors made in inference mode have no version to tell them apart by.
    with evaluating(model), torch.inference_mode(False), torch.no_grad(), _global_hooks(recorder), recorder:
        run()
    recorder.recording.restrict_to_forward()
    return recorder.recording


def macs(call: Call) -> int:
    """Multiply-accumulates of one call of a layer: elements of the output times the fan-in of each."""
    weight = getattr(call.what, "weight", None)
    if not isinstance(weight, Tensor) or isinstance(call.what, nn.Embedding) or weight.ndim < 2:
        return 0
    return math.prod(call.shape[1:]) * math.prod(weight.shape[1:])
