"""Milliseconds of each layer inside an exported file, from ONNX Runtime's own profiler.

A layer has the nodes from the layer before it up to and including its own kernel: the conversions to its input's grid
belong to it. Profiling slows the nodes down, so their times are scaled to the time of a run without it.
"""

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from qat.errors import UserError
from qat.export.onnx import INPUT
from qat.export.runtime import INTEGER_KERNELS, OnnxRunner, latency_ms

CONSTANT = re.compile(r"(.+)\.(?:weight|weight_scale|weight_zero)$")
"""Names of initializers in our files, after the layer that they belong to."""
KERNELS = (*INTEGER_KERNELS, "Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "ConvTranspose")
"""What a layer's arithmetic ends up as."""
KERNEL = "_kernel_time"


def layer_latencies(path: Path, layers: Sequence[str], repeats: int) -> tuple[dict[str, float], float]:
    """Measures one file on one thread.

    Args:
        path: An exported file.
        layers: Names of the layers to tell apart, in execution order.
        repeats: Runs to take medians of.

    Returns:
        Milliseconds of each layer for one sample, and of what follows the last one.

    Raises:
        UserError: if a layer's kernel cannot be found in the file.
    """
    runner = OnnxRunner(path, threads=1)
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        times = _profile(path, runner.blank(), optimized, Path(folder) / "profile", repeats)
        owners = _owners(optimized, list(times), layers)
    found = defaultdict(float)
    waiting = 0.0
    for node, milliseconds in times.items():
        waiting += milliseconds
        if node in owners:
            found[owners[node]] += waiting
            waiting = 0.0
    if missing := [name for name in layers if name not in found]:
        raise UserError(f"latency: the runtime has no kernel of its own for '{missing[0]}', so no time of its own either")
    total = latency_ms({"": runner}, repeats)[""]
    factor = total / sum(times.values())
    return {name: value * factor for name, value in found.items()}, waiting * factor


def _profile(path: Path, x: np.ndarray, optimized: Path, prefix: Path, repeats: int) -> dict[str, float]:
    """Median milliseconds of each node, in the order of execution."""
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    options.enable_profiling, options.profile_file_prefix = True, str(prefix)
    options.optimized_model_filepath = str(optimized)
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    for _ in range(repeats + repeats // 10 + 1):
        session.run(None, {INPUT: x})
    durations: dict[str, list[float]] = defaultdict(list)
    for event in json.loads(Path(session.end_profiling()).read_text()):
        if event.get("cat") == "Node" and event["name"].endswith(KERNEL):
            durations[event["name"].removesuffix(KERNEL)].append(event["dur"] / 1e3)
    return {node: float(np.median(values[-repeats:])) for node, values in durations.items()}


def _owners(optimized: Path, order: Sequence[str], layers: Sequence[str]) -> dict[str, str]:
    """Node -> its layer: by the weight that it takes, or, where the runtime renamed that, by what is left in order."""
    nodes = {node.name: node for node in onnx.load(str(optimized)).graph.node}
    kernels = [name for name in order if name in nodes and nodes[name].op_type in KERNELS]
    owners: dict[str, str] = {}
    for name in kernels:
        matches = (CONSTANT.match(value) for value in nodes[name].input)
        layer = next((m[1] for m in matches if m and m[1] in layers), None)
        if layer is not None:
            owners[name] = layer
    unnamed = [name for name in kernels if name not in owners]
    left = [layer for layer in layers if layer not in owners.values()]
    return owners | (dict(zip(unnamed, left, strict=True)) if len(unnamed) == len(left) else {})
