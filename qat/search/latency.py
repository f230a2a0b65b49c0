"""Milliseconds of each layer inside an exported file, from ONNX Runtime's own profiler.

A layer has the nodes from the layer before it up to and including its own kernel: the conversions to its input's grid
belong to it. Profiling slows the nodes down, so their times are scaled to the time of a run without it.
"""

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx

from qat.errors import UserError
from qat.export.bench import latency_ms
from qat.export.onnx.runtime import INTEGER_KERNELS, OnnxRunner, open_session, session_options
from qat.export.target import INPUT

CONSTANT = re.compile(r"(.+)\.(?:weight|weight_scale|weight_zero)$")
"""Names of initializers in our files, after the layer that they belong to."""
KERNELS = (*INTEGER_KERNELS, "Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "ConvTranspose")
"""Operations that a layer's arithmetic ends up as."""
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
    runner, x = OnnxRunner(path, threads=1), _blank(path)
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        times, kinds = _profile(path, x, optimized, Path(folder) / "profile", repeats)
        owners = _owners(optimized, list(times), kinds, layers)
    found = defaultdict(float)
    waiting = 0.0
    for node, milliseconds in times.items():
        waiting += milliseconds
        if node in owners:
            found[owners[node]] += waiting
            waiting = 0.0
    if missing := [name for name in layers if name not in found]:
        raise UserError(
            f"latency: the runtime has no kernel of its own for '{missing[0]}', so no time of its own either"
        )
    total = latency_ms({"": runner}, x, repeats)[""]
    factor = total / sum(times.values())
    return {name: value * factor for name, value in found.items()}, waiting * factor


def _blank(path: Path) -> np.ndarray:
    """One sample of zeros."""
    shape = onnx.load(str(path), load_external_data=False).graph.input[0].type.tensor_type
    dtype = np.int64 if shape.elem_type == onnx.TensorProto.INT64 else np.float32
    return np.zeros([1, *(d.dim_value for d in shape.shape.dim[1:])], dtype)


def _profile(
    path: Path, x: np.ndarray, optimized: Path, prefix: Path, repeats: int
) -> tuple[dict[str, float], dict[str, str]]:
    """Median milliseconds of each node, in the order of execution, and the kind of each."""
    options = session_options(threads=1)
    options.enable_profiling, options.profile_file_prefix = True, str(prefix)
    options.optimized_model_filepath = str(optimized)
    session = open_session(str(path), options, path)
    for _ in range(repeats + repeats // 10 + 1):
        session.run(None, {INPUT: x})
    durations: dict[str, list[float]] = defaultdict(list)
    kinds: dict[str, str] = {}
    for event in json.loads(Path(session.end_profiling()).read_text()):
        if event.get("cat") == "Node" and event["name"].endswith(KERNEL):
            name = event["name"].removesuffix(KERNEL)
            durations[name].append(event["dur"] / 1e3)
            kinds[name] = event["args"]["op_name"]
    return {node: float(np.median(values[-repeats:])) for node, values in durations.items()}, kinds


def _owners(optimized: Path, order: Sequence[str], kinds: Mapping[str, str], layers: Sequence[str]) -> dict[str, str]:
    """Node -> its layer: by the constants that it takes, or, where the runtime renamed them, by what is left in order.

    Nodes that the runtime made are nameless in the file, and called after their kind and number in the profile.
    """
    kernels = [name for name in order if kinds[name] in KERNELS]
    written = [node for node in onnx.load(str(optimized)).graph.node if node.op_type in KERNELS]
    named = {node.name for node in written}
    nameless = iter([name for name in kernels if name not in named])
    owners: dict[str, str] = {}
    for node in written:
        name = node.name or next(nameless, "")
        matches = (CONSTANT.match(value) for value in node.input)
        layer = next((m[1] for m in matches if m and m[1] in layers), None)
        if layer is not None:
            owners[name] = layer
    unknown = [name for name in kernels if name not in owners]
    left = [layer for layer in layers if layer not in owners.values()]
    return owners | (dict(zip(unknown, left, strict=True)) if len(unknown) == len(left) else {})
