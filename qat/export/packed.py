"""The integer model as `model.safetensors` + `manifest.json`: codes packed to their true width, whatever it is, and
nothing that could run.

A code of b bits takes b bits: codes are shifted to start at zero (and halved where a grid has odd numbers alone), those
of floating-point formats are bit patterns, and their bits, lowest first, fill bytes from the lowest bit up. Ternary
codes take 1.6 bits: five of them, the first the lowest digit of a number to base 3, make a byte. Scales take
the bytes of their format (`qat.export.packed_scales`). The manifest says how to read every tensor (shape, bits, first
code, distance of codes; format and unit of scales), holds the plan (so that the model can be rebuilt) and checksums of
the weights file and of itself.
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qat import __version__
from qat.convert import EVERYTHING, Holds, convert
from qat.copies import copied
from qat.errors import UserError
from qat.export.manifest import check_unclaimed, digest, stated, valid_manifest
from qat.export.packed_scales import pack_scale, unpack_scale
from qat.export.target import Target, misfit
from qat.export.torch.runner import TorchRunner
from qat.files import atomic, sha256
from qat.insert import apply_plan, named_quantizers
from qat.integer import IntegerTensor, weight_codes
from qat.measure.cost import TRITS
from qat.planning.plan import Plan

WEIGHTS, MANIFEST = "model.safetensors", "manifest.json"
FORMAT = 3


def pack(codes: Tensor, bits: int, first: int, distance: int = 1) -> Tensor:
    """Packs the integers `first`, `first + distance` and so on, `2**bits` of them, into bytes.

    Returns:
        uint8 `[ceil(codes.numel() * bits / 8)]`.
    """
    shifted = codes.flatten().to(torch.int64) - first
    if codes.numel() and not (int(shifted.min()) >= 0 and int(shifted.max()) < distance * 2**bits):
        raise ValueError(f"codes {int(codes.min())} .. {int(codes.max())} do not fit {bits} bits from {first}")
    if (shifted % distance).any():
        raise ValueError(f"codes are not all {first} and a multiple of {distance}")
    stream = ((shifted // distance)[:, None] >> torch.arange(bits)) & 1
    stream = nn.functional.pad(stream.flatten(), (0, -stream.numel() % 8)).view(-1, 8)
    return (stream << torch.arange(8)).sum(1).to(torch.uint8)


def unpack(
    packed: Tensor, bits: int, first: int, shape: tuple[int, ...], dtype: torch.dtype, distance: int = 1
) -> Tensor:
    """The inverse of `pack`."""
    count = torch.Size(shape).numel()
    stream = ((packed.to(torch.int64)[:, None] >> torch.arange(8)) & 1).flatten()[: count * bits].view(count, bits)
    return ((stream << torch.arange(bits)).sum(1) * distance + first).to(dtype).view(shape)


def pack_trits(codes: Tensor) -> Tensor:
    """Packs codes -1, 0 and 1, five into a byte.

    Returns:
        uint8 `[ceil(codes.numel() / 5)]`.
    """
    digits = codes.flatten().to(torch.int64) + 1
    if codes.numel() and not (int(digits.min()) >= 0 and int(digits.max()) <= 2):
        raise ValueError(f"codes {int(codes.min())} .. {int(codes.max())} are not -1, 0 and 1")
    digits = nn.functional.pad(digits, (0, -digits.numel() % TRITS)).view(-1, TRITS)
    return (digits * 3 ** torch.arange(TRITS)).sum(1).to(torch.uint8)


def unpack_trits(packed: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The inverse of `pack_trits`."""
    digits = packed.to(torch.int64)[:, None] // 3 ** torch.arange(TRITS) % 3
    return (digits.flatten()[: torch.Size(shape).numel()] - 1).to(dtype).view(shape)


def _integer_tensors(model: nn.Module) -> dict[str, IntegerTensor]:
    """The weights, stored packed, by their name (int32 biases gain nothing from it)."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, IntegerTensor) and module.bits <= 16
    }


def _layout(tensor: IntegerTensor) -> dict[str, int]:
    """Bits, first code and distance of codes."""
    if tensor.odd and (tensor.codes % 2 != 0).all():  # a channel that a BatchNorm made constant has zeros
        return {"bits": tensor.bits - 1, "first_code": 1 - 2 ** (tensor.bits - 1), "distance": 2}
    signed = tensor.codes.dtype in (torch.int8, torch.int16)
    return {"bits": tensor.bits, "first_code": -(2 ** (tensor.bits - 1)) if signed else 0, "distance": 1}


def save_packed(model: nn.Module, plan: Plan, folder: str | Path) -> None:
    """Writes a converted model into `folder`; both files whole or not at all."""
    folder = Path(folder)
    tensors: dict[str, Tensor] = {}
    manifest: dict[str, Any] = {"packed": {}, "trits": {}, "scales": {}, "zeros": {}, "shared": {}}
    first_key: dict[int, str] = {}
    packable = _integer_tensors(model)
    for key, value in model.state_dict(keep_vars=True).items():
        owner, _, leaf = key.rpartition(".")
        if (first := first_key.setdefault(id(value), key)) != key:  # a tied weight, or a grid that several share
            manifest["shared"][key] = first
        elif (tensor := packable.get(owner)) is None:
            tensors[key] = value.detach().clone().contiguous()
        else:
            _store(tensors, manifest, key, leaf, tensor)
    with atomic(folder / WEIGHTS) as weights, atomic(folder / MANIFEST) as described_in:
        save_file(tensors, weights)
        manifest = {"format": FORMAT, "qat": __version__, "sha256": sha256(weights)} | {
            key: entries for key, entries in manifest.items() if entries or key == "packed"
        }
        manifest |= {"plan": plan.to_dict()}
        manifest["manifest_sha256"] = digest(manifest)
        described_in.write_text(json.dumps(manifest, indent=1))


def packed_bytes(model: nn.Module, plan: Plan) -> int:
    """Bytes of the weights file of a converted model."""
    with tempfile.TemporaryDirectory() as folder:
        save_packed(model, plan, folder)
        return (Path(folder) / WEIGHTS).stat().st_size


def _store(tensors: dict[str, Tensor], manifest: dict[str, Any], key: str, leaf: str, tensor: IntegerTensor) -> None:
    """Writes the codes, scales or zero points of a weight, and how."""
    value = getattr(tensor, leaf)
    if leaf == "codes":
        described = {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
        if tensor.trits:
            tensors[key], manifest["trits"][key] = pack_trits(value), described
        else:
            layout = _layout(tensor)
            tensors[key] = pack(value, layout["bits"], layout["first_code"], layout["distance"])
            manifest["packed"][key] = described | layout
    elif leaf == "zero_point" and tensor.number is not None:
        manifest["zeros"][key] = list(value.shape)
    elif leaf == "scale" and (stored := pack_scale(value, tensor.scale_format)) is not None:
        tensors[key], unit = stored[0].contiguous(), stored[1]
        manifest["scales"][key] = {"format": tensor.scale_format, "unit": unit}
    else:
        tensors[key] = value.detach().clone().contiguous()


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Reads the manifest and checks the weights file against it.

    Raises:
        UserError: if either file is missing, damaged, swapped, or of another format version.
    """
    folder = Path(folder)
    manifest = valid_manifest(folder / MANIFEST, FORMAT)
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder / WEIGHTS}: no such file; a packed model is {WEIGHTS} beside {MANIFEST}")
    if sha256(folder / WEIGHTS) != manifest.get("sha256"):
        raise UserError(f"{folder / WEIGHTS}: does not match {MANIFEST}: damaged, or of another model")
    return manifest


def load_packed(model: nn.Module, folder: str | Path) -> nn.Module:
    """Rebuilds the integer model.

    Args:
        model: A float model of the right architecture, whatever its weights; it is left as it is.
        folder: The folder that `save_packed` wrote into.

    Raises:
        UserError: if the files are unfit (see `read_manifest`) or belong to another architecture.
    """
    manifest = read_manifest(folder)
    tensors, plan = _tensors(Path(folder), manifest), _plan(Path(folder), manifest)
    skeleton = _skeleton(model, plan)
    for name, tensor in _integer_tensors(skeleton).items():
        if how := manifest["packed"].get(f"{name}.codes"):
            tensor.bits = how["bits"] + (how["distance"] == 2)
    try:
        skeleton.load_state_dict(tensors)
    except RuntimeError as error:
        raise misfit(folder, model, error) from None
    return skeleton


def _tensors(folder: Path, manifest: dict[str, Any]) -> dict[str, Tensor]:
    """Tensors of the weights file, unpacked."""
    try:
        tensors = load_file(folder / WEIGHTS)
        for key, how in manifest["packed"].items():
            shape, dtype = tuple(how["shape"]), getattr(torch, how["dtype"])
            tensors[key] = unpack(tensors[key], how["bits"], how["first_code"], shape, dtype, how["distance"])
        for key, how in manifest.get("trits", {}).items():
            tensors[key] = unpack_trits(tensors[key], tuple(how["shape"]), getattr(torch, how["dtype"]))
        for key, how in manifest.get("scales", {}).items():
            tensors[key] = unpack_scale(tensors[key], how["format"], how["unit"])
        tensors |= {key: torch.zeros(shape, dtype=torch.uint8) for key, shape in manifest.get("zeros", {}).items()}
        tensors |= {key: tensors[first] for key, first in manifest.get("shared", {}).items()}
    except (SafetensorError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{folder / MANIFEST}: is damaged ({error})") from None
    return tensors


def _plan(folder: Path, manifest: dict[str, Any]) -> Plan:
    try:
        return Plan.from_dict(manifest["plan"])
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / MANIFEST}: is damaged ({error})") from None


def _skeleton(model: nn.Module, plan: Plan) -> nn.Module:
    """A converted model of the right shape, with meaningless numbers (ones: any weight would do if it can be converted,
    and parametrizations can normalize it)."""
    shell = copied(model).cpu()
    for parameter in shell.parameters():
        parameter.data.fill_(1)
    apply_plan(shell, plan)
    for _, quantizer in named_quantizers(shell):
        quantizer.initialised.fill_(True)
        quantizer.enable()
    return convert(shell, plan, EVERYTHING)


def packed_codes(folder: str | Path) -> dict[str, np.ndarray]:
    """The integer weights in a packed model, by layer."""
    tensors = _tensors(Path(folder), read_manifest(folder))
    return {name: codes.numpy() for name, codes in weight_codes(tensors).items()}


class PackedTarget(Target):
    """`model.safetensors` + `manifest.json`, loaded back into the architecture and run by torch."""

    file = WEIGHTS
    max_bits = 16
    graph = None
    holds: ClassVar[Holds] = EVERYTHING

    def check_place(self, path: Path, companions: Sequence[Path] = ()) -> None:
        beside = path.with_name(MANIFEST)
        listed = (WEIGHTS, MANIFEST) if "packed" in stated(beside) else ()
        check_unclaimed([path, beside], listed, type(self).__name__)

    def export(self, model: nn.Module, plan: Plan, example: Tensor | None, path: Path) -> None:
        if path.name != WEIGHTS:
            folder = path.parent if path.suffix else path
            raise UserError(f"{path}: a packed model is {WEIGHTS} beside {MANIFEST}; name {folder / WEIGHTS}")
        self.check_place(path)
        save_packed(model, plan, path.parent)

    def load(self, path: Path, model: nn.Module, *, optimize: bool = True, threads: int = 0) -> TorchRunner:
        return TorchRunner(load_packed(model, path.parent), path, list(packed_codes(path.parent)))

    def codes(self, path: Path) -> dict[str, np.ndarray]:
        return packed_codes(path.parent)
