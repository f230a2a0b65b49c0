"""Data modules that hold a small data set in memory: what the examples, tests and reports train on."""

from qat.data.digits import Digits
from qat.data.hf import HFImages
from qat.data.module import ImageDataModule, Images
from qat.data.text import Text

__all__ = ["Digits", "HFImages", "ImageDataModule", "Images", "Text"]
