"""compressed-tensors: a folder with safetensors and a config that vLLM and `transformers` load as a quantized model.

The folder is written from the fake-quantized model, not from a converted one: the format also has floating-point codes
and scales that are measured as they pass. It holds the `transformers` model alone, under its own names, without the
LightningModule around it; the module's name is in the metadata of the safetensors file. Everything that is not
quantized is float32 in the file.

`transformers` decompresses the weights and computes in float what the codes stand for. Integers and e4m3 have float32
scales, and then its logits are those of the fake-quantized model to the bit. Blocks of e2m1 and e4m3 it decompresses to
bfloat16, so their config asks for a model in bfloat16; verification loads it in float32, to see the values alone:
bfloat16 holds those of MXFP4 and MXFP8 exactly, and of NVFP4, which has two scales, to within 2 ** -9 of a weight.
"""

import contextlib
import io
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qat.copies import copied
from qat.errors import UserError, first_line
from qat.export.compressed_tensors import schemes
from qat.export.compressed_tensors.layers import config_of, layer_tensors, stored_codes
from qat.export.target import Target
from qat.export.torch.runner import TorchRunner
from qat.integer import IntegerLayer
from qat.layers import QuantizedLayer, original_class
from qat.planning.plan import Plan
from qat.process import silent
from qat.quantizers import Quantizer

WEIGHTS, CONFIG = "model.safetensors", "config.json"
MODULE_KEY = "qat.module"
"""Metadata of the weights file: where in the trained module the `transformers` model is."""
TO_BFLOAT16 = ("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized")
"""Formats that `transformers` decompresses to bfloat16, so that the rest of the model has to be in it, too."""


class CompressedTensorsTarget(Target):
    """A folder for `AutoModelForCausalLM.from_pretrained` and `vllm serve`; the manifest is beside it, not in it."""

    file = "compressed-tensors"
    graph = None
    package = "compressed_tensors"
    extra = "compressed-tensors"
    integer = False

    @classmethod
    def owns(cls, path: Path) -> bool:
        return (path / CONFIG).is_file()

    def model_refusal(self, model: nn.Module, plan: Plan) -> str | None:
        try:
            args = schemes.schemes(plan)
            prefix, _ = transformers_model(model)
        except UserError as error:
            return str(error)
        modules = dict(model.named_modules())
        readers: dict[int, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            if "weight" in module._parameters:
                readers.setdefault(id(module._parameters["weight"]), []).append(name)
        for name in args:
            kind = original_class(modules[name])
            if not issubclass(kind, nn.Linear) or not name.startswith(prefix):
                return (
                    f"'{name}' is a {kind.__name__}, and the format has Linear layers of the transformers model alone; "
                    f'add a rule {{match: "{name}", weight: off, act: off}}'
                )
            shared = [n for n in readers[id(modules[name]._parameters["weight"])] if n != name]
            if shared:
                return (
                    f"'{name}' has the same weight as '{shared[0]}', of which the format would make two; leave it "
                    f'float with a rule {{match: "{name}", weight: off, act: off}}, or untie them'
                )
        return None

    @torch.no_grad()
    def write(self, model: nn.Module, plan: Plan, example: Tensor, folder: Path) -> None:
        if any(isinstance(module, IntegerLayer) for module in model.modules()):
            raise UserError(f"{self.file}: is written from the fake-quantized model; this one is converted")
        prefix, inner = transformers_model(model)
        args = schemes.schemes(plan)
        config, formats = config_of(prefix, inner, args)
        tensors: dict[str, Tensor] = {}
        for name, (weight, inputs) in args.items():
            layer: Any = model.get_submodule(name)
            for key, value in layer_tensors(layer, weight, inputs, formats[name]).items():
                tensors[f"{name.removeprefix(prefix)}.{key}"] = value
        tensors |= _rest(inner, {name.removeprefix(prefix) for name in args})
        (made := folder / self.file).mkdir()
        _write_config(inner, config, "bfloat16" if any(f in TO_BFLOAT16 for f in formats.values()) else "float32", made)
        metadata = {"format": "pt", MODULE_KEY: prefix.removesuffix(".")}
        save_file(tensors, made / WEIGHTS, metadata)

    def open(self, path: Path, model: nn.Module, *, optimize: bool = True, threads: int = 0) -> TorchRunner:
        module = copied(model).cpu().eval()
        prefix, inner = transformers_model(module)
        with silent(logging.ERROR), contextlib.redirect_stderr(io.StringIO()):  # where progress bars go
            loaded = _load(path, original_class(inner))
        holder, _, leaf = prefix.removesuffix(".").rpartition(".")
        if not prefix:
            module = loaded
        else:
            setattr(module.get_submodule(holder), leaf, loaded)
        return TorchRunner(module, path, list(self.codes(path)))

    def codes(self, path: Path) -> dict[str, np.ndarray]:
        with safe_open(path / WEIGHTS, "pt") as file:
            prefix = (file.metadata() or {}).get(MODULE_KEY, "")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dict
        config = json.loads((path / CONFIG).read_text())["quantization_config"]
        return {f"{prefix}.{name}".lstrip("."): codes for name, codes in stored_codes(tensors, config).items()}


def transformers_model(module: nn.Module) -> tuple[str, nn.Module]:
    """The one model of `transformers` in a module, and what its names begin with there (`model.`).

    Raises:
        UserError: if there is none, or several.
    """
    from transformers import PreTrainedModel  # pyright: ignore[reportMissingImports]

    found = {name: m for name, m in module.named_modules() if isinstance(m, PreTrainedModel)}
    outer = [name for name in found if not any(name.startswith(f"{o}." if o else "") for o in found if o != name)]
    if len(outer) != 1:
        held = f"holds {len(outer)} of them ({', '.join(outer)})" if outer else "holds none"
        raise UserError(f"compressed-tensors is for one model of transformers, and {type(module).__name__} {held}")
    return (f"{outer[0]}." if outer[0] else ""), found[outer[0]]


def _rest(inner: nn.Module, quantized: set[str]) -> dict[str, Tensor]:
    """Tensors that stay float, each under its first name: tied ones are tied again by `transformers`."""
    inside = {f"{name}." for name, m in inner.named_modules(remove_duplicate=False) if isinstance(m, Quantizer)}
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, value in inner.state_dict(keep_vars=True).items():
        layer, _, leaf = key.rpartition(".")
        if f"{layer}." in inside or id(value) in seen:
            continue
        seen.add(id(value))
        module = inner.get_submodule(layer)
        if leaf == "bias" and isinstance(module, QuantizedLayer):
            value = module.quantized_bias()  # as evaluation adds it
            assert value is not None
        elif layer in quantized:
            continue
        found[key] = (value.float() if value.is_floating_point() else value).detach().clone().contiguous()
    return found


def _write_config(inner: Any, quantization: dict[str, Any], dtype: str, folder: Path) -> None:
    config = inner.config.to_diff_dict() | {
        "architectures": [original_class(inner).__name__],
        "dtype": dtype,
        "quantization_config": quantization,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    if inner.can_generate():
        inner.generation_config.save_pretrained(folder)


def _has_zero_points(path: Path) -> bool:
    """Whether weights have zero points. Packed, these have a shape that `transformers` expects only where it
    decompresses as it loads.
    """
    groups = json.loads((path / CONFIG).read_text())["quantization_config"]["config_groups"]
    return any(not group["weights"]["symmetric"] for group in groups.values())


def _load(path: Path, kind: type) -> nn.Module:
    from transformers import CompressedTensorsConfig  # pyright: ignore[reportMissingImports]

    loader: Any = kind
    settings: dict[str, Any] = {"output_loading_info": True, "local_files_only": True, "dtype": torch.float32}
    if at_once := _has_zero_points(path):
        settings["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    try:
        model, said = loader.from_pretrained(path, **settings)
        if not at_once:
            model.hf_quantizer.compressor.decompress_model(model)
    except Exception as error:  # whatever transformers stumbles over
        raise UserError(f"{path}: transformers refuses it: {first_line(error)}") from None
    wrong = {k: v for k, v in said.items() if v and k in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    for what, keys in wrong.items():
        raise UserError(f"{path}: transformers finds {what.replace('_', ' ')}, first of them '{sorted(keys)[0]}'")
    # Not model.float(), which transformers forbids: two formats decompress to bfloat16, and the rest is float32.
    return nn.Module.float(model).eval()
