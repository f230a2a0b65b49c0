"""Tensor functions that are no modules (residual `+`, matrix products, attention, concatenation, pooling, ...) as
quantizable sites of the module whose forward calls them.

The owner's twin runs its forward under a `TorchFunctionMode` that counts the calls of each kind and passes the operands
of those that are sites through their quantizers. Calls inside child modules belong to the children: a child that runs
any such call is an owner too and takes over while it runs. So one mode is on torch's stack at a time; owners swap its
`owner` field. Only the kinds of function that the plan quantizes anywhere are looked at (`site_kinds`).
"""

import sys
import threading
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils.checkpoint import CheckpointFunction

from qat.errors import UserError
from qat.layers import shared
from qat.layers.site import Site
from qat.layers.twin import Inserted, original_class
from qat.planning.functions import FUNCTIONS, MEAN, WEIGHTED, Function


class SiteMode(TorchFunctionMode):
    """Routes torch functions to the owner whose forward is running."""

    def __init__(self, owner: "SiteOwner") -> None:
        super().__init__()
        self.enter(owner)

    def enter(self, owner: "SiteOwner") -> None:
        """From here on `owner`'s forward runs."""
        self.owner = owner
        self.seen: list[str] = []
        self.learning = torch.is_grad_enabled()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        function = FUNCTIONS.get(func)
        if function is None or function.kind not in self.owner.site_kinds:
            return func(*args, **kwargs)
        operands = function.operands(args, kwargs)
        if operands is None or not self.owner.is_site(func, function, operands):
            return func(*args, **kwargs)
        name = f"{function.kind}_{self.seen.count(function.kind)}"
        self.seen.append(function.kind)
        site = self.owner._modules.get(name)
        if not isinstance(site, Site):
            return func(*args, **kwargs)
        if self.learning and not torch.is_grad_enabled() and _recomputed_later():
            where = f"{self.owner.site_owner}.{name}".removeprefix(".")
            raise UserError(
                f"'{where}' lies in a part of a forward that reentrant checkpointing runs again "
                "on its own, where nothing knows it is a site: set use_reentrant=False, or checkpoint the whole module"
            )
        return site(func, function, args, kwargs, operands)


# Between two graphs of a model that breaks, torch calls the mode as it stands, and a compiler would take each such call
# for a program of its own; where the mode is part of a graph, it is traced as ever.
_frames: Any = torch._C._dynamo.eval_frame  # pyright: ignore[reportAttributeAccessIssue]
_frames.set_code_exec_strategy(
    SiteMode.__torch_function__.__code__,
    _frames._FrameExecStrategy(_frames._FrameAction.SKIP, _frames._FrameAction.DEFAULT),
)


def _recomputed_later() -> bool:
    """Whether a reentrant `torch.utils.checkpoint` runs the caller."""
    frame = sys._getframe()
    while frame is not None and frame.f_code is not CheckpointFunction.forward.__code__:
        frame = frame.f_back
    return frame is not None


class _Running(threading.local):
    """The modes on torch's stack, which every thread has its own of."""

    def __init__(self) -> None:
        self.modes: list[SiteMode] = []


_running = _Running()


def others_see() -> bool:
    """Whether a torch function mode of somebody else sees what modules call."""
    modes = _get_current_function_mode_stack() if torch._C._len_torch_function_stack() else ()
    return any(not isinstance(mode, SiteMode | DeviceContext) for mode in modes)


class SiteOwner(Inserted):
    """A module whose own forward runs functional sites.

    Attributes:
        site_order: The kinds of the sites that one forward runs, in order, as recorded at insertion.
        site_kinds: The kinds of function to look at.
        site_weights: The parameters that its own F.linear and F.conv calls take: where each is registered, and its
            name there. A layer's twin calls the same functions, with tensors of its own making.
        site_owner: The module's path, for messages.
    """

    site_order: list[str]
    site_kinds: frozenset[str]
    site_weights: tuple[tuple[nn.Module, str], ...]
    site_owner: str

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        forwards, modes = shared.here.forwards, _running.modes
        forwards.append(({}, []))
        try:
            return self._inside(modes[-1], args, kwargs) if modes else self._outermost(modes, args, kwargs)
        finally:
            forwards.pop()

    def _outermost(self, modes: list[SiteMode], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        mode = SiteMode(self)
        modes.append(mode)
        try:
            with mode:
                output = super().forward(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        finally:
            modes.pop()
        self._check(mode.seen)
        return output

    def _inside(self, mode: SiteMode, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        outer = mode.owner, mode.seen, mode.learning
        mode.enter(self)
        try:
            output = super().forward(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
            self._check(mode.seen)
        finally:
            mode.owner, mode.seen, mode.learning = outer
        return output

    def is_site(self, func: Any, function: Function, operands: list[Tensor]) -> bool:
        """Whether a call counts: what `site_function` says, of the parameters that the plan knows."""
        if function.kind in WEIGHTED:
            return any(getattr(module, name) is operands[1] for module, name in self.site_weights)
        return func not in MEAN or operands[0].ndim == 4

    def undo_twin(self) -> None:
        super().undo_twin()
        del self.site_order, self.site_kinds, self.site_weights, self.site_owner

    def _check(self, seen: list[str]) -> None:
        quantized = any(isinstance(m, Site) for m in self._modules.values())
        if quantized and seen != self.site_order:
            raise UserError(sites_changed(self.site_owner, self, self.site_order, seen))


def sites_changed(name: str, module: nn.Module | SiteOwner, before: list[str], now: list[str]) -> str:
    """The message for a module whose forward does not run the same functional sites each time."""
    kinds = dict.fromkeys((*before, *now))
    at = next((i for i, (a, b) in enumerate(zip(before, now, strict=False)) if a != b), min(len(before), len(now)))
    kind = next((k for k in kinds if before.count(k) != now.count(k)), (before + now)[at])
    moved = sorted(before) == sorted(now)
    how = f"ran {now[at]} where it ran {before[at]}" if moved else f"ran {_in_words(now)}, but {_in_words(before)}"
    pattern = f"{name}.{kind}_*".removeprefix(".")
    of = original_class(module).__name__  # pyright: ignore[reportArgumentType]
    who = f"'{name}' ({of})" if name else f"the module itself ({of})"
    return (
        f"the forward of {who} {how} before; "
        "sites are told apart by their order, so each pass must run the same ones: "
        f"leave these float with a rule such as {{match: '{pattern}', act: off}}"
    )


def _in_words(kinds: list[str]) -> str:
    counts = {kind: kinds.count(kind) for kind in kinds}
    return " and ".join(f"{n} {kind} site{'s' * (n > 1)}" for kind, n in counts.items()) or "no functional site"


class SequentialSiteOwner(SiteOwner):
    """An owner that is an `nn.Sequential`: its sites are children but no steps of the sequence."""

    def __iter__(self) -> Any:
        return iter([m for m in self._modules.values() if not isinstance(m, Site)])

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            steps = [(n, m) for n, m in self._modules.items() if not isinstance(m, Site)]
            return original_class(self)(OrderedDict(steps[index]))  # pyright: ignore[reportArgumentType]
        return list(self)[index]


def owner_mixin(module: nn.Module) -> type[SiteOwner]:
    return SequentialSiteOwner if isinstance(module, nn.Sequential) else SiteOwner
