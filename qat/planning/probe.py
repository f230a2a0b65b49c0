"""One recorded forward pass: which layers run in which order, which tensor each reads, and what happens to tensors in
between.

Nothing is traced symbolically: a `TorchFunctionMode` and global module hooks watch one real batch go by. A tensor is
identified by object and version, so that in-place operations make a new one. The recording answers the questions that
insertion has:

    who reads the same tensor?        `root` follows operations that change no value (reshape, max-pool, slice,
                                      zero padding, dropout)
    is it known to be >= 0?           after ReLU and the like, and what keeps that (pooling, concatenation, the sum
                                      of two such)
    which BatchNorm follows a conv?   it reads the conv's output, and nobody else does
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from qat.layers.experts import is_experts
from qat.modes import evaluating, without_fast_path
from qat.planning.addressable import inside_of, is_leaf
from qat.planning.functions import (
    EXPERTS,
    FUNCTIONS,
    JOINS,
    MADE_ALIKE,
    OTHERS_THAT_COMPUTE,
    PRODUCT_KINDS,
    SHAPED_ALIKE,
    WEIGHTED,
    Function,
    first_tensor,
    flat,
    is_nonnegative,
    keeps_values,
    positional,
    site_function,
)  # fmt: skip
from qat.planning.macs import function_macs, layer_macs
from qat.planning.recording import Call, Key, Recording

DRAWS = {torch.rand, torch.randn, torch.randint, torch.randperm, torch.normal, torch.bernoulli}
"""Random numbers are data, though computed from none."""
FUNCTIONS_THAT_COMPUTE = {
    **{f: known.kind for f, known in FUNCTIONS.items() if known.kind in PRODUCT_KINDS},
    **OTHERS_THAT_COMPUTE,
}
"""Their kinds: what an audit lists even where it is no site."""


@dataclass
class _Frame:
    """One running forward of a module, and the kinds of the sites that it has come to."""

    module: nn.Module
    is_leaf: bool
    seen: list[str] = field(default_factory=list)


class _Recorder(TorchFunctionMode):
    """Writes a `Recording` of one pass; the inside of leaves is nobody's business."""

    def __init__(self, root: nn.Module, parts: bool) -> None:
        super().__init__()
        self.alive: list[Any] = []  # ids are unique only among living objects
        self.recording = Recording()
        # By id: metrics hash by their state, which changes.
        self.names = {id(module): name for name, module in root.named_modules() if not _is_metric(module)}
        self.parameters = {id(parameter): name for name, parameter in root.named_parameters()}
        # What is computed from no data; keys of tensors of any type.
        self.constants = {self.key(t) for t in (*root.parameters(), *root.buffers()) if not is_lazy(t)}
        self.root = root
        self.parts = parts
        self.stack: list[_Frame] = []

    @property
    def in_leaf(self) -> bool:
        return any(frame.is_leaf for frame in self.stack)

    @property
    def inside(self) -> bool:
        return any(frame.module is self.root for frame in self.stack)

    def key(self, value: Tensor) -> Key:
        self.alive.append(value)
        # A tensor that was made in inference mode (a metric's state, say) has no version.
        key = id(value), 0 if value.is_inference() else value._version
        self.recording.shapes[key] = tuple(value.shape)
        return key

    def keys(self, values: Any) -> list[Key]:
        found = [v for v in values if isinstance(v, Tensor) and not is_lazy(v) and v.is_floating_point()]
        self.recording.empty.update(self.key(v) for v in found if not v.numel())
        return [self.key(v) for v in found]

    def fresh(self, nonnegative: bool = False) -> Key:
        """A name for a tensor inside a leaf."""
        key = self.key(torch.empty(0))
        if nonnegative:
            self.recording.nonnegative.add(key)
        return key

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.stack.append(_Frame(module, is_leaf(module)))
        if module is self.root or (not self.inside and self.recording.samples == 1):
            sizes = (len(v) for v in flat((*args, *kwargs.values())) if isinstance(v, Tensor) and v.ndim)
            self.recording.samples = max(1, next(sizes, 1))

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        recording, inside, frame = self.recording, self.inside, self.stack[-1]
        nested = any(outer.is_leaf for outer in self.stack[:-1])
        # The frame is still there: a weight that is computed is computed inside the layer.
        calls = self._calls_of(module, args, kwargs, output) if frame.is_leaf and not nested else []
        self.stack.pop()
        if module is self.root:  # who called it reads what it returns
            recording.read(self.keys(flat((output,))))
        if not frame.is_leaf:
            recording.passes.append((self.names[id(module)], frame.seen, inside))
        for call in calls:
            call.inside = inside
            (recording.modules if isinstance(call.what, nn.Module) else recording.functions).append(call)
            recording.order.append(call)
            recording.read(call.inputs)

    def _calls_of(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> list[Call]:
        name = self.names[id(module)]
        if self.parts and (calls := inside_of(module, name, self, args, kwargs)) is not None:
            return calls
        inputs = [a for a in flat((*args, *kwargs.values())) if isinstance(a, Tensor)]
        call = Call(name, module, self.keys((*args, *kwargs.values())))
        call.input_shape = tuple(inputs[0].shape) if inputs else ()
        if (tensor := first_tensor(output)) is not None:
            call.output, call.shape = self.key(tensor), tuple(tensor.shape)
            call.macs = [layer_macs(module, call.shape, call.input_shape)]
        return [call]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = positional(args, kwargs or {})
        tensors = [a for a in flat((*args, *kwargs.values())) if isinstance(a, Tensor)]
        inputs = self.keys(tensors)
        nonnegative = is_nonnegative(func, args, kwargs, self._is_known_nonnegative)  # before it may run in place
        site = site_function(func, args, kwargs)
        operands = site and site.operands(args, kwargs)
        through = self.keys(operands or ())
        valued = [] if func in SHAPED_ALIKE else tensors[:1] if func in MADE_ALIKE else tensors
        constant = func not in DRAWS and all(not is_lazy(o) and self.key(o) in self.constants for o in valued)
        output = func(*args, **kwargs)
        if constant:
            self.constants.update(self.key(o) for o in flat((output,)) if isinstance(o, Tensor))
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
                filled = [key for key in inputs if key not in self.recording.empty]
                if len(filled) == 1 < len(inputs):
                    self.recording.source[outputs[0]] = filled[0]
            if self.stack and not self.in_leaf:
                self.recording.read(dict.fromkeys(inputs))
                if site is not None or func in FUNCTIONS_THAT_COMPUTE:
                    call = Call(self._here, func, inputs, operands=through, constant=constant)
                    call.macs = function_macs(func, args, kwargs, output)
                    self._note_call(call, site, operands or tensors, first_tensor(output))
        return output

    def _is_known_nonnegative(self, value: Tensor) -> bool:
        return value.is_floating_point() and self.recording.root(self.key(value)) in self.recording.nonnegative

    @property
    def _here(self) -> str:
        return self.names[id(self.stack[-1].module)]

    def _note_call(self, call: Call, site: Function | None, operands: list[Tensor], result: Tensor | None) -> None:
        frame = self.stack[-1]
        call.inside = self.inside
        if result is not None:
            call.output, call.shape = self.key(result), tuple(result.shape)
        call.kind = site.kind if site else FUNCTIONS_THAT_COMPUTE[call.what]
        call.input_shape = tuple(operands[0].shape)
        paths = [self.parameters.get(id(a)) for a in operands]
        if call.kind == EXPERTS and site is not None and is_experts(frame.module):
            paths[1] = self.parameters.get(self.recording.root(call.operands[1])[0])
        call.parameter_paths = paths
        call.vector = any(
            p is not None and max((*a.shape, 1)) == a.numel() for p, a in zip(paths, operands, strict=True)
        )
        if site is not None and (site.kind not in WEIGHTED or paths[1] is not None):
            second = site.channel_axis is not None and paths[0] is None and paths[1] is not None
            call.weight = second and operands[1].ndim > 1  # a vector has no output channels
            call.infinite = not call.weight and any(
                key in self.constants and bool(o.isinf().any()) for key, o in zip(call.operands, operands, strict=True)
            )
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
    with ExitStack() as hooks:
        for module in model.modules():
            if id(module) in recorder.names:
                hooks.enter_context(module.register_forward_pre_hook(recorder.before, with_kwargs=True))
                hooks.enter_context(module.register_forward_hook(recorder.after, prepend=True, with_kwargs=True))
        yield


def record(model: nn.Module, run: Callable[[], Any], parts: bool = True) -> Recording:
    """Runs `run()`, which calls `model` in its own way on one batch, and reports what happened. Nothing is changed.

    Args:
        model: The root; module paths are relative to it.
        run: Performs the pass. It runs in evaluation mode without gradients.
        parts: Whether the call of a layer with several weights counts as the calls of its parts.
    """
    recorder = _Recorder(model, parts)
    # Tensors made in inference mode have no version to tell them apart by.
    unobserved = evaluating(model), without_fast_path(), torch.inference_mode(False), torch.no_grad()
    with ExitStack() as stack:
        for context in (*unobserved, _hooks(recorder, model), recorder):
            stack.enter_context(context)
        run()
    recorder.recording.restrict_to_forward()
    return recorder.recording
