"""The training half of a language model; a subclass adds layers and `forward`.

Learning to predict the next of V codes (of characters, of tokens) is classification with V classes at every position,
so training, metrics and schedule are those of `Classifier`; `val/loss` and `test/loss` are nats per code.
"""

import torch.nn.functional as F
from torch import Tensor

from qat.models.classifier import Batch, Classifier


class LanguageModel(Classifier):
    """Like `Classifier`, of windows of codes [N, T] and the codes that follow them [N, T]; logits are [N, T, V]."""

    def _step(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        x, y = batch
        self.check_input(x)
        logits, y = self(x).flatten(0, 1), y.flatten()
        return F.cross_entropy(logits, y), logits, y
