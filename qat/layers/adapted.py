"""Layers that adapters of `peft` stand around (see `qat.adapters`): known by what they have, without importing peft."""

from collections.abc import Iterator
from typing import Any

from torch import nn


def adapted(model: nn.Module) -> dict[str, Any]:
    """The layers of peft that hold a base layer and adapters, by name."""
    return {n: m for n, m in model.named_modules() if hasattr(m, "adapter_layer_names") and hasattr(m, "base_layer")}


def inside_adapters(model: nn.Module) -> Iterator[str]:
    """Paths of everything that belongs to an adapter rather than to the layer it adapts."""
    for name, layer in adapted(model).items():
        yield name
        for child, module in layer.named_children():
            if child != "base_layer":
                yield from (f"{name}.{child}.{inner}".rstrip(".") for inner, _ in module.named_modules())
