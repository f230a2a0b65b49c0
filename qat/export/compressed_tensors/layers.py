"""One layer as compressed-tensors stores it, and back; packing and unpacking are the package's own."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qat.export.compressed_tensors.schemes import SCALE_TYPES, Args
from qat.grid.formats import FLOATS
from qat.grid.functional import TINY
from qat.quantizers import Quantizer

LARGEST = FLOATS["e4m3"].largest


def config_of(
    prefix: str, inner: nn.Module, args: Mapping[str, tuple[Args, Args | None]]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The `quantization_config` of config.json, and the storage format of every layer.

    Args:
        prefix: Beginning of the names in `args`, which names in the file do not have.
        inner: The `transformers` model.
        args: Settings of the weight and the input of every quantized layer.
    """
    import compressed_tensors as package  # pyright: ignore[reportMissingImports]
    from compressed_tensors.compressors.format import infer_module_format  # pyright: ignore[reportMissingImports]
    from compressed_tensors.quantization import QuantizationScheme  # pyright: ignore[reportMissingImports]

    groups: list[tuple[tuple[Args, Args | None], list[str]]] = []
    for name, pair in args.items():
        names = next((names for known, names in groups if known == pair), None)
        if names is None:
            groups.append((pair, names := []))
        names.append(name.removeprefix(prefix))
    described, formats = {}, {}
    for index, (pair, names) in enumerate(groups):
        targets = ["Linear"] if len(groups) == 1 else names
        described_by = {"targets": targets, "weights": pair[0], "input_activations": pair[1]}
        scheme = QuantizationScheme.model_validate(described_by)
        kind = infer_module_format(nn.Linear, scheme).value
        described[f"group_{index}"] = scheme.model_dump(mode="json") | {"format": kind}
        formats |= {f"{prefix}{name}": kind for name in names}
    linear = [name for name, module in inner.named_modules() if isinstance(module, nn.Linear)]
    kinds = set(formats.values())
    return {
        "quant_method": "compressed-tensors",
        "version": package.__version__,
        "quantization_status": "compressed",
        "format": kinds.pop() if len(kinds) == 1 else "mixed-precision" if kinds else "dense",
        "config_groups": described,
        "ignore": [name for name in linear if f"{prefix}{name}" not in args],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }, formats


def layer_tensors(layer: Any, weight: Args, inputs: Args | None, kind: str) -> dict[str, Tensor]:
    """The tensors of one layer, by the names that the format gives them.

    Args:
        layer: A fake-quantized Linear layer.
        weight, inputs: Arguments of its grids.
        kind: The storage format.
    """
    quantizer: Quantizer = layer.weight_quantizer
    codes, scale = quantizer.quantize(layer.weight), _scales(quantizer, layer.weight)
    zeros: dict[str, Tensor] = {}
    if not weight["symmetric"]:
        codes, zero_point = (_signed(t, weight) for t in (codes, quantizer.zero_point.view(scale.shape)))
        zeros = _zeros(zero_point, weight)
    found = _weight(codes, kind, weight) | _scale(scale, weight) | zeros
    if inputs is not None and inputs["dynamic"] is False:
        grid: Quantizer = layer.input_quantizer if isinstance(layer.input_quantizer, Quantizer) else (
            layer.input_quantizer[0]
        )  # fmt: skip
        found["input_scale"] = grid.step().view(1)
        if not inputs["symmetric"]:
            shift = 0 if grid.spec.signed else 2 ** (inputs["num_bits"] - 1)
            found["input_zero_point"] = (grid.zero_point.view(1) - shift).to(torch.int8)
    if inputs is not None and inputs["dynamic"] == "local":
        found["input_global_scale"] = 1 / layer.input_quantizer.scale
    return {key: value.detach().clone().contiguous() for key, value in found.items()}


def _signed(codes: Tensor, args: Args) -> Tensor:
    """The format has signed codes: unsigned ones move by half of their range."""
    return (codes.to(torch.int16) - 2 ** (args["num_bits"] - 1)).to(torch.int8)


def _zeros(zeros: Tensor, args: Args) -> dict[str, Tensor]:
    """Zero points `(channels, 1)` or `(channels, groups)`, packed along the channels."""
    from compressed_tensors.compressors.pack_quantized import pack_to_int32  # pyright: ignore[reportMissingImports]

    return {"weight_zero_point": pack_to_int32(zeros, args["num_bits"], packed_dim=0)}


def _scales(quantizer: Quantizer, weight: Tensor) -> Tensor:
    """`(1,)`, `(channels, 1)` or `(channels, groups)`."""
    scale = quantizer.grid(weight)[0].detach().clamp_min(TINY)
    return scale.flatten(1) if scale.ndim > 1 else scale


def _weight(codes: Tensor, kind: str, args: Args) -> dict[str, Tensor]:
    from compressed_tensors.compressors.nvfp4.helpers import (  # pyright: ignore[reportMissingImports]
        pack_fp4_to_uint8,
    )
    from compressed_tensors.compressors.pack_quantized import pack_to_int32  # pyright: ignore[reportMissingImports]

    if args["type"] == "float":
        if args["num_bits"] == 4:
            return {"weight_packed": pack_fp4_to_uint8(FLOATS["e2m1"].decode(codes))}
        return {"weight": codes.view(torch.float8_e4m3fn)}
    if kind != "pack-quantized":
        return {"weight": codes}
    return {"weight_packed": pack_to_int32(codes, args["num_bits"]), "weight_shape": torch.tensor(codes.shape)}


def _scale(scale: Tensor, args: Args) -> dict[str, Tensor]:
    match args.get("scale_dtype"):
        case None:
            return {"weight_scale": scale}
        case kind if kind == SCALE_TYPES["e8m0"]:
            return {"weight_scale": (scale.view(torch.int32) >> 23).to(torch.uint8)}  # powers of two: the exponent
    unit = scale.amax() / LARGEST
    blocks = FLOATS["e4m3"]((scale / unit).clamp_max(LARGEST)).to(torch.float8_e4m3fn)
    return {"weight_scale": blocks, "weight_global_scale": (1 / unit).view(1)}


def stored_codes(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The codes of every layer in a file: the values that the package's decompressor finds, over their scales.

    Args:
        tensors: All tensors of the file.
        config: The `quantization_config` of the file.

    Returns:
        By layer, what `Quantizer.quantize` gives: int8, or bit patterns of floating-point formats as uint8.
    """
    from compressed_tensors.compressors import BaseCompressor  # pyright: ignore[reportMissingImports]
    from compressed_tensors.quantization import QuantizationScheme  # pyright: ignore[reportMissingImports]

    schemes = [QuantizationScheme.model_validate(group) for group in config["config_groups"].values()]
    found = {}
    for name in [key.removesuffix(".weight_scale") for key in tensors if key.endswith(".weight_scale")]:
        scheme: Any = next(s for s in schemes if name in s.targets or s.targets == ["Linear"])
        state = {key.rpartition(".")[2]: t for key, t in tensors.items() if key.rpartition(".")[0] == name}
        compressor: Any = BaseCompressor.get_value_from_registry(scheme.format)
        state = compressor.decompress(state, scheme)
        found[name] = _codes(state, scheme.weights)
    return found


def _codes(state: Mapping[str, Tensor], args: Any) -> np.ndarray:
    """Codes of one decompressed layer; bfloat16 values are still nearest to the level that they came from."""
    scale, value = state["weight_scale"].float(), state["weight"].float()
    if "weight_global_scale" in state:
        scale = scale / state["weight_global_scale"]
    level = value / (scale.repeat_interleave(value.shape[1] // scale.shape[1], 1) if scale.ndim > 1 else scale)
    if args.type == "float":
        element = FLOATS["e2m1" if args.num_bits == 4 else "e4m3"]
        return element.encode(element(level.clamp(-element.largest, element.largest))).numpy()
    if args.symmetric:
        return level.round().to(torch.int8).numpy()
    zeros = state["weight_zero_point"].to(torch.int16)
    zeros = zeros.repeat_interleave(level.shape[1] // zeros.shape[1], 1)
    return (level.round() + zeros + 2 ** (args.num_bits - 1)).to(torch.uint8).numpy()
