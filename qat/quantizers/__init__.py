"""Quantizers: one file each, found by name (`QuantSpec.quantizer`)."""

from qat.quantizers.base import Quantizer, create, find, names

__all__ = ["Quantizer", "create", "find", "names"]
