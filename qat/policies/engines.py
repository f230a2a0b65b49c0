"""Rules of engines, as data: `quant.engine` names one, and training rounds as it will.

A policy that has an engine settles by its rules what settings leave open (`signed: null`), and refuses what they
contradict. A plan carries the engine's name; `refusal` says why a model that was trained by other rules would not
compute on an engine what it was trained for, and which setting to change.

Sources, where an engine's maker documents them; the rest is measured:

    ort          onnxruntime.ai/docs/performance/model-optimizations/quantization.html; int32 biases and kernels: see
                 `qat.export.onnx.export`
    ort_no_vnni  the same page, "reduce_range": without VNNI (or AMX), AVX2 and AVX512 kernels add two products of u8
                 and s8 in int16, which saturates: 2 * 255 * 127 > 32767, and 2 * 255 * 63 is not
    openvino     docs.openvino.ai, "Low Precision Transformations". The CPU plugin adds what comes straight from a
                 convolution in its accumulator and forgets a grid in between; convolutions with zero points of weights
                 it computes in float, transposed ones wrongly (2026.4, measured: tests/test_rules_openvino.py)
    tensorrt     docs.nvidia.com, "Working with Quantized Types" (TensorRT 10 and 11): symmetric int8 alone, zero points
                 are zero, scales of activations per tensor, float biases; "quantize the residual input in skip
                 connections", not what the convolution before the addition returns, which fuses with it
    qnn          onnxruntime.ai/docs/execution-providers/QNN-ExecutionProvider.html and get_qnn_qdq_config of
                 onnxruntime.quantization: uint8 or uint16 activations, symmetric int8 weights, per channel for
                 convolutions alone
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from qat.errors import UserError, nearest
from qat.grid.spec import QuantSpec

Biases = Literal["eval", "train", "never"]
"""When biases are whole accumulator steps."""
Adds = Literal["both", "not convolutions", "not products"]


@dataclass(frozen=True)
class Engine:
    """The rules of one engine.

    Attributes:
        name: The name that `quant.engine` gives it.
        act_bits: Widths that activations may have.
        act_signed: Whether all activations are signed; `None` if either will do, so that unsigned grids serve tensors
            that are >= 0.
        act_symmetric: Whether activations may have no zero point.
        weight_bits: The largest width of weights.
        weight_symmetric: Layers whose weights are signed, without a zero point, by the beginning of their class's name.
        channel_types: Layers whose weights may have a scale per channel, by the beginning of their class's name;
            `None` for all.
        round_bias: When biases are rounded to int32 at s_x * s_w; engines with float biases never need it.
        adds: Which operands of an addition have a grid: both, or those that come straight from no convolution, or from
            no product, since that is added in its accumulator (of two such operands the second has a grid).
    """

    name: str
    act_bits: tuple[int, ...] = tuple(range(1, 17))
    act_signed: bool | None = None
    act_symmetric: bool = False
    weight_bits: int = 16
    weight_symmetric: tuple[str, ...] = ()
    channel_types: tuple[str, ...] | None = None
    round_bias: Biases = "eval"
    adds: Adds = "both"

    def resolve_spec(self, spec: QuantSpec, where: str, type_name: str | None) -> QuantSpec:
        """The spec by this engine's rules.

        Args:
            spec: The spec as the policy has it, `signed` perhaps open.
            where: The config key, for messages.
            type_name: Class of the layer if it is a weight's spec, `None` for an activation's.

        Raises:
            UserError: if a setting contradicts them, with the value to set.
        """
        weight = type_name is not None
        if conflict := self.conflict(spec, type_name):
            key, wanted = conflict
            raise UserError(
                f"{where}.{key}={getattr(spec, key)}: quant.engine={self.name} cannot compute that; set {where}.{key}"
                f"={wanted}, or another engine"
            )
        if weight and spec.granularity == "channel" and not self._per_channel(type_name):
            return dataclasses.replace(spec, granularity="tensor")
        if not weight and self.act_signed and spec.signed is None and spec.integer:
            return dataclasses.replace(spec, signed=True)
        return spec

    def _per_channel(self, type_name: str) -> bool:
        return self.channel_types is None or type_name.lower().startswith(self.channel_types)

    def conflict(self, spec: QuantSpec, type_name: str | None) -> tuple[str, object] | None:
        """The setting that cannot be, and what it should be.

        Args:
            spec: The spec of a grid.
            type_name: Class of the layer if it is a weight's, empty if nobody knows it; `None` for an activation's.
        """
        if not spec.integer:
            return None
        if type_name is not None:
            if spec.width > self.weight_bits:
                return "bits", self.weight_bits
            if not type_name.lower().startswith(self.weight_symmetric):
                return None
            if not spec.symmetric:
                return "symmetric", "true"
            return ("signed", "null") if spec.signed is False else None
        if spec.width not in self.act_bits:
            return "bits", min(self.act_bits, key=lambda bits: (abs(bits - spec.width), bits))
        if self.act_symmetric and not spec.symmetric:
            return "symmetric", "true"
        return ("signed", "null") if self.act_signed and spec.signed is False else None

    def accumulated(self, products: Sequence[str]) -> int | None:
        """Which operand of an addition stays in the accumulator, without a grid.

        Args:
            products: The product that each operand comes straight from: `conv`, `linear`, or none (an empty string).
        """
        if self.adds == "both" or len(products) != 2:
            return None
        kinds = ("conv",) if self.adds == "not convolutions" else ("conv", "linear")
        return next((index for index, product in enumerate(products) if product in kinds), None)

    def refusal(
        self,
        trained: "Engine",
        weights: Mapping[str, QuantSpec],
        activations: Mapping[str, QuantSpec],
        residuals: Mapping[str, Sequence[str]],
    ) -> str | None:
        """Why this engine would not compute what was trained, and what to train instead; `None` if it does.

        Args:
            trained: The engine whose rules the model was trained by.
            weights, activations: Its specs, settled, by name.
            residuals: `products` of each addition (see `accumulated`).
        """
        for role, specs in (("weight", weights), ("act", activations)):
            for name, spec in specs.items():
                if conflict := self.conflict(spec, "" if role == "weight" else None):
                    key, wanted = conflict
                    return (
                        f"'{name}' is {spec.short}, which {self.name} does not compute: train it with "
                        f"quant.engine={self.name}, and {key}={wanted} for its {role}"
                    )
        for name, products in residuals.items() if self is not GENERIC else ():
            here, there = trained.accumulated(products), self.accumulated(products)
            if here != there:
                return (
                    f"'{name}' was trained with {_grids(here)}, and {self.name} computes it with {_grids(there)}: "
                    f"train it with quant.engine={self.name}"
                )
        return None


def _grids(left_out: int | None) -> str:
    return "a grid for each operand" if left_out is None else f"none for operand {left_out}"


GENERIC = Engine("generic")
ENGINES = {
    engine.name: engine
    for engine in (
        Engine("ort"),
        Engine("ort_no_vnni", weight_bits=7),
        Engine(
            "openvino",
            act_bits=tuple(range(1, 9)),
            weight_bits=8,
            weight_symmetric=("conv",),
            adds="not convolutions",
        ),
        Engine(
            "tensorrt",
            act_bits=(8,),
            act_signed=True,
            act_symmetric=True,
            weight_bits=8,
            weight_symmetric=("",),
            round_bias="never",
            adds="not products",
        ),
        Engine("qnn", act_bits=(8, 16), weight_bits=8, weight_symmetric=("",), channel_types=("conv",)),
    )
}


def engine_of(name: str | None, where: str = "quant.engine") -> Engine:
    """The engine of that name; for `None`, one that computes whatever is asked.

    Raises:
        UserError: naming `where`, if there is no such engine.
    """
    if name is None:
        return GENERIC
    if name not in ENGINES:
        raise UserError(f"{where}={name!r}: no such engine{nearest(str(name), ENGINES)}")
    return ENGINES[name]
