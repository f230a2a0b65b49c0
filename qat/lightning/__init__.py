"""Lightning: the callbacks that insert, calibrate, train and log, and what checkpoints need."""

from qat.lightning.callback import QATCallback
from qat.lightning.channels_last import ChannelsLast
from qat.lightning.compile import Compile
from qat.lightning.distill import Distill
from qat.lightning.health import QuantizerHealth
from qat.lightning.learn_bits import LearnBits
from qat.lightning.logs import LogQuantizers
from qat.lightning.module import load_from_checkpoint
from qat.lightning.resume import SeedEpochs
from qat.lightning.schedules import (
    AnnealBits,
    DampenOscillations,
    FreezeBatchNorm,
    FreezeOscillations,
    FreezeRanges,
    GradualEnable,
    ReestimateBatchNorm,
    TrackOscillations,
)
from qat.lightning.weights import load_weights, read_checkpoint

__all__ = [
    "AnnealBits",
    "ChannelsLast",
    "Compile",
    "DampenOscillations",
    "Distill",
    "FreezeBatchNorm",
    "FreezeOscillations",
    "FreezeRanges",
    "GradualEnable",
    "LearnBits",
    "LogQuantizers",
    "QATCallback",
    "QuantizerHealth",
    "ReestimateBatchNorm",
    "SeedEpochs",
    "TrackOscillations",
    "load_from_checkpoint",
    "load_weights",
    "read_checkpoint",
]
