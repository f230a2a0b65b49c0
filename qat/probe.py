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

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qat.functions import (
    FUNCTIONS,
    JOINS,
    OTHERS_THAT_COMPUTE,
    PRODUCTS,
    WEIGHTED,
    first_tensor,
    flat,
    is_nonnegative,
    keeps_values,
    positional,
    site_function,
)  # fmt: skip
from qat.macs import function_macs, layer_macs
from qat.modes import evaluating

FUNCTIONS_THAT_COMPUTE = {
    **{f: known.kind for f, known in FUNCTIONS.items() if known.kind in PRODUCTS},
    **OTHERS_THAT_COMPUTE,
}
"""Their kinds: what an audit lists even where it is no site."""
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
        input_shape: Shape of the first operand (functions only).
        operands: What a quantizer may be put on: the first input of a layer, the operands of a site (or its output).
        macs: Multiply-accumulates of each product in it, over the whole batch.
        site: `owner.kind_index` if this is a functional site.
        kind: Of a functional site, or of a function that computes.
        parameter: Path of the parameter among the operands.
        weight: Whether that is the second operand of a product, with an axis of output channels.
        inside: Whether it happened inside the root's own forward.
    """

    name: str
    what: Any
    inputs: list[Key]
    output: Key | None
    shape: tuple[int, ...] = ()
    input_shape: tuple[int, ...] = ()
    operands: list[Key] = field(default_factory=list)
    macs: list[int] = field(default_factory=list)
    site: str | None = None
    kind: str | None = None
    parameter: str | None = None
    weight: bool = False
    inside: bool = False


@dataclass
class Recording:
    """What one pass did; see the module's docstring.

    Attributes:
        modules, functions, order: Calls of layers, of functions that are sites or compute, and both, as they came.
        source: For a tensor that only rearranges another's values, that other.
        nonnegative: Tensors known to be >= 0.
        readers: How often each tensor was read.
        joins: For each concatenation, its output and what it joins.
        passes: For each forward that ended: the module, the kinds of the sites it ran in their order, and whether it
            was inside the root's.
        samples: Size of the batch: the first axis of the first tensor that the root (or else a layer) was given.
    """

    modules: list[Call] = field(default_factory=list)
    functions: list[Call] = field(default_factory=list)
    source: dict[Key, Key] = field(default_factory=dict)
    nonnegative: set[Key] = field(default_factory=set)
    readers: dict[Key, int] = field(default_factory=dict)
    order: list[Call] = field(default_factory=list)
    joins: list[tuple[Key, list[Key]]] = field(default_factory=list)
    passes: list[tuple[str, list[str], bool]] = field(default_factory=list)
    samples: int = 1

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

    def only_sites_read(self, parameter: str) -> bool:
        """Whether every function that took a parameter took it as the weight of a site."""
        calls = [c for c in self.functions if c.weight and c.parameter == parameter]
        return self.readers.get(calls[0].operands[1], 0) == len(calls)

    def site_orders(self) -> dict[str, list[list[str]]]:
        """The kinds of the sites that forwards of a module ran: one list, or several if its forwards differ."""
        orders: dict[str, list[list[str]]] = {}
        for owner, seen, _ in self.passes:
            found = orders.setdefault(owner, [])
            if seen not in found:
                found.append(seen)
        return {owner: found for owner, found in orders.items() if any(found)}


@dataclass
class _Frame:
    """One running forward of a module, and the kinds of the sites that it has come to."""

    module: nn.Module
    is_leaf: bool
    seen: list[str] = field(default_factory=list)


class _Recorder(TorchFunctionMode):
    """Writes a `Recording` of one pass; `leaves` are the modules whose inside is nobody's business."""

    def __init__(self, root: nn.Module, is_leaf: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        # By id: metrics hash by their state, which changes.
        self.names = {id(module): name for name, module in root.named_modules() if not _is_metric(module)}
        self.parameters = {id(parameter): name for name, parameter in root.named_parameters()}
        self.root = root
        self.is_leaf = is_leaf
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
        return [self.key(v) for v in values if isinstance(v, Tensor) and v.is_floating_point()]

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.stack.append(_Frame(module, self.is_leaf(module)))
        if module is self.root or (not self.inside and self.recording.samples == 1):
            sizes = (len(v) for v in flat((*args, *kwargs.values())) if isinstance(v, Tensor) and v.ndim)
            self.recording.samples = max(1, next(sizes, 1))

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        recording, inside = self.recording, self.inside
        count = [layer_macs(module, tuple(y.shape)) if (y := first_tensor(output)) is not None else 0]
        frame = self.stack.pop()  # not before: a weight that is computed is computed inside the layer
        if module is self.root:  # who called it reads what it returns
            recording.read(self.keys(flat((output,))))
        if not frame.is_leaf:
            recording.passes.append((self.names[id(module)], frame.seen, inside))
        elif not self.in_leaf:
            tensor = first_tensor(output)
            call = Call(self.names[id(module)], module, self.keys((*args, *kwargs.values())), None, inside=inside)
            if tensor is not None:
                call.output, call.shape = self.key(tensor), tuple(tensor.shape)
            call.operands, call.macs = call.inputs[:1], count
            recording.modules.append(call)
            recording.order.append(call)
            recording.read(call.inputs)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = positional(args, kwargs or {})
        operands = [a for a in flat((*args, *kwargs.values())) if isinstance(a, Tensor)]
        inputs = self.keys(operands)
        nonnegative = is_nonnegative(func, args, kwargs, self._is_known_nonnegative)  # before it may run in place
        site = site_function(func, args, kwargs)
        through = self.keys((site and site.operands(args, kwargs)) or ())
        output = func(*args, **kwargs)
        outputs = self.keys(flat((output,)))
        if self.in_leaf and site is not None:
            self.stack[-1].seen.append(site.kind)  # so that parts of a layer without a twin answer for themselves
        if inputs and outputs:
            if keeps_values(func, args, kwargs):
                self.recording.source.update((o, inputs[0]) for o in outputs if o != inputs[0])
            elif nonnegative:
                self.recording.nonnegative.update(outputs)
            if func in JOINS:
                self.recording.joins.append((outputs[0], inputs))
            if self.stack and not self.in_leaf:
                self.recording.read(dict.fromkeys(inputs))
                if site is not None or func in FUNCTIONS_THAT_COMPUTE:
                    self._note_call(func, args, kwargs, Call(self._here, func, inputs, None, operands=through), output)
        return output

    def _is_known_nonnegative(self, value: Tensor) -> bool:
        return value.is_floating_point() and self.recording.root(self.key(value)) in self.recording.nonnegative

    @property
    def _here(self) -> str:
        return self.names[id(self.stack[-1].module)]

    def _note_call(self, func: Any, args: Any, kwargs: Any, call: Call, output: Any) -> None:
        frame, site, result = self.stack[-1], site_function(func, args, kwargs), first_tensor(output)
        call.inside, call.macs = self.inside, function_macs(func, args, kwargs, output)
        if result is not None:
            call.output, call.shape = self.key(result), tuple(result.shape)
        call.kind = site.kind if site else FUNCTIONS_THAT_COMPUTE[func]
        operands = [a for a in flat((*args, *kwargs.values())) if isinstance(a, Tensor)]
        operands = (site and site.operands(args, kwargs)) or operands
        call.input_shape = tuple(operands[0].shape)
        held = [self.parameters.get(id(a)) for a in operands]
        call.parameter = next((p for p in held if p is not None), None)
        if site is not None and (site.kind not in WEIGHTED or held[1] is not None):
            call.weight = site.channel_axis is not None and held[0] is None and held[1] is not None
            call.operands = [call.output] if site.output and call.output else call.operands
            call.site = f"{call.name}.{site.kind}_{frame.seen.count(site.kind)}".removeprefix(".")
            frame.seen.append(site.kind)
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
            handles.append(module.register_forward_pre_hook(recorder.before, with_kwargs=True))
            handles.append(module.register_forward_hook(recorder.after, prepend=True, with_kwargs=True))
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
    with evaluating(model), torch.inference_mode(False), torch.no_grad(), _hooks(recorder, model), recorder:
        run()
    recorder.recording.restrict_to_forward()
    return recorder.recording
