"""Schedules: small callbacks beside `QATCallback` that change how a model is quantized while it trains.

Each does one thing, works on any LightningModule that `QATCallback` quantizes, and resumes to the same numbers: what it
has done lies in buffers, in the plan or in its own state, and what it will do follows from how far training is.
"""

from qat.lightning.schedules.anneal import AnnealBits
from qat.lightning.schedules.dampen import DampenOscillations
from qat.lightning.schedules.enable import GradualEnable
from qat.lightning.schedules.freeze import FreezeBatchNorm, FreezeRanges
from qat.lightning.schedules.oscillation import FreezeOscillations, TrackOscillations
from qat.lightning.schedules.reestimate import ReestimateBatchNorm

__all__ = [
    "AnnealBits", "DampenOscillations", "FreezeBatchNorm", "FreezeOscillations", "FreezeRanges", "GradualEnable",
    "ReestimateBatchNorm", "TrackOscillations",
]  # fmt: skip
