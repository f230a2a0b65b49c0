"""XNNPACK's graphs in a `.pte` file, as plain containers and back, and the same file with layers made visible.

A graph's numbers are read as the bits of their float32 (`number`), so that what is written back is what was there: the
schema is given to flatc with whole numbers in the place of floats, which take the same four bytes.
"""

import copy
import json
import math
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from qat.export.target import OnGrid

INFINITE = np.float32(np.inf)
EXTERNAL_OUTPUT = 2
"""XNN_VALUE_FLAG_EXTERNAL_OUTPUT."""
PLACE = 16
"""Alignment of a tensor in the memory that the runtime plans."""


def decompile(blob: bytes) -> dict[str, Any]:
    """The graph of a delegate."""
    from executorch.exir._serialize._flatbuffer import _flatc_decompile  # pyright: ignore[reportMissingImports]

    header = _header(blob)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "schema.fbs").write_text(_schema())
        start = header.flatbuffer_offset
        (folder / "graph.bin").write_bytes(blob[start : start + header.flatbuffer_size])
        _flatc_decompile(str(folder), str(folder / "schema.fbs"), str(folder / "graph.bin"), ["--raw-binary"])
        return json.loads((folder / "graph.json").read_text())


def compile_graph(graph: dict[str, Any], blob: bytes) -> bytes:
    """The delegate `blob` with another graph."""
    from executorch.backends.xnnpack.serialization import xnnpack_graph_serialize as xnn  # pyright: ignore[reportMissingImports]
    from executorch.exir._serialize._flatbuffer import _flatc_compile  # pyright: ignore[reportMissingImports]

    header = _header(blob)
    constants = blob[header.constant_data_offset : header.constant_data_offset + header.constant_data_size]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "schema.fbs").write_text(_schema())
        (folder / "graph.json").write_text(json.dumps(graph))
        _flatc_compile(str(folder), str(folder / "schema.fbs"), str(folder / "graph.json"))
        content = (folder / "graph.bin").read_bytes()
    start, size = header.flatbuffer_offset, -(-len(content) // PLACE) * PLACE
    made = xnn.XNNHeader(start, len(content), start + size, len(constants)).to_bytes()
    return b"".join([made.ljust(start, b"\0"), content.ljust(size, b"\0"), constants])


def _header(blob: bytes) -> Any:
    from executorch.backends.xnnpack.serialization import xnnpack_graph_serialize as xnn  # pyright: ignore[reportMissingImports]

    return xnn.XNNHeader.from_bytes(blob[: xnn.XNNHeader.EXPECTED_LENGTH])


def _schema() -> str:
    from executorch.backends.xnnpack.serialization import xnnpack_graph_serialize as xnn  # pyright: ignore[reportMissingImports]

    return re.sub(r"(:\s*\[?)float\b", r"\1uint", xnn._get_schema_bytes().decode())


def number(bits: int) -> np.float32:
    """The float32 of these bits."""
    return np.uint32(bits).view(np.float32)


def tensors(graph: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """A graph's tensors by their number, without their grids."""
    values = (value["xvalue_union"] for value in graph["xvalues"])
    return {tensor["id_out"]: tensor for tensor in (value.get("tensor_value", value) for value in values)}


Show = Callable[[np.ndarray], OnGrid]
"""From the codes of a layer, `[N, ..., C]`, to what the file shows of it."""


def expose(content: bytes, layers: Mapping[str, str], only: str | None = None) -> tuple[bytes, dict[str, Show]]:
    """Makes the codes behind layers outputs of a program, after those that it has.

    Args:
        content: A `.pte` file.
        layers: The layer of each weight that XNNPACK's graphs name.
        only: The one layer to show; all, if `None`.

    Returns:
        The file, and in their order the layers that it shows: those that an int8 grid follows inside of XNNPACK.
    """
    from executorch.exir import schema  # pyright: ignore[reportMissingImports]
    from executorch.exir._serialize import _program as pte  # pyright: ignore[reportMissingImports]

    file = pte.deserialize_pte_binary(content)
    program: Any = file.program
    plan, shown = program.execution_plan[0], {}
    owners = {key: name for key, name in layers.items() if only in (None, name)}
    calls = {
        plan.delegates[call.delegate_index].processed.index: call
        for chain in plan.chains
        for call in (instruction.instr_args for instruction in chain.instructions)
        if isinstance(call, schema.DelegateCall)
    }
    graphs = {index: decompile(bytes(program.backend_delegate_data[index].data)) for index in calls}
    found = {index: _layers(graph, owners) for index, graph in graphs.items()}
    # One that runs twice has no output of its own.
    times = Counter(name for layers in found.values() for name, *_ in layers)
    for index, call in calls.items():
        data, graph = program.backend_delegate_data[index], graphs[index]
        blob = bytes(data.data)
        for name, how, tensor in (each for each in found[index] if times[each[0]] == 1):
            shown[name] = how
            tensor["flags"], tensor["external_id"] = EXTERNAL_OUTPUT, graph["num_externs"]
            graph["num_externs"] += 1
            graph["output_ids"].append(tensor["id_out"])
            plan.values.append(schema.EValue(_planned(plan, tensor["dims"], schema)))
            call.args.append(len(plan.values) - 1)
            plan.outputs.append(len(plan.values) - 1)
        data.data = compile_graph(graph, blob)
    return bytes(pte.serialize_pte_binary(file, extract_delegate_segments=True)), shown


def shorten(content: bytes) -> bytes:
    """A program whose constants have short names: ExecuTorch calls them by their SHA-256, once in the program and once
    in each graph that reads them, and stores each at a multiple of 128."""
    from executorch.exir._serialize import _program as pte  # pyright: ignore[reportMissingImports]

    file = pte.deserialize_pte_binary(content)
    program: Any = file.program
    if file.named_data is None:
        return content
    names = {key: f"{number:x}" for number, key in enumerate(file.named_data.pte_data)}
    file.named_data.pte_data = {names[key]: entry for key, entry in file.named_data.pte_data.items()}
    for data in program.backend_delegate_data:
        graph = decompile(bytes(data.data))
        for constant in graph["constant_data"]:
            constant["named_key"] = names.get(constant["named_key"], "")
        data.data = compile_graph(graph, bytes(data.data))
    return bytes(pte.serialize_pte_binary(file, extract_delegate_segments=True, segment_alignment=PLACE))


def _layers(graph: dict[str, Any], owners: Mapping[str, str]) -> list[tuple[str, Show, dict[str, Any]]]:
    """The layers in a graph: name, how its output is shown, and the tensor of it."""
    known, found = tensors(graph), []
    grids = {
        value["xvalue_union"]["tensor_value"]["id_out"]: value["xvalue_union"]["quant_params"]
        for value in graph["xvalues"]
        if value["xvalue_union"].get("quant_params_type") == "PerTensorQuant"
    }
    for node in graph["xnodes"]:
        union = node["xnode_union"]
        weight, output = known.get(union.get("filter_id")), known.get(union.get("output_id"))
        key: Any = graph["constant_data"][weight["constant_buffer_idx"]]["named_key"] if weight else None
        if key not in owners or output is None or output["datatype"] != "xnn_datatype_qint8" or output["flags"]:
            continue
        grid, limits = grids[output["id_out"]], node.get("output_min_max")
        low, high = (number(limits[end]) for end in ("output_min", "output_max")) if limits else (-INFINITE, INFINITE)
        image = "Conv" in node["xnode_union_type"]
        found.append(
            (owners[key], partial(_shown, image, number(grid["scale"]), grid["zero_point"], low, high), output)
        )
    return found


def _shown(
    image: bool, scale: np.float32, zero_point: int, low: np.float32, high: np.float32, codes: np.ndarray
) -> OnGrid:
    values = (codes.astype(np.float32) - zero_point) * scale
    # XNNPACK has images channels last.
    return OnGrid(np.moveaxis(values, -1, 1) if image else values, scale, zero_point, low, high)


def _planned(plan: Any, sizes: Sequence[int], schema: Any) -> Any:
    """A new int8 tensor, in memory behind all others."""
    like = next(value.val for value in plan.values if getattr(value.val, "allocation_info", None) is not None)
    tensor, place = copy.deepcopy(like), plan.non_const_buffer_sizes
    pool = like.allocation_info.memory_id
    start = -(-place[pool] // PLACE) * PLACE
    place[pool] = start + math.prod(sizes)
    tensor.scalar_type, tensor.sizes, tensor.dim_order = schema.ScalarType.CHAR, list(sizes), list(range(len(sizes)))
    tensor.allocation_info = schema.AllocationDetails(pool, start, 0)
    return tensor
