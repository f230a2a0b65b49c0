"""Re-classing: a layer becomes its quantized twin without leaving its place.

`module.__class__ = Twin` keeps parameters, ties, hooks, names, attributes and every state_dict key, and it is what
torch itself does for parametrizations, FSDP2 and lazy modules. A twin is `class Quant(Mixin, Original)`, made on
demand, so subclasses of a layer keep theirs; mixins stack. Made-up classes have no import path;
`TwinMixin.__reduce_ex__` pickles and copies an instance as (mixins, original class, state).
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor, nn

ours = torch._C.DisableTorchFunction
"""Context for the arithmetic that twins add: it is no functional site of the module around them, whatever it looks
like.
"""

_parts: dict[type, tuple[type, type]] = {}


def stored_tensor(module: Any, tensors: Mapping[str, Tensor | None], name: str) -> Tensor | None:
    """`module.name`, which torch looks up in Python, from the parameters or buffers, where it is unless it is computed
    (pruned, parametrized).
    """
    return tensors[name] if name in tensors else getattr(module, name)


class TwinMixin:
    """Marks a re-classed module and makes it survive pickle and deepcopy."""

    training: bool
    _modules: dict[str, Any]
    _parameters: dict[str, nn.Parameter | None]

    def __reduce_ex__(self, protocol: Any) -> Any:
        _, _, *rest = super().__reduce_ex__(2)
        return _rebuild, (*_unstack(type(self)),), *rest

    def once_per_change(
        self, name: str, tensors: tuple[Tensor | None, ...], grids: tuple[Any, ...], compute: Callable[[], Any]
    ) -> Any:
        """The result of `compute`, computed anew only when a tensor was written to or replaced, or a grid has changed.

        For evaluation, where weights and grids stand still: nothing is kept while gradients are on, somebody compiles
        or traces (a graph with what was kept would miss how it is computed), or for inference tensors, which count no
        versions.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return compute()
        stamp: list[Any] = []
        try:
            for tensor in tensors:
                if tensor is not None:
                    stamp += tensor._version, tensor.data_ptr()
            for grid in grids:
                if grid is not None:
                    stamp += grid.versions()
        except RuntimeError:  # inference tensors
            return compute()
        kept = self.__dict__.setdefault("_kept", {})
        found = kept.get(name)
        if found is None or found[0] != stamp:
            # While these live, no other tensor gets their address.
            seen = *tensors, *(grid.scale for grid in grids if grid is not None)
            found = kept[name] = stamp, compute(), seen
        return found[1]

    def train(self, mode: bool = True) -> Self:
        # Averaging callbacks swap weights through `.data`, which no version counter sees; they do so after switching
        # modes.
        self.__dict__.pop("_kept", None)
        return super().train(mode)  # pyright: ignore[reportAttributeAccessIssue]

    def __getstate__(self) -> dict[str, Any]:
        parent: Any = super().__getstate__()
        return {k: v for k, v in parent.items() if k != "_kept"}


class Inserted(TwinMixin):
    """A twin that insertion has made, and that `qat.remove` turns back."""

    def undo_twin(self) -> None:
        """Gives up what makes it a twin, but for its class. Mixins that leave something on a module add to this."""
        self.__dict__.pop("_kept", None)


@cache
def _twin_class(mixin: type, original: type) -> type:
    namespace = {"__doc__": original.__doc__, "__module__": original.__module__}
    cls = type(f"Quant{original.__name__.removeprefix('Quant')}", (mixin, original), namespace)
    _parts[cls] = mixin, original
    return cls


def _unstack(cls: type) -> tuple[type, list[type]]:
    """The original class, and the mixins on top of it from the innermost to the outermost."""
    mixins: list[type] = []
    while cls in _parts:
        mixin, cls = _parts[cls]
        mixins.insert(0, mixin)
    return cls, mixins


def _stack(original: type, mixins: list[type]) -> Any:
    for mixin in mixins:
        original = _twin_class(mixin, original)
    return original


def _rebuild(original: type, mixins: list[type]) -> Any:
    cls = _stack(original, mixins)
    return cls.__new__(cls)


def become_twin(module: nn.Module, mixin: type) -> None:
    """Turns `module` into its twin in place; nothing happens if it is one with this mixin already."""
    original, mixins = _unstack(type(module))
    if mixin not in mixins:
        module.__class__ = _stack(original, [*mixins, mixin])


def drop_mixins(module: nn.Module, base: type) -> None:
    """Undoes `become_twin` for every mixin that derives from `base`."""
    original, mixins = _unstack(type(module))
    module.__class__ = _stack(original, [m for m in mixins if not issubclass(m, base)])


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class the module had before it became a twin (its own class if it is none)."""
    return _unstack(type(module))[0]


def twin_of(original: type, mixin: type) -> Any:
    """The twin class itself, for making new instances."""
    return _stack(original, [mixin])
