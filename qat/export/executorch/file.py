"""Reading a `.pte` file: its constants, and the nodes that XNNPACK computes.

XNNPACK's constants have no names but hashes, and convolutions are stored channels last. `model.layers.json`, written
beside the file, says for every layer which constant holds its codes and in which order of axes; the codes themselves
are read from the `.pte`.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from qat.errors import UserError, first_line
from qat.export.executorch.graph import decompile, tensors
from qat.integer import IntegerLayer, reads_elementwise

PRODUCTS = ("XNNConv2d", "XNNDepthwiseConv2d", "XNNConvTranspose2d", "XNNFullyConnected", "XNNBatchMatrixMultiply")
OPERANDS = ("input1_id", "input2_id", "filter_id")
BYTES = {"CHAR": 1, "BYTE": 1, "INT": 4, "LONG": 8, "FLOAT": 4}
INTEGERS = ("xnn_datatype_qint8", "xnn_datatype_qcint8")


class Node(NamedTuple):
    """An operation of XNNPACK: its kind, the types of its operands, and the hashes of those that are constants."""

    kind: str
    types: list[str]
    constants: list[str]

    @property
    def integer(self) -> bool:
        return self.kind in PRODUCTS and all(each in INTEGERS for each in self.types)


@dataclass
class PteFile:
    """A `.pte` file, read without its runtime.

    Attributes:
        constants: Every constant's bytes by their hash.
        nodes: The nodes that XNNPACK computes.
        keys: The hash of each constant of XNNPACK's graphs, by its name there.
        layers: For every layer, the constant that holds its codes, and how.
        unfollowed: The layers whose output lies on no grid.
    """

    constants: dict[str, bytes]
    nodes: list[Node]
    keys: dict[str, str]
    layers: dict[str, Any]
    unfollowed: list[str]

    @classmethod
    def parse(cls, content: bytes) -> "PteFile":
        """Takes a file's bytes apart; `layers` stays empty."""
        from executorch.exir._serialize._program import deserialize_pte_binary  # pyright: ignore[reportMissingImports]

        pte: Any = deserialize_pte_binary(content)
        named = pte.named_data
        keyed = (
            {key: bytes(named.buffers[entry.buffer_index]) for key, entry in named.pte_data.items()} if named else {}
        )
        stored = [*keyed.values(), *_portable(pte.program)]
        blobs = [bytes(delegate.data) for delegate in pte.program.backend_delegate_data]
        nodes = [node for blob in blobs for node in _nodes(blob, keyed)]
        keys = {key: _hash(data) for key, data in keyed.items()}
        return cls({_hash(data): data for data in stored}, nodes, keys, {}, [])

    @classmethod
    def read(cls, path: Path) -> "PteFile":
        """Reads a file and what is beside it.

        Raises:
            UserError: if one of them is damaged.
        """
        try:
            file, beside = cls.parse(path.read_bytes()), json.loads(_beside(path).read_text())
            file.layers, file.unfollowed = beside["layers"], beside["unfollowed"]
        except Exception as error:  # whatever its readers stumble over
            raise UserError(f"{path}: is damaged: {first_line(error)}") from None
        return file

    def codes(self) -> dict[str, np.ndarray]:
        """The integer weights by layer, for those that are there."""
        found = {}
        for name, entry in self.layers.items():
            if (data := self.constants.get(entry["constant"])) is not None:
                shape = [entry["shape"][axis] for axis in entry["axes"]]
                found[name] = np.frombuffer(data, np.int8).reshape(shape).transpose(np.argsort(entry["axes"]))
        return found

    def named_layers(self) -> dict[str, str]:
        """The layer of each weight in XNNPACK's graphs; those that share one are left out, since nothing tells them
        apart."""
        owners: dict[str, list[str]] = {}
        for name, entry in self.layers.items():
            owners.setdefault(entry["constant"], []).append(name)
        return {key: owners[hash][0] for key, hash in self.keys.items() if len(owners.get(hash, ())) == 1}

    def integer_nodes(self) -> int:
        """How many products XNNPACK computes on integers."""
        return sum(node.integer for node in self.nodes)

    def float_layers(self) -> list[str]:
        """The layers whose codes no integer product reads."""
        integers = {key for node in self.nodes if node.integer for key in node.constants}
        products = {name: entry["constant"] for name, entry in self.layers.items() if entry["product"]}
        return [name for name, constant in products.items() if constant not in integers]


def describe(content: bytes, model: nn.Module, unfollowed: Sequence[str]) -> str:
    """The text of `model.layers.json`, which is written beside a file.

    Args:
        content: The file.
        model: The converted model that it was made of.
        unfollowed: The layers whose output lies on no grid.

    Raises:
        UserError: if the codes of a layer are not in the file.
    """
    constants, layers = PteFile.parse(content).constants, {}
    for name, module in model.named_modules():
        if isinstance(module, IntegerLayer):
            codes = module.integer_weight.codes.numpy()
            entry = next((e for e in _places(codes) if e["constant"] in constants), None)
            if entry is None:
                raise UserError(f"'{name}': ExecuTorch did not keep the integers of its weight")
            # A constant that is added comes to XNNPACK from outside, where nothing tells which operation reads it.
            layers[name] = entry | {"product": not reads_elementwise(module)}
    return json.dumps({"layers": layers, "unfollowed": list(unfollowed)}, separators=(",", ":"))


def _places(codes: np.ndarray) -> Iterator[dict[str, Any]]:
    """The ways in which a weight may be stored: as it is, channels last, and those of depthwise and transposed ones."""
    for axes in (tuple(range(codes.ndim)), (0, 2, 3, 1), (1, 2, 3, 0), (0, 2, 1), (1, 2, 0), (1, 0)):
        if len(axes) == codes.ndim:
            key = _hash(np.ascontiguousarray(codes.transpose(axes)).tobytes())
            yield {"constant": key, "axes": axes, "shape": codes.shape}


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.stem}.layers.json")


def _hash(data: bytes) -> str:
    """Half of the SHA-256: enough to find a constant by; the codes themselves are compared."""
    return hashlib.sha256(data).hexdigest()[:32]


def _portable(program: Any) -> Iterator[bytes]:
    """The constants that kernels outside XNNPACK read, without the padding behind them."""
    for value in program.execution_plan[0].values:
        tensor = value.val
        if getattr(tensor, "data_buffer_idx", 0):
            size = math.prod(tensor.sizes) * BYTES.get(tensor.scalar_type.name, 0)
            yield bytes(program.constant_buffer[tensor.data_buffer_idx].storage)[:size]


def _nodes(blob: bytes, keyed: dict[str, bytes]) -> Iterator[Node]:
    """The operations of one graph that XNNPACK took over."""
    graph = decompile(blob)
    known = tensors(graph)
    keys = [constant["named_key"] for constant in graph["constant_data"]]
    for node in graph["xnodes"]:
        operands = [known[i] for key, i in node["xnode_union"].items() if key in OPERANDS]
        stored = [keys[tensor["constant_buffer_idx"]] for tensor in operands]
        constants = [_hash(keyed[key]) for key in stored if key in keyed]
        yield Node(node["xnode_union_type"], [tensor["datatype"] for tensor in operands], constants)
