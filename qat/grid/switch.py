"""`Switch`: a module that observes, is off or is on, and what becomes of that when it is moved, saved and loaded."""

from typing import Any

import torch
from torch import Tensor, nn


class Switch(nn.Module):
    """A module that can be switched on and off. Buffers keep how it stands, so that checkpoints carry it; Python
    attributes mirror them, so that a forward pass never waits for a device to read them.

    Attributes:
        enabled: Whether somebody wants it.
        initialised: Whether it has what it needs.
        observing: Whether it collects `samples` instead, until told otherwise.
        on: Both, and not observing.
        unready: Whether it is wanted and lacks what it needs.
    """

    enabled: Tensor
    initialised: Tensor
    observing: bool
    on: bool
    unready: bool

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("enabled", torch.ones(1, dtype=torch.bool))
        self.register_buffer("initialised", torch.zeros(1, dtype=torch.bool))
        self.observe(False)

    def enable(self, enabled: bool = True) -> None:
        """Switches between on and off."""
        self.enabled.fill_(enabled)
        self._read_flags()

    def observe(self, observing: bool = True) -> None:
        """Starts or ends observing; what was collected is given up."""
        self.observing = observing
        self.samples: list[Tensor] = []
        self._read_flags()

    def _read_flags(self) -> None:
        """Refreshes the Python mirror of the flags; whoever writes a flag calls it."""
        # On the meta device nothing is known until a state is loaded.
        enabled, initialised = (True, False) if self.enabled.is_meta else (bool(self.enabled), bool(self.initialised))
        self.unready = enabled and not initialised
        self.on = enabled and initialised and not self.observing

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._read_flags()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moves with the module, but stays in float32 where it goes to half precision: the scale of a grid of 8 bits
        needs more than bfloat16's.
        """

        def move(t: Tensor) -> Tensor:
            moved = fn(t)
            return t.to(moved.device) if moved.dtype in (torch.float16, torch.bfloat16) else moved

        return super()._apply(move, recurse)
