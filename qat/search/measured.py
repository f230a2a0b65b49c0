"""The cache of sensitivities: one JSON file that grows while they are measured, whole at every moment."""

import time
from pathlib import Path
from typing import Any, Literal

from qat.errors import UserError
from qat.files import read_object, write_object

Measure = Literal["loss", "hessian", "sqnr"]
SAVE_SECONDS = 2.0
"""Least time between two writes of the file while measuring."""


class Measured:
    """Sensitivities measured so far, in a file.

    Args:
        path: The file; it may not exist yet.
        key: Fingerprint of what the measurements follow from; a file with another one is refused.

    Attributes:
        loss: Loss of the float model.
        tensors: Per grid: `size`, `trace` (of the Hessian; absent until estimated) and the `probes` that it is the
            mean of, and `bits`: per width (as text) `loss_increase`, `mse` and `sqnr_db` (`None` if nothing was lost).
    """

    def __init__(self, path: Path, key: str = "") -> None:
        self.path, self.key = path, key
        self.loss: float | None = None
        self.tensors: dict[str, dict[str, Any]] = {}
        if path.is_file():
            try:
                content = read_object(path, "loss", "tensors", "key")
            except UserError as error:
                raise UserError(f"{error}; delete it to measure again") from None
            self.loss, self.tensors = content["loss"], content["tensors"]
            if content["key"] != key:
                raise UserError(
                    f"search.dir={path.parent} holds what was measured of another model, data, quant or number of "
                    "samples; choose another folder, or search.dir=null for one that fits"
                )
        self._saved = time.monotonic()

    def of(self, tensor: str) -> dict[str, Any]:
        """The entry of a grid, made if there is none."""
        return self.tensors.setdefault(tensor, {"bits": {}})

    def has(self, tensor: str, bits: int) -> bool:
        """Whether a width has been measured."""
        return str(bits) in self.of(tensor)["bits"]

    def save(self, now: bool = True) -> None:
        """Writes the file; with `now=False` only if the last time is a while ago."""
        if now or time.monotonic() - self._saved > SAVE_SECONDS:
            write_object(self.path, {"key": self.key, "loss": self.loss, "tensors": self.tensors})
            self._saved = time.monotonic()

    def harm(self, tensor: str, bits: int, by: Measure) -> float:
        """How much a width hurts, >= 0 and no less than what more bits do (a measured loss is noisy).

        `hessian` is the second-order estimate of the loss increase, tr(H)/2 x mse: HAWQ-V2's Omega (arXiv 1911.03852,
        section 3.2) with the factor of the Taylor expansion, which makes it comparable to `loss`.
        """
        entry = self.tensors[tensor]
        return max(self._plain(entry, w, by) for w in entry["bits"] if int(w) >= bits)

    def _plain(self, entry: dict[str, Any], bits: str, by: Measure) -> float:
        at = entry["bits"][bits]
        if by == "hessian":
            return max(0.0, entry["trace"]) / 2 * at["mse"]
        if by == "sqnr":
            return 0.0 if at["sqnr_db"] is None else 10 ** (-at["sqnr_db"] / 10)
        return max(0.0, at["loss_increase"])
