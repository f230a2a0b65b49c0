"""Tensor functions that are no modules (residual `+`, average pooling) as quantizable sites of the module whose forward
calls them.

The owner's twin runs its forward under a `TorchFunctionMode` that counts the calls of each kind and passes the inputs
of those that are sites through their quantizers. Calls inside child modules belong to the children: a child that runs
any such call is an owner too and takes over while it runs. So one mode is on torch's stack at a time; owners swap its
`owner` field.
"""

from collections import OrderedDict
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qat.errors import UserError
from qat.functions import positional, site_kind
from qat.layers.twin import TwinMixin, original_class, ours


class Site(nn.Module):
    """One functional call of an owner: the quantizers of its inputs, `input_quantizer_0` and on (absent: that input
    stays float).
    """

    def __init__(self, quantizers: list[nn.Module | None]) -> None:
        super().__init__()
        for i, quantizer in enumerate(quantizers):
            self.register_module(f"input_quantizer_{i}", quantizer)

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        quantizers = self._modules.values()
        return [x if q is None else q(x) for x, q in zip(inputs, quantizers, strict=True)]


class SiteMode(TorchFunctionMode):
    """Routes torch functions to the owner whose forward is running."""

    def __init__(self, owner: "SiteOwner") -> None:
        super().__init__()
        self.owner = owner
        self.seen: dict[str, int] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = positional(args, kwargs or {})
        kind = site_kind(func, args)
        if kind is not None:
            index = self.seen.get(kind, 0)
            self.seen[kind] = index + 1
            args = self.owner.through_site(kind, index, args)
        return func(*args, **kwargs)


_running: list[SiteMode] = []


class SiteOwner(TwinMixin):
    """A module whose own forward runs functional sites.

    Attributes:
        site_counts: Calls of each kind that one forward makes, as recorded at insertion.
        site_owner: The module's path, for messages.
    """

    site_counts: dict[str, int]
    site_owner: str

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not _running:
            mode = SiteMode(self)
            _running.append(mode)
            try:
                with mode:
                    output = super().forward(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
            finally:
                _running.pop()
            self._check(mode.seen)
            return output
        mode = _running[-1]
        outer, mode.owner, mode.seen = (mode.owner, mode.seen), self, {}
        try:
            output = super().forward(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
            self._check(mode.seen)
        finally:
            mode.owner, mode.seen = outer
        return output

    def through_site(self, kind: str, index: int, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Replaces the tensor inputs of the call by their quantized values, if it is a quantized site."""
        site = self._modules.get(f"{kind}_{index}")  # pyright: ignore[reportAttributeAccessIssue]
        if not isinstance(site, Site):
            return args
        inputs = 2 if kind == "add" else 1
        with ours():
            return (*site(*args[:inputs]), *args[inputs:])

    def _check(self, seen: dict[str, int]) -> None:
        quantized = any(isinstance(m, Site) for m in self._modules.values())  # pyright: ignore[reportAttributeAccessIssue]
        if quantized and seen != self.site_counts:
            raise UserError(sites_changed(self.site_owner, self, self.site_counts, seen))


def sites_changed(name: str, module: nn.Module | SiteOwner, before: dict[str, int], now: dict[str, int]) -> str:
    """The message for a module whose forward does not run the same functional sites each time."""
    kind = next(k for k in (*before, *now) if before.get(k) != now.get(k))
    pattern = f"{name}.{kind}_*".removeprefix(".")
    who = f"'{name}' ({original_class(module).__name__})"  # pyright: ignore[reportArgumentType]
    return (
        f"the forward of {who} ran {_in_words(now)}, but {_in_words(before)} before; "
        "sites are told apart by their order, so each pass must run the same ones: "
        f"leave these float with a rule such as {{match: '{pattern}', act: off}}"
    )


def _in_words(counts: dict[str, int]) -> str:
    return " and ".join(f"{n} {kind} site{'s' * (n > 1)}" for kind, n in counts.items()) or "no functional site"


class SequentialSiteOwner(SiteOwner):
    """An owner that is an `nn.Sequential`: its sites are children but no steps of the sequence."""

    def __iter__(self) -> Any:
        return iter([m for m in self._modules.values() if not isinstance(m, Site)])  # pyright: ignore[reportAttributeAccessIssue]

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            steps = [(n, m) for n, m in self._modules.items() if not isinstance(m, Site)]  # pyright: ignore[reportAttributeAccessIssue]
            return original_class(self)(OrderedDict(steps[index]))  # pyright: ignore[reportArgumentType, reportCallIssue]
        return list(self)[index]


def owner_mixin(module: nn.Module) -> type[SiteOwner]:
    return SequentialSiteOwner if isinstance(module, nn.Sequential) else SiteOwner
