"""Twins: the quantized versions of layers, and of modules whose forward calls quantizable functions."""

from torch import nn

from qat.layers.accumulator import FoldingNorm
from qat.layers.base import QuantizedLayer
from qat.layers.modules import (
    QuantAdaptiveAvgPool1d,
    QuantAdaptiveAvgPool2d,
    QuantAvgPool1d,
    QuantAvgPool2d,
    QuantConv1d,
    QuantConv2d,
    QuantEmbedding,
    QuantLinear,
)
from qat.layers.site import Site
from qat.layers.sites import SiteOwner, owner_mixin, sites_changed
from qat.layers.twin import TwinMixin, become_twin, drop_mixins, original_class

MIXINS: tuple[type[QuantizedLayer], ...] = (
    QuantLinear, QuantConv1d, QuantConv2d, QuantEmbedding, QuantAvgPool1d, QuantAvgPool2d, QuantAdaptiveAvgPool1d,
    QuantAdaptiveAvgPool2d,
)  # fmt: skip


def mixin_for(module: nn.Module) -> type[QuantizedLayer] | None:
    """The mixin that quantizes `module`, or `None` if there is none: subclasses count unless they have a forward of
    their own.
    """
    cls = original_class(module)
    if "forward" in vars(module):  # somebody replaced this instance's
        return None
    return next((m for m in MIXINS if issubclass(cls, m.serves) and cls.forward is m.serves.forward), None)


__all__ = [
    "MIXINS", "FoldingNorm", "QuantizedLayer", "Site", "SiteOwner", "TwinMixin", "become_twin", "drop_mixins",
    "mixin_for", "original_class", "owner_mixin", "sites_changed",
]  # fmt: skip
