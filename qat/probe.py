"""One recorded forward pass: which layers run in which order, which tensor each reads, and what happens to tensors in
between.

Nothing is traced symbolically: a `TorchFunctionMode` and global module hooks watch one real batch go by. A tensor is
identified by object and version, so that in-place operations make a new one. The recording answers the questions that
insertion has:

    who reads the same tensor?        `root` follows operations that change no value (reshape, max-pool, slice, zero
    padding, dropout) is it known to be >= 0?           after ReLU and the like, and what keeps that (pooling,
    concatenation, the sum of two such) which BatchNorm follows a conv?   it reads the conv's output, and nobody else
    does
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from qat.functions import COMPUTES, first_tensor, flat, is_nonnegative, keeps_values, positional, site_kind
from qat.modes import evaluating, without_fast_path

Key = tuple[int, int]
"""A tensor at a moment: (id, version)."""


@dataclass
class Call:
    """One call of a module or a function.

    Attributes:
        name: Path of the module, or of the module whose forward called the function.
        what: The module, or the function.
        inputs: Float tensors among the arguments, in order (keyword arguments last).
        output: The first float tensor that came out.
        shape: Shape of that output.
        input_shape: Shape of the first operand.
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
    """What one pass did; see the module's docstring.

    Attributes:
        modules, functions, order: Calls of layers, of functions that are sites or compute, and both, as they came.
        source: For a tensor that only rearranges another's values, that other.
        nonnegative: Tensors known to be >= 0.
        readers: How often each tensor was read.
        passes: For each forward that ended: the module, how many sites of each kind it ran, and whether it was inside
            the root's.
    """

    modules: list[Call] = field(default_factory=list)
    functions: list[Call] = field(default_factory=list)
    source: dict[Key, Key] = field(default_factory=dict)
    nonnegative: set[Key] = field(default_factory=set)
    readers: dict[Key, int] = field(default_factory=dict)
    order: list[Call] = field(default_factory=list)
    passes: list[tuple[str, dict[str, int], bool]] = field(default_factory=list)

    def restrict_to_forward(self) -> None:
        """Forgets what ran outside the root's forward (losses, metrics), if the root was called at all."""
        if any(call.inside for call in self.order):
            self.modules, self.functions, self.order = (
                [c for c in calls if c.inside] for calls in (self.modules, self.functions, self.order)
            )
            self.passes = [p for p in self.passes if p[2]]

    def root(self, key: Key) -> Key:
        """The tensor that `key` holds the values of."""
        while key in self.source:
            key = self.source[key]
        return key

    def read(self, keys: Iterable[Key]) -> None:
        for key in keys:
            self.readers[key] = self.readers.get(key, 0) + 1

    def site_counts(self) -> dict[str, list[dict[str, int]]]:
        """The numbers of sites of each kind that forwards of a module ran: one entry, or several if its forwards
        differ.
        """
        counts: dict[str, list[dict[str, int]]] = {}
        for owner, seen, _ in self.passes:
            found = counts.setdefault(owner, [])
            if seen not in found:
                found.append(seen)
        return {owner: found for owner, found in counts.items() if any(found)}


@dataclass
class _Frame:
    """One running forward of a module, and how many sites of each kind it has come to."""

    module: nn.Module
    is_leaf: bool
    seen: dict[str, int] = field(default_factory=dict)


class _Recorder(TorchFunctionMode):
    """Writes a `Recording` of one pass; `leaves` are the modules whose inside is nobody's business."""

    def __init__(self, root: nn.Module, is_leaf: Callable[[nn.Module], bool], inside_of: "InsideOf | None") -> None:
        super().__init__()
        # By id: metrics hash by their state, which changes.
        self.names = {id(module): name for name, module in root.named_modules() if not _is_metric(module)}
        self.root = root
        self.is_leaf = is_leaf
        self.inside_of = inside_of
        self.recording = Recording()
        self.stack: list[_Frame] = []
        self.alive: list[Any] = []  # ids are unique only among living objects

    @property
    def in_leaf(self) -> bool:
        return any(frame.is_leaf for frame in self.stack)

    @property
    def inside(self) -> bool:
        return any(frame.module is self.root for frame in self.stack)

    def key(self, value: Tensor) -> Key:
        self.alive.append(value)
        # A tensor that was made in inference mode (a metric's state, say) has no version.
        return id(value), 0 if value.is_inference() else value._version

    def keys(self, values: Any) -> list[Key]:
        return [self.key(v) for v in values if isinstance(v, Tensor) and not is_lazy(v) and v.is_floating_point()]

    def fresh(self, nonnegative: bool = False) -> Key:
        """A name for a tensor inside a leaf."""
        key = self.key(torch.empty(0))
        if nonnegative:
            self.recording.nonnegative.add(key)
        return key

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.stack.append(_Frame(module, self.is_leaf(module)))

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        recording, inside, frame = self.recording, self.inside, self.stack.pop()
        if module is self.root:  # who called it reads what it returns
            recording.read(self.keys(flat((output,))))
        if not frame.is_leaf:
            recording.passes.append((self.names[id(module)], frame.seen, inside))
        elif not self.in_leaf:
            for call in self._calls_of(module, args, kwargs, output):
                call.inside = inside
                (recording.modules if isinstance(call.what, nn.Module) else recording.functions).append(call)
                recording.order.append(call)
                recording.read(call.inputs)

    def _calls_of(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> list[Call]:
        name = self.names[id(module)]
        if self.inside_of and (calls := self.inside_of(module, name, self, args, kwargs)) is not None:
            return calls
        inputs = [a for a in flat((*args, *kwargs.values())) if isinstance(a, Tensor)]
        call = Call(name, module, self.keys((*args, *kwargs.values())), None)
        call.input_shape = tuple(inputs[0].shape) if inputs else ()
        if (tensor := first_tensor(output)) is not None:
            call.output, call.shape = self.key(tensor), tuple(tensor.shape)
        return [call]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = positional(args, kwargs or {})
        operands = [a for a in flat((*args, *kwargs.values())) if isinstance(a, Tensor)]
        inputs = self.keys(operands)
        nonnegative = is_nonnegative(func, args, kwargs, self._is_known_nonnegative)  # before it may run in place
        output = func(*args, **kwargs)
        outputs = self.keys(flat((output,)))
        if inputs and outputs:
            if keeps_values(func, args, kwargs):
                self.recording.source.update((o, inputs[0]) for o in outputs if o != inputs[0])
            elif nonnegative:
                self.recording.nonnegative.update(outputs)
            if self.stack and not self.in_leaf:
                self.recording.read(dict.fromkeys(inputs))
                self._note_call(func, args, operands, inputs, outputs[0], first_tensor(output))
        return output

    def _is_known_nonnegative(self, value: Tensor) -> bool:
        return value.is_floating_point() and self.recording.root(self.key(value)) in self.recording.nonnegative

    def _note_call(
        self, func: Any, args: Any, operands: list[Tensor], inputs: list[Key], output: Key, tensor: Tensor | None
    ) -> None:
        frame, kind = self.stack[-1], site_kind(func, args)
        if kind is None and func not in COMPUTES:
            return
        name = self.names[id(frame.module)]
        call = Call(name, func, inputs, output, kind=kind, inside=self.inside)
        call.parameter = any(isinstance(a, nn.Parameter) for a in operands)
        call.shape, call.input_shape = tuple(tensor.shape) if tensor is not None else (), tuple(operands[0].shape)
        if kind is not None:
            index = frame.seen.get(kind, 0)
            frame.seen[kind] = index + 1
            call.site = f"{name}.{kind}_{index}".removeprefix(".")
        self.recording.functions.append(call)
        self.recording.order.append(call)


def _is_metric(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torchmetrics")


@contextmanager
def _hooks(recorder: _Recorder, model: nn.Module) -> Iterator[None]:
    """The innermost hooks of every module, so that the user's own run outside, as they will around a twin's forward."""
    handles = []
    for module in model.modules():
        if id(module) in recorder.names:
            handles.append(module.register_forward_pre_hook(recorder.before))
            handles.append(module.register_forward_hook(recorder.after, prepend=True, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


InsideOf = Callable[[nn.Module, str, _Recorder, tuple[Any, ...], dict[str, Any]], list[Call] | None]
"""What one call of a leaf (at a path, with arguments) stands for, if it is several."""


def record(
    model: nn.Module,
    run: Callable[[], Any],
    is_leaf: Callable[[nn.Module], bool],
    inside_of: InsideOf | None = None,
) -> Recording:
    """Runs `run()`, which calls `model` in its own way on one batch, and reports what happened. Nothing is changed.

    Args:
        model: The root; module paths are relative to it.
        run: Performs the pass. It runs in evaluation mode without gradients.
        is_leaf: Which modules count as one operation.
        inside_of: Which of them count as several after all.
    """
    recorder = _Recorder(model, is_leaf, inside_of)
    # Tensors made in inference mode have no version to tell them apart by.
    unobserved = evaluating(model), without_fast_path(), torch.inference_mode(False), torch.no_grad()
    with ExitStack() as stack:
        for context in (*unobserved, _hooks(recorder, model), recorder):
            stack.enter_context(context)
        run()
    recorder.recording.restrict_to_forward()
    return recorder.recording


def macs(call: Call) -> int:
    """Multiply-accumulates of one call of a layer for one sample: elements of the output times the fan-in of each (of
    a transposed convolution: elements of the input times what each is spread over).
    """
    weight = getattr(call.what, "weight", None)
    if not isinstance(weight, Tensor) or isinstance(call.what, nn.Embedding | nn.EmbeddingBag) or weight.ndim < 2:
        return 0
    spreads = isinstance(call.what, nn.modules.conv._ConvTransposeNd)
    return math.prod((call.input_shape if spreads else call.shape)[1:]) * math.prod(weight.shape[1:])
