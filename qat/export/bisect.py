"""Where a file goes wrong: the first layer whose output is not the converted model's.

First all layers are looked at in one run without optimizations. If they agree, the runtime's fused kernels are at
fault; then one layer at a time is made visible, so that all before it stay fused, and the first that diverges is found
by bisection.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from qat.export.target import OnGrid, Runner
from qat.export.torch.runner import outputs_of
from qat.export.verify import expected_codes

NOISE = 0.05
"""Mean deviation of a layer, in steps of an 8-bit grid over its range, that rounding leaves behind: flips of codes are
rare (5 in a million values), while a wrong weight changes its whole channel."""


def first_divergence(converted: nn.Module, runner: Runner, x: np.ndarray) -> str:
    """Names the first layer that diverges on a batch, in a sentence.

    Args:
        converted: The model as it should be.
        runner: The exported file.
        x: The batch.
    """
    layers = runner.layer_outputs(x)
    if not layers:
        return "this format shows no layers, so none can be named"
    hidden = [f"'{name}'" for name in expected_codes(converted) if name not in layers]
    modules = dict(converted.named_modules())
    expected = outputs_of(converted, [name for name in layers if name in modules], torch.from_numpy(x))
    names = [name for name in layers if name in expected]
    for name in names:
        if _diverges(expected[name], layers[name]):
            return f"the first layer that diverges is '{name}'"
    first = _bisect(names, lambda name: _diverges(expected[name], runner.layer_outputs(x, name)[name]))
    if first is None:
        where = f"in what this format does not show ({', '.join(hidden)})" if hidden else "behind the last layer"
        return f"no single layer diverges: small deviations add up, or the difference is {where}"
    return f"with optimizations alone: '{first}' is the first layer that diverges, or the last whose input does"


def _bisect(names: list[str], diverges: Callable[[str], bool]) -> str | None:
    """The first name for which `diverges`, which stays true once it is."""
    low, high = 0, len(names)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if diverges(names[middle]) else (middle + 1, high)
    return names[low] if low < len(names) else None


def _diverges(expected: np.ndarray, actual: np.ndarray | OnGrid) -> bool:
    if isinstance(actual, OnGrid):
        expected, actual = actual.of(expected), actual.values
    if expected.size != actual.size:
        return True
    step = float(np.ptp(expected)) / 255 or float(np.finfo(np.float32).tiny)
    difference = np.abs(expected.reshape(actual.shape).astype(np.float64) - actual)
    return not float(difference.mean()) / step <= NOISE  # NaN diverges
