"""Small float reference models: what the examples, tests and reports of this project quantize."""

from qat.models.causal_lm import CausalLM
from qat.models.classifier import Classifier
from qat.models.cnn import SmallCNN
from qat.models.gpt import GPT
from qat.models.mlp import MLP
from qat.models.mobilenet import MobileNetV2
from qat.models.resnet import ResNet

__all__ = ["GPT", "MLP", "CausalLM", "Classifier", "MobileNetV2", "ResNet", "SmallCNN"]
