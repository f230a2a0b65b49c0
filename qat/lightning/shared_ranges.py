"""First ranges that several runs share: a grid of the same tensor with the same spec is calibrated once.

Every quantizer sees the float model's tensors, whatever the others have, so its first range follows from the float
model, the calibration data, and its own place and spec; and from those of a grid that its tensor passes before, of
which it is untied (see `qat.cascades`). In a sweep over bits most grids recur: 4 widths of weights
times 2 of activations are 8 points, but each weight has 4 ranges, not 8. A run that finds all of its ranges does not
look at data at all.
"""

import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

from qat.cascades import cascades
from qat.files import atomic
from qat.insert import named_quantizers
from qat.measure.stats import readers_of
from qat.quantizers import Quantizer


class RangeCache:
    """A folder with one small file for each range.

    Args:
        folder: The folder for one float model on one calibration set.
        samples: Calibration samples.
        writes: Whether this process adds to it.
    """

    def __init__(self, folder: Path, samples: int, writes: bool = True) -> None:
        self.folder, self.samples, self.writes = folder, samples, writes

    def load(self, model: nn.Module) -> list[Quantizer]:
        """Gives quantizers the ranges that are known; returns those whose are not."""
        missing: list[Quantizer] = []
        for quantizer, path in self._files(model).items():
            if path.is_file():
                quantizer.load_state_dict(load_file(path))
            else:
                missing.append(quantizer)
        return missing

    def save(self, model: nn.Module, quantizers: Collection[Quantizer]) -> None:
        """Adds the ranges of some quantizers, each complete or not at all."""
        if not self.writes:
            return
        for quantizer, path in self._files(model).items():
            if quantizer in quantizers:
                with atomic(path) as temporary:
                    save_file({k: v.cpu().contiguous() for k, v in quantizer.state_dict().items()}, temporary)

    def _files(self, model: nn.Module) -> dict[Quantizer, Path]:
        """Where each quantizer's range is: under a hash of what it follows from."""
        readers, names = readers_of(model), {quantizer: name for name, quantizer in named_quantizers(model)}
        before: dict[Quantizer, list[Quantizer]] = {}
        for first, second in cascades(model):
            before.setdefault(second, []).append(first)

        def origin(quantizer: Quantizer) -> list[Any]:
            own = [names[quantizer], readers[quantizer], quantizer.spec.to_dict()]
            return [*own, *map(origin, before.get(quantizer, []))]

        found: dict[Quantizer, Path] = {}
        for quantizer in names:
            content = json.dumps([self.samples, *origin(quantizer)], sort_keys=True)
            found[quantizer] = self.folder / f"{hashlib.sha256(content.encode()).hexdigest()[:16]}.safetensors"
        return found
