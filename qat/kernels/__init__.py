"""Arithmetic at the speed of memory: which functions run compiled, how they are launched, and what training keeps."""

from qat.kernels.dispatch import Kernel, Mode, compiled, configure, products

__all__ = ["Kernel", "Mode", "compiled", "configure", "products"]
