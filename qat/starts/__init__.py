"""Better starts: what can be done to a model right before or after its ranges are calibrated, without training.

Each is one class, given to `QATCallback(starts=[...])` or chosen with `start=...` on the command line, and works for
calibration alone (PTQ) as for what training starts from. What a start has found lies in weights, biases and BatchNorms
afterwards, so that quantization-aware training begins with exactly the model that was measured.
"""

from qat.starts.adaround import AdaRound
from qat.starts.base import Start
from qat.starts.bias import CorrectBias
from qat.starts.equalize import Equalize

__all__ = ["AdaRound", "CorrectBias", "Equalize", "Start"]
