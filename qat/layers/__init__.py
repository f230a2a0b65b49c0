"""Twins: the quantized versions of layers, and of modules whose forward calls quantizable functions."""

from torch import nn

from qat.layers.accumulator import FoldingNorm
from qat.layers.attention import FUSED, QuantMultiheadAttention, SlowPath
from qat.layers.base import QuantizedLayer
from qat.layers.cells import QuantGRUCell, QuantLSTMCell, QuantRNNCell
from qat.layers.computed import ComputedWeight, is_computed
from qat.layers.modules import (
    QuantAdaptiveAvgPool1d,
    QuantAdaptiveAvgPool2d,
    QuantAvgPool1d,
    QuantAvgPool2d,
    QuantBilinear,
    QuantConv1d,
    QuantConv2d,
    QuantConv3d,
    QuantEmbedding,
    QuantEmbeddingBag,
    QuantLinear,
)
from qat.layers.parts import BoundPart, Composite, Part
from qat.layers.recurrent import QuantGRU, QuantLSTM, QuantRNN
from qat.layers.sequence import QuantSequential, rounds_within
from qat.layers.site import Site
from qat.layers.sites import SiteOwner, owner_mixin, sites_changed
from qat.layers.transposed import QuantConvTranspose1d, QuantConvTranspose2d, QuantConvTranspose3d
from qat.layers.twin import TwinMixin, become_twin, drop_mixins, original_class

MIXINS: tuple[type[QuantizedLayer] | type[Composite], ...] = (
    QuantLinear, QuantConv1d, QuantConv2d, QuantConv3d, QuantConvTranspose1d, QuantConvTranspose2d,
    QuantConvTranspose3d, QuantBilinear, QuantEmbedding, QuantEmbeddingBag, QuantLSTM, QuantGRU, QuantRNN,
    QuantLSTMCell, QuantGRUCell, QuantRNNCell, QuantMultiheadAttention, QuantAvgPool1d, QuantAvgPool2d,
    QuantAdaptiveAvgPool1d, QuantAdaptiveAvgPool2d,
)  # fmt: skip


def mixin_for(module: nn.Module) -> type[QuantizedLayer] | type[Composite] | None:
    """The mixin that quantizes `module`, or `None` if there is none: subclasses count unless they have a forward of
    their own.
    """
    if isinstance(module, Part):
        return Part
    cls = original_class(module)
    if "forward" in vars(module):  # somebody replaced this instance's
        return None
    return next((m for m in MIXINS if issubclass(cls, m.serves) and cls.forward is m.serves.forward), None)


__all__ = [
    "FUSED", "MIXINS", "BoundPart", "Composite", "ComputedWeight", "FoldingNorm", "Part", "QuantSequential",
    "QuantizedLayer", "Site", "SiteOwner", "SlowPath", "TwinMixin", "become_twin", "drop_mixins", "is_computed",
    "mixin_for", "original_class", "owner_mixin", "rounds_within", "sites_changed",
]  # fmt: skip
