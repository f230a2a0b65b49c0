"""GGUF, the file of llama.cpp: weights in blocks of 32 that share a float16 scale, in 8 bits (Q8_0) or 4 (Q4_0).

The file holds weights and no activation grids, so it is for models trained on such blocks with float activations; then
codes and scales in it are the trained ones, bit for bit. Tensors have the names of the float model's state_dict, but
for those of a Llama, which has the form that llama.cpp and `transformers` know (`qat.export.gguf.llama`).
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qat.copies import copied
from qat.errors import UserError, first_line
from qat.export.gguf.llama import LLAMA, Llama
from qat.export.target import Target, misfit
from qat.export.torch.runner import TorchRunner
from qat.integer import IntegerTensor
from qat.planning.plan import Plan

BLOCK = 32
ARCHITECTURE = "qat"
WAY_OUT = "train with granularity=group group_size=32 scale=float16"


class GgufTarget(Target):
    """GGUF, read back by the `gguf` package and run by torch as the float model that it stands for."""

    file = "model.gguf"
    package = extra = "gguf"
    graph = None

    def model_refusal(self, model: nn.Module, plan: Plan) -> str | None:
        if plan.activations:
            first = next(iter(plan.activations))
            return f"it holds weights alone, but '{first}' is quantized; train with act: off and sites: off"
        for name, spec in plan.weights.items():
            if name in plan.batch_norms:
                return f"a BatchNorm folds into '{name}', which would leave no float16 scales"
            if spec.granularity != "group" or spec.group_size != BLOCK or not spec.symmetric or spec.format != "int":
                return f"weight of '{name}' is {spec.short}, not symmetric blocks of {BLOCK}; {WAY_OUT}"
            if spec.scale not in ("float16", "pow2"):
                return f"weight of '{name}' has scales of {spec.scale}, and blocks have float16; {WAY_OUT}"
        return None

    def write(self, model: nn.Module, plan: Plan, example: Tensor, folder: Path) -> None:
        import gguf  # pyright: ignore[reportMissingImports]

        found = Llama.of_model(model)
        writer = gguf.GGUFWriter(folder / self.file, LLAMA if found else ARCHITECTURE)
        names = found[0].names() if found else {}
        if found:
            found[0].describe(writer, found[1])

        def add(key: str, array: np.ndarray, kind: Any = None) -> None:
            name = names.get(key, key)
            rows = found[0].reordered(name, array) if found and key in names else array
            writer.add_tensor(name, rows, raw_dtype=kind)

        integer = {name: m for name, m in model.named_modules() if isinstance(m, IntegerTensor)}
        for name, tensor in integer.items():
            blocks, kind = _blocks(name, tensor)
            add(f"{_layer(name)}.weight", blocks, gguf.GGMLQuantizationType[kind])
        for key, value in model.state_dict().items():
            if not any(key.startswith(f"{name}.") for name in integer):
                add(key, np.atleast_1d(value.numpy()))
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()

    def open(self, path: Path, model: nn.Module, *, optimize: bool = True, threads: int = 0) -> TorchRunner:
        model = copied(model).cpu().eval()
        tensors = read_gguf(path)
        state = {name: torch.from_numpy(value) for name, (value, _) in tensors.items()}
        try:
            own = model.state_dict()
            model.load_state_dict({k: v.view(own[k].shape) if k in own else v for k, v in state.items()})
        except RuntimeError as error:
            raise misfit(path, model, error) from None
        return TorchRunner(model, path, list(self.codes(path)))

    def codes(self, path: Path) -> dict[str, np.ndarray]:
        return {_layer(name): codes for name, (_, codes) in read_gguf(path).items() if codes is not None}


def _layer(name: str) -> str:
    return name.rpartition(".")[0]


def _blocks(name: str, tensor: IntegerTensor) -> tuple[np.ndarray, str]:
    """A weight as GGUF stores it: uint8 `[..., bytes of a row]`, and the name of the block type.

    A block of Q8_0 is a float16 scale and 32 int8 codes; one of Q4_0 a scale and 16 bytes, of which byte i holds code i
    in its lower half and code i + 16 in its upper half, each shifted by 8.
    """
    codes, scale = tensor.codes.numpy(), tensor.scale.numpy()
    half = scale.astype(np.float16)
    if tensor.axis != codes.ndim - 1 or not np.array_equal(half.astype(np.float32), scale):
        raise UserError(f"weight of '{_layer(name)}': not in rows of blocks with float16 scales; {WAY_OUT}")
    grouped = codes.reshape(*codes.shape[:-1], -1, BLOCK)
    if tensor.bits <= 4:
        nibbles = (grouped.astype(np.int16) + 8).astype(np.uint8)
        data = nibbles[..., : BLOCK // 2] | nibbles[..., BLOCK // 2 :] << 4
    else:
        data = grouped.view(np.uint8)
    scales = half[..., None].view(np.uint8)
    blocks = np.concatenate([scales, data], -1)
    return blocks.reshape(*codes.shape[:-1], -1), "Q4_0" if tensor.bits <= 4 else "Q8_0"


def read_gguf(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
    """Tensors that the `gguf` package finds in a file: values, and codes if it is of blocks.

    Raises:
        UserError: if the package refuses the file.
    """
    import gguf  # pyright: ignore[reportMissingImports]

    try:
        reader = gguf.GGUFReader(path)
        tensors: list[Any] = reader.tensors
        llama = Llama.of_file(reader.fields)
    except Exception as error:  # whatever its reader stumbles over
        raise UserError(f"{path}: gguf refuses it: {first_line(error)}") from None
    ours = {theirs: key for key, theirs in llama.names().items()} if llama else {}
    found = {}
    for tensor in tensors:
        blocked = tensor.tensor_type.name in ("Q4_0", "Q8_0")
        values = gguf.dequantize(tensor.data, tensor.tensor_type) if blocked else np.array(tensor.data)
        codes = _codes(values, tensor.data) if blocked else None
        if llama and tensor.name in ours:
            values, codes = (None if x is None else llama.reordered(tensor.name, x, back=True) for x in (values, codes))
        found[ours.get(tensor.name, tensor.name)] = values, codes
    return found


def _codes(values: np.ndarray, data: np.ndarray) -> np.ndarray:
    """The codes behind the package's own values: each over its block's scale, the first two bytes of a block."""
    blocks = values.shape[-1] // BLOCK
    raw = np.ascontiguousarray(data).reshape(*data.shape[:-1], blocks, -1)
    scale = np.ascontiguousarray(raw[..., :2]).view(np.float16).astype(np.float32)
    return np.rint(values.reshape(*values.shape[:-1], blocks, BLOCK) / scale).astype(np.int8).reshape(values.shape)
