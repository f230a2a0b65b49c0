"""A perceptron with two hidden layers: the smallest model with everything that linear quantization needs."""

from typing import Unpack

import torch.nn.functional as F
from torch import Tensor, nn

from qat.errors import UserError, require
from qat.models.classifier import Classifier, Training


class MLP(Classifier):
    """Flatten, two hidden layers with ReLU, logits.

    Args:
        in_features: C * H * W of the images; 64 for digits, 784 for Fashion-MNIST.
        num_classes: width of the logits.
        width: units in each hidden layer.
        training: see `Classifier`.
    """

    def __init__(self, in_features: int = 64, num_classes: int = 10, width: int = 128, **training: Unpack[Training]):
        super().__init__(num_classes, **training)
        require("in_features", in_features, in_features >= 1, "at least 1")
        require("width", width, width >= 1, "at least 1")
        self.fc1 = nn.Linear(in_features, width)
        self.fc2 = nn.Linear(width, width)
        self.linear = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, C, H, W] to logits [N, num_classes]."""
        x = F.relu(self.fc1(x.flatten(1)))
        x = F.relu(self.fc2(x))
        return self.linear(x)

    def check_input(self, x: Tensor) -> None:
        """Raises a UserError unless an image has `in_features` values."""
        values = x[0].numel()
        if values != self.fc1.in_features:
            raise UserError(
                f"model.in_features={self.fc1.in_features}, but the data's images {list(x.shape[1:])} "
                f"have {values} values; set model.in_features={values}"
            )
