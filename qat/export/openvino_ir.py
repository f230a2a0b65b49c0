"""OpenVINO IR: the ONNX file's graph and integers in OpenVINO's own form, `model.xml` + `model.bin`.

OpenVINO's low-precision transformations move scales and biases through the graph and multiply by reciprocals where
training divides, so single values may take a neighbouring code; without them (`optimize=False`) it computes in float
what the integers stand for. Weights of up to 4 bits stay int4 in the file.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from torch import Tensor, nn

from qat.errors import UserError, last_line
from qat.export import nibbles
from qat.export.onnx.export import export_onnx
from qat.export.onnx.layers import shared_weights
from qat.export.onnx.placement import OPENVINO
from qat.export.onnx.runtime import saturates
from qat.export.onnx.weights import SHARED_KEY, is_weight
from qat.export.overflow import saturation
from qat.export.target import INPUT, Target, unrunnable
from qat.export.verify import Verdict, count_kernels
from qat.planning.addressable import type_of
from qat.planning.plan import Plan, kind_of
from qat.policies.engines import engine_of

CARRIERS = ("Convert", "Subtract", "Multiply", "Reshape", "Transpose")
"""Operations that may stand between a weight and the operation that computes with it."""
CODES = ("i4", "u4", "i8", "u8")
PRODUCTS = ("Convolution", "GroupConvolution", "MatMul")
KERNELS = ("Convolution", "FullyConnected", "MatMul")
"""Operations that compute products in a compiled model."""


class OpenVinoRunner:
    """A loaded IR file.

    Args:
        path: The `.xml`; the `.bin` is beside it.
        optimize: With low-precision transformations, which make integer kernels, or in float.
        threads: Threads; 0 lets OpenVINO choose.

    Raises:
        UserError: if OpenVINO refuses it.
    """

    def __init__(self, path: Path, *, optimize: bool = True, threads: int = 0) -> None:
        import openvino  # pyright: ignore[reportMissingImports]

        self.path, self.optimize = path, optimize
        self._core = openvino.Core()
        # Half precision, and inputs of integer weights rounded by groups of their own, are speed-ups that nobody
        # trained for.
        self._settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
        if not optimize:
            self._settings["LP_TRANSFORMS_MODE"] = "NO"
        if threads:
            self._settings |= {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
        try:
            self._compiled = self._compile(self._read())
        except RuntimeError as error:
            raise UserError(f"{path}: openvino refuses it: {_reason(error)}") from None

    def _read(self) -> Any:
        return self._core.read_model(str(self.path))

    def _compile(self, model: Any) -> Any:
        return self._core.compile_model(model, "CPU", self._settings)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Runs one batch.

        Raises:
            UserError: if the file does not take such a batch.
        """
        try:
            return np.array(self._compiled({INPUT: x})[0])
        except RuntimeError as error:
            raise unrunnable(self.path, x, _reason(error)) from None

    def layer_outputs(self, x: np.ndarray, only: str | None = None) -> dict[str, np.ndarray]:
        model = self._read()
        layers = {name: node for name, node in layer_nodes(model).items() if only in (None, name)}
        model.add_outputs([node.output(0) for node in layers.values()])
        settings = self._settings if only else self._settings | {"LP_TRANSFORMS_MODE": "NO"}
        values = self._core.compile_model(model, "CPU", settings)({INPUT: x})
        # What was an output before is not added again.
        shown = [port.get_node().input_value(0).get_node().get_friendly_name() for port in model.outputs]
        return {name: np.array(values[shown.index(node.get_friendly_name())]) for name, node in layers.items()}

    def precisions(self) -> list[tuple[str, str]]:
        """Name and precision (`f32`, `u8`, `i8`) of every convolution and product that is executed."""
        softmaxes = {n.get_friendly_name() for n in self._read().get_ordered_ops() if n.get_type_name() == "Softmax"}
        nodes = []
        for node in self._compiled.get_runtime_model().get_ordered_ops():
            info = node.get_rt_info()
            names, precision = info["originalLayersNames"].value, info["runtimePrecision"].value
            if info["layerType"].value in KERNELS:
                nodes.append((names, precision))
            elif info["layerType"].value == "Subgraph" and softmaxes.intersection(names.split(",")):
                # Attention in one kernel: of queries, keys and values, those that are multiplied as integers come so.
                codes = sum(port.get_element_type().get_type_name() in CODES for port in node.inputs())
                nodes += [(names, precision if codes > product else "f32") for product in (1, 2)]
        return nodes

    def float_layers(self) -> list[str] | None:
        floats = {part for names, p in self.precisions() if p.startswith(("f", "bf")) for part in names.split(",")}
        return [layer for layer, node in layer_nodes(self._read()).items() if node.get_friendly_name() in floats]


def _reason(error: RuntimeError) -> str:
    """The last line of what OpenVINO says; those before it are places in its source."""
    return last_line(error).removeprefix("-- ")


def weights(model: Any) -> dict[str, Any]:
    """The constants that hold integer weights, by layer."""
    found = {}
    for node in model.get_ordered_ops():
        name, kind = node.get_friendly_name(), node.get_type_name()
        if kind == "Constant" and is_weight(name) and node.get_element_type().get_type_name() in CODES:
            found[name.rpartition(".")[0]] = node
    return found


def layer_nodes(model: Any) -> dict[str, Any]:
    """The operation of each layer, its bias included, in the order of execution."""
    owner: dict[str, str] = {}
    found: dict[str, Any] = {}
    for node in model.get_ordered_ops():
        name, kind = node.get_friendly_name(), node.get_type_name()
        sources = [value.get_node() for value in node.input_values()]
        inherited = [owner[s.get_friendly_name()] for s in sources if s.get_friendly_name() in owner]
        if kind == "Constant" and is_weight(name):
            owner[name] = name.rpartition(".")[0]
        elif inherited and kind in CARRIERS:
            owner[name] = inherited[0]
        elif inherited and kind in PRODUCTS:
            found[inherited[0]] = node
        elif kind in ("Add", "Multiply") and any(map(_is_constant, sources)):  # the bias; a MatMul's factor of one
            names = [source.get_friendly_name() for source in sources]
            for layer, product in found.items():
                if product.get_friendly_name() in names and (kind == "Add" or product.get_type_name() == "MatMul"):
                    found[layer] = node
    return found


def _is_constant(node: Any) -> bool:
    """Whether its values depend on no input (a bias is reshaped to the rank of what it is added to)."""
    if node.get_type_name() in ("Parameter", "ShapeOf"):
        return node.get_type_name() == "ShapeOf"
    return all(_is_constant(value.get_node()) for value in node.input_values())


def _codes(packed: np.ndarray, kind: str) -> np.ndarray:
    """The codes in a constant's bytes, of which the last of i4 or u4 may be none."""
    return nibbles.unpack(packed.reshape(-1), 4, signed=kind == "i4") if kind in ("i4", "u4") else packed.reshape(-1)


class ForOpenVino(Target):
    """What files for OpenVINO have in common, be they in its own form or in ONNX's."""

    engine = "openvino"
    graph = "onnx"
    runner = OpenVinoRunner
    package = extra = "openvino"
    optimizes = True

    def model_refusal(self, model: nn.Module, plan: Plan) -> str | None:
        return super().model_refusal(model, plan) or _weight_refusal(model, plan)

    def cautions(self, model: nn.Module, plan: Plan) -> list[str]:
        remedy = "it has no option against that: train weights of at most 7 bits, in first and last layers, too"
        return super().cautions(model, plan) + (saturation(plan, "OpenVINO", remedy) if saturates() else [])

    def check_kernels(self, verdict: Verdict, converted: nn.Module, runner: Any) -> None:
        """OpenVINO's integer kernels against the layers that should have one; those in float are named."""
        found = sum(precision in ("i8", "u8") for _, precision in runner.precisions())
        count_kernels(verdict, converted, found, floats=runner.float_layers())


def _weight_refusal(model: nn.Module, plan: Plan) -> str | None:
    """Which weight OpenVINO does not compute with, in a plan by another engine's rules; `None` if there is none."""
    modules = dict(model.named_modules())
    for name, spec in plan.weights.items():
        kind = kind_of(name) if name in plan.parameters else type_of(modules[name]).__name__ if name in modules else ""
        if conflict := engine_of("openvino").conflict(spec, kind):
            key, wanted = conflict
            return (
                f"'{name}' is {spec.short}, which openvino does not compute for a {kind}: train it with {key}={wanted}"
            )
    return None


class OpenVinoTarget(ForOpenVino):
    """IR for OpenVINO's runtime."""

    file = "model.xml"

    def write(self, model: nn.Module, plan: Plan, example: Tensor, folder: Path) -> None:
        import openvino  # pyright: ignore[reportMissingImports]

        source = folder / "model.onnx"
        export_onnx(model, example, source, OPENVINO)
        try:
            model_of_onnx = openvino.Core().read_model(str(source))  # convert_model would lose the constants' names
            model_of_onnx.set_rt_info(json.dumps(shared_weights(onnx.load(str(source)))), SHARED_KEY)
            openvino.save_model(model_of_onnx, folder / self.file, compress_to_fp16=False)
        except RuntimeError as error:
            raise UserError(
                f"{self.file} cannot hold this model: {_reason(error)} (operations of ONNX, with the opset); write "
                "these otherwise, or use export=onnx"
            ) from None
        finally:
            source.unlink()
        self.try_out(model, folder)

    def codes(self, path: Path) -> dict[str, np.ndarray]:
        import openvino  # pyright: ignore[reportMissingImports]

        model = openvino.Core().read_model(str(path))
        found = {}
        for layer, node in weights(model).items():
            array, shape = node.get_data(), list(node.get_output_shape(0))
            kind = node.get_element_type().get_type_name()
            found[layer] = _codes(array, kind)[: math.prod(shape)].reshape(shape)
        for name, same in json.loads(model.get_rt_info(SHARED_KEY).value).items():
            found[name.rpartition(".")[0]] = found[same.rpartition(".")[0]]
        return found
