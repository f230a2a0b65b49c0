"""Reading weights from files that may come from anywhere.

They are safetensors, or checkpoints that torch's weights-only unpickler reads: no code in a file ever runs.
"""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from qat.errors import UserError, nearest
from qat.run_files import FLOAT_WEIGHTS

CHECKPOINT_KEY, STATE_KEY = "qat", "qat_state"
"""Keys of a quantized model's checkpoint besides the model's own state: its plan, and the state of quantizers."""
SUFFIXES = (".ckpt", ".safetensors")
STATISTICS = ("running_mean", "running_var")


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Loads a `.ckpt`/`.pt` file as plain containers and tensors, or a `.safetensors` file as `{"state_dict": ...}`.

    Raises:
        UserError: if it is missing, damaged, or holds objects that only running its code could build.
    """
    path = Path(path)
    if not path.is_file():
        if path.exists():
            raise UserError(f"checkpoint {path}: is no file; name the .ckpt or .safetensors itself")
        siblings = [p.name for suffix in SUFFIXES for p in sorted(path.parent.glob(f"*{suffix}"))]
        raise UserError(f"checkpoint {path}: no such file{nearest(path.name, siblings) if siblings else ''}")
    try:
        if path.suffix == ".safetensors":
            return {"state_dict": load_file(path)}
        _check_sums(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Weights only load failed" in str(error) and zipfile.is_zipfile(path):
            raise UserError(
                f"checkpoint {path}: holds Python objects besides tensors and plain containers, "
                "and loading them could run any code; save a state_dict (or plain hyperparameters) instead"
            ) from None
        raise UserError(f"checkpoint {path}: is damaged or no checkpoint") from None
    except UserError:
        raise
    except Exception as error:  # a damaged stream makes an unpickler raise whatever its opcodes stumble over
        raise UserError(f"checkpoint {path}: is damaged or no checkpoint ({type(error).__name__})") from None
    if not isinstance(content, dict):
        raise UserError(f"checkpoint {path}: holds a {type(content).__name__}, not a state_dict")
    if not isinstance(content.get("state_dict"), dict):
        return {"state_dict": content}
    join_state(content)
    return content


def split_state(checkpoint: dict[str, Any], quantizers: set[str]) -> None:
    """Moves the state of the modules `quantizers` out of `state_dict`, to `qat_state`, in place."""
    state: dict[str, Tensor] = checkpoint["state_dict"]
    own = {key for key in state if key.rpartition(".")[0] in quantizers}
    checkpoint["state_dict"] = {key: value for key, value in state.items() if key not in own}
    checkpoint[STATE_KEY] = {key: state[key] for key in state if key in own}


def join_state(checkpoint: dict[str, Any]) -> None:
    """Undoes `split_state` in place; nothing happens to a checkpoint that was not split."""
    if isinstance(split := checkpoint.pop(STATE_KEY, {}), dict):
        checkpoint["state_dict"] = {**checkpoint["state_dict"], **split}


def _check_sums(path: Path) -> None:
    """Holds every part of a checkpoint against the CRC-32 beside it, which torch writes and does not read."""
    if not zipfile.is_zipfile(path):
        return  # the format before 1.6 has none
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise UserError(f"checkpoint {path}: is damaged: '{damaged}' does not have the checksum that it states")


def not_finite(model: nn.Module) -> str | None:
    """The first trained parameter or running statistic with NaN or infinity in it; buffers may hold a mask of -inf."""
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    statistics = {name: value for name, value in model.named_buffers() if name.endswith(STATISTICS)}
    return next((name for name, value in (trained | statistics).items() if not value.isfinite().all()), None)


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Loads float weights into a float model, strictly.

    Raises:
        UserError: naming the file and the first keys or shapes that do not fit, or the first weight that is not finite.
    """
    checkpoint = read_checkpoint(path)
    state: dict[str, Tensor] = checkpoint["state_dict"]
    own = model.state_dict()
    # A BatchNorm's step counter matters to nothing but cumulative averaging, and many published files leave it out.
    optional = {k for k in own if k.endswith("num_batches_tracked")}
    if missing := [k for k in own if k not in state and k not in optional]:
        raise UserError(
            f"checkpoint {path}: lacks '{missing[0]}' ({len(missing)} keys missing){nearest(missing[0], state)}"
        )
    if extra := [k for k in state if k not in own]:
        if CHECKPOINT_KEY in checkpoint:
            raise UserError(f"checkpoint {path}: is quantized, and a float model is wanted{_float_beside(Path(path))}")
        raise UserError(
            f"checkpoint {path}: has '{extra[0]}', which {type(model).__name__} lacks ({len(extra)} such keys)"
            f"{nearest(extra[0], own)}"
        )
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.shape != own[key].shape:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise UserError(
                f"checkpoint {path}: '{key}' is {shape}, but {type(model).__name__} has {tuple(own[key].shape)}"
            )
    model.load_state_dict({**{k: own[k] for k in optional}, **state})
    if (name := not_finite(model)) is not None:
        raise UserError(f"checkpoint {path}: '{name}' holds NaN or infinity, with which no model works; take another")


def _float_beside(path: Path) -> str:
    """Where the float model is that a run's quantized one was made of."""
    found = next((p for folder in path.parents[:2] if (p := folder / FLOAT_WEIGHTS).is_file()), None)
    return f"; its float model is {found}" if found is not None else ""
