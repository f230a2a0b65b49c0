"""`Calibrated`: a module in one of three states, how one of them leads to its first range, and what becomes of all that
when it is moved, saved and loaded.

    observing   collects a sample of what passes and returns it untouched; `calibrate` turns the sample into scale and
                zero_point
    off         returns its input
    on          does its work
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import UserError
from qat.grid import ranges
from qat.grid.sample import sample
from qat.grid.spec import QuantSpec


class Calibrated(nn.Module):
    """A grid that can be switched on and off, and that calibration gives its first range. Buffers keep its state, so
    that checkpoints carry it; Python attributes mirror them, so that a forward pass never waits for a device to read
    them.

    Attributes:
        enabled: Whether somebody wants it.
        initialised: Whether it has what it needs.
        observing: Whether it collects `samples` instead, until told otherwise.
        samples: Values observed of an activation, one tensor for each that passed.
        on: Enabled, initialised, and not observing.
        unready: Whether it is wanted and lacks what it needs.
    """

    enabled: Tensor
    initialised: Tensor
    observing: bool
    samples: list[Tensor]
    on: bool
    unready: bool

    spec: QuantSpec
    is_weight: bool
    scale: Tensor
    zero_point: Tensor

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
        self.samples = []
        self._read_flags()

    def _read_flags(self) -> None:
        """Refreshes the Python mirror of the flags; whoever writes a flag calls it."""
        # On the meta device nothing is known until a state is loaded.
        enabled, initialised = (True, False) if self.enabled.is_meta else (bool(self.enabled), bool(self.initialised))
        self.unready = enabled and not initialised
        self.on = enabled and initialised and not self.observing

    def _pass(self, x: Tensor) -> Tensor:
        """What forward does while it is not on."""
        if self.observing:
            if self.needs_range:
                self._observe(x)
        elif self.unready:
            raise RuntimeError("this quantizer has no range yet: qat.calibrate.calibrate(model, run) finds it")
        return x

    # -- calibration ---------------------------------------------------------------------------------------------------

    @property
    def needs_range(self) -> bool:
        """Whether calibration has to find something."""
        return True

    @torch.no_grad()
    def _observe(self, x: Tensor) -> None:
        if not x.numel():
            return
        x = x.detach().float()
        if not x.isfinite().all():
            what = "the weight" if self.is_weight else "calibration data"
            raise UserError(f"{what} holds NaN or infinity, for which there is no range")
        if not self.is_weight:  # of which `calibrate` looks at all
            self.samples.append(sample(x))

    @torch.no_grad()
    def calibrate(self, x: Tensor | None = None) -> None:
        """Sets scale and zero_point from `x`, or from what was observed, if it needs a range, and ends observing.

        Raises:
            UserError: if there is nothing to look at, or it holds NaN or infinity.
        """
        if self.needs_range:
            rows = self._observed() if x is None else self._rows(x.detach().float())
            if not rows.isfinite().all():
                raise UserError("holds NaN or infinity, for which there is no range")
            if rows.numel():
                self._fit(rows)
            self.initialised.fill_(True)
        self.observe(False)

    def _observed(self) -> Tensor:
        if not self.samples:
            raise UserError("nothing passed through it during calibration")
        return torch.cat(self.samples)[None]

    def _rows(self, x: Tensor) -> Tensor:
        """The elements of `x` that share a scale, as they are rounded: `[scales, N]`."""
        raise NotImplementedError

    @classmethod
    def heeds(cls, weight: bool) -> Collection[str]:
        """The estimators (`spec.range`) that `_fit` asks, for a weight or an activation."""
        return ranges.ESTIMATORS

    def _fit(self, rows: Tensor) -> None:
        """Finds the first range from `rows [scales, N]`."""
        self._set_range(*ranges.ESTIMATORS[self.spec.range](rows, self.spec))

    @torch.no_grad()
    def _set_range(self, low: Tensor, high: Tensor) -> None:
        scale, zero_point = ranges.scale_and_zero_point(low, high, self.spec)
        self.scale.copy_(scale.view(self.scale.shape))
        self.zero_point.copy_(zero_point.view(self.zero_point.shape))

    # -- moved and loaded ----------------------------------------------------------------------------------------------

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
