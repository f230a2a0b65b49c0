"""GGUF, the file of llama.cpp: weights in blocks of 32 that share a float16 scale, in 8 bits (Q8_0) or 4 (Q4_0).

The file holds weights and no activation grids, so it is for models trained on such blocks with float activations; then
codes and scales in it are the trained ones, bit for bit. Tensors have the names of the float model's state_dict.
llama.cpp itself runs only the architectures that it has code for.
"""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qat.errors import UserError
from qat.export.target import Target
from qat.export.torch_runner import TorchRunner
from qat.insert import Plan
from qat.integer import IntegerTensor

BLOCK = 32
ARCHITECTURE = "qat"
WAY_OUT = "train with granularity=group group_size=32 scale=float16"


class GgufTarget(Target):
    """GGUF, read back by the `gguf` package and run by torch as the float model that it stands for."""

    file = "model.gguf"
    package = extra = "gguf"

    def unfit(self, model: nn.Module, plan: Plan) -> str | None:
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

        writer = gguf.GGUFWriter(folder / self.file, ARCHITECTURE)
        integer = {name: m for name, m in model.named_modules() if isinstance(m, IntegerTensor)}
        for name, tensor in integer.items():
            blocks, kind = _blocks(name, tensor)
            writer.add_tensor(f"{_layer(name)}.weight", blocks, raw_dtype=gguf.GGMLQuantizationType[kind])
        for key, value in model.state_dict().items():
            if not any(key.startswith(f"{name}.") for name in integer):
                writer.add_tensor(key, np.atleast_1d(value.numpy()))
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()

    def open(self, path: Path, model: nn.Module, *, optimize: bool = True, threads: int = 0) -> TorchRunner:
        model = copy.deepcopy(model).cpu().eval()
        tensors = read_gguf(path)
        state = {name: torch.from_numpy(value) for name, (value, _) in tensors.items()}
        try:
            own = model.state_dict()
            model.load_state_dict({k: v.view(own[k].shape) if k in own else v for k, v in state.items()})
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise UserError(f"{path}: holds another architecture than {type(model).__name__}: {reason}") from None
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
    """What the `gguf` package finds in a file: the values of each tensor, and its codes if it is of blocks.

    Raises:
        UserError: if the package refuses the file.
    """
    import gguf  # pyright: ignore[reportMissingImports]

    try:
        tensors: list[Any] = gguf.GGUFReader(path).tensors
    except Exception as error:  # whatever its reader stumbles over
        raise UserError(f"{path}: gguf refuses it: {str(error).splitlines()[0]}") from None
    found = {}
    for tensor in tensors:
        blocked = tensor.tensor_type.name in ("Q4_0", "Q8_0")
        values = gguf.dequantize(tensor.data, tensor.tensor_type) if blocked else np.array(tensor.data)
        found[tensor.name] = values, _codes(values, tensor.data) if blocked else None
    return found


def _codes(values: np.ndarray, data: np.ndarray) -> np.ndarray:
    """The codes behind the package's own values: each over its block's scale, the first two bytes of a block."""
    blocks = values.shape[-1] // BLOCK
    raw = np.ascontiguousarray(data).reshape(*data.shape[:-1], blocks, -1)
    scale = np.ascontiguousarray(raw[..., :2]).view(np.float16).astype(np.float32)
    return np.rint(values.reshape(*values.shape[:-1], blocks, BLOCK) / scale).astype(np.int8).reshape(values.shape)
