"""ONNX Runtime as the judge: what it loads, which kernels it picks, what it computes, how fast."""

import collections
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from qat.errors import UserError
from qat.export.onnx import INPUT

INTEGER_KERNELS = ("QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "MatMulInteger", "ConvInteger")


class OnnxRunner:
    """A loaded file.

    Args:
        path: An ONNX file with one input.
        optimize: With the runtime's graph optimizations (which make the integer kernels), or node by node as written.
        threads: Threads within one operation.

    Raises:
        UserError: if the file is missing or the runtime refuses it.
    """

    def __init__(self, path: str | Path, *, optimize: bool = True, threads: int = 0) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"{self.path}: no such file")
        self.optimize, self.threads = optimize, threads
        self._session = self._open()

    def _open(self, optimized_copy: str | None = None) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self.threads
        level = ort.GraphOptimizationLevel
        options.graph_optimization_level = level.ORT_ENABLE_ALL if self.optimize else level.ORT_DISABLE_ALL
        if optimized_copy is not None:
            options.optimized_model_filepath = optimized_copy
        try:
            return ort.InferenceSession(str(self.path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the runtime's own exception types are private
            raise UserError(f"{self.path}: onnxruntime refuses it: {str(error).splitlines()[0]}") from None

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Runs one batch; returns the first output."""
        return np.asarray(self._session.run(None, {INPUT: x})[0])

    def kernels(self) -> collections.Counter[str]:
        """How many nodes of each kind the runtime executes, after its optimizations."""
        with tempfile.TemporaryDirectory() as folder:
            target = str(Path(folder) / "optimized.onnx")
            self._open(target)
            return collections.Counter(node.op_type for node in onnx.load(target).graph.node)

    def integer_nodes(self) -> int:
        """How many convolutions and matrix products run on integers."""
        kernels = self.kernels()
        return sum(kernels[name] for name in INTEGER_KERNELS)

    def input_shape(self) -> list[int]:
        """Shape of one sample."""
        return [int(d) for d in self._session.get_inputs()[0].shape[1:]]


def weight_codes(path: str | Path) -> dict[str, np.ndarray]:
    """The integer weights in an ONNX file, by layer, as int8 or uint8; up to 4 bits they are stored as INT4 and widened here."""
    suffix = ".integer_weight.codes"
    found = {}
    for tensor in onnx.load(str(path)).graph.initializer:
        if tensor.name.endswith(suffix):
            array = onnx.numpy_helper.to_array(tensor)
            found[tensor.name.removesuffix(suffix)] = array if array.dtype == np.uint8 else array.astype(np.int8)
    return found


def latency_ms(runners: Mapping[str, OnnxRunner], repeats: int = 200) -> dict[str, float]:
    """Median milliseconds for one sample, measured in turn (a machine that slows down slows all of them)."""
    times: dict[str, list[float]] = {name: [] for name in runners}
    inputs = {name: np.zeros([1, *runner.input_shape()], np.float32) for name, runner in runners.items()}
    for step in range(repeats + repeats // 10):
        for name, runner in runners.items():
            start = time.perf_counter()
            runner(inputs[name])
            if step >= repeats // 10:
                times[name].append(time.perf_counter() - start)
    return {name: float(np.median(t)) * 1e3 for name, t in times.items()}
