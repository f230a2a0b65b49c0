"""Noting what modules are called with and what they answer, and other helpers of distillation."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from qat.errors import UserError, nearest
from qat.planning.functions import first_tensor
from qat.policies.patterns import matching


class TappedCall(NamedTuple):
    """One call of a module; `recorded` says whether torch followed it for a backward pass."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    recorded: bool


class Taps:
    """While entered, notes the calls of some modules, without changing them.

    Args:
        root: Module that the names are relative to.
        names: Module paths; the empty one is `root` itself.

    Attributes:
        calls: By name, the calls since it was entered, kept until it is entered again or cleared.

    Raises:
        UserError: if `root` has no module of one of the names.
    """

    def __init__(self, root: nn.Module, names: Sequence[str]) -> None:
        modules = dict(root.named_modules(remove_duplicate=False))
        for name in names:
            if name not in modules:
                raise _lacking(root, name, modules)
        self._modules = {name: modules[name] for name in names}
        self.names = list(self._modules)
        self.calls: dict[str, list[TappedCall]] = {name: [] for name in names}
        # Made once: a compiler takes other functions for another program each time.
        self._hooks = {name: _noting(calls) for name, calls in self.calls.items()}
        self._handles: list[Any] = []

    def module(self, name: str) -> nn.Module:
        return self._modules[name]

    def clear(self) -> None:
        """Lets go of the tensors."""
        for calls in self.calls.values():
            calls.clear()

    def __enter__(self) -> Self:
        self.clear()
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_hook(self._hooks[name], with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _noting(calls: list[TappedCall]) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.append(TappedCall(args, kwargs, output, torch.is_grad_enabled()))

    return hook


def answer(output: Any) -> Tensor:
    """The tensor that a module's output is about: itself, its `logits`, or the first tensor in it."""
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    tensor = logits if isinstance(logits, Tensor) else first_tensor(output)
    if tensor is None:
        raise UserError(f"a module answers with {type(output).__name__}, which holds no tensor", by="Distill")
    return tensor


def named_layers(student: nn.Module, teacher: nn.Module, patterns: Sequence[str]) -> list[str]:
    """The module paths of both that any of the globs match, in the order of the student's modules.

    Raises:
        UserError: if a pattern matches nothing in one of them, with the nearest path.
    """
    names = [name for name, _ in student.named_modules() if name]
    theirs = dict(teacher.named_modules(remove_duplicate=False))
    hits: set[str] = set()
    for pattern in patterns:
        found = matching(pattern, names, "features", "module")
        if not theirs.keys() & set(found):
            raise _lacking(teacher, found[0], theirs)
        hits.update(found)
    return [name for name in names if name in theirs and name in hits]


def _lacking(root: nn.Module, name: str, modules: Iterable[str]) -> UserError:
    return UserError(f"{type(root).__name__} has no module '{name}'{nearest(name, filter(None, modules))}")


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """A hash of the floating-point weights and buffers."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            digest.update(name.encode())
            digest.update(value.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()
