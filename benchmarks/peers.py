"""The same networks in other people's quantization-aware training, for `--peers`.

Each peer is prepared the way its documentation recommends, at W8A8 with per-channel weights and per-tensor activations,
calibrated on the batch that is given. What they do differs, and costs accordingly:

    torchao    `QATConfig`: ranges anew in every forward, from the weight and per token (per tensor is not on offer);
               Linear only
    PT2E       torchao's `prepare_qat_pt2e` of an exported graph: moving-average ranges, BatchNorm folded in training
    Brevitas   `layerwise_quantize`: activation scales are learned, weight scales follow the weight's maximum
    ModelOpt   `INT8_DEFAULT_CFG`: all ranges frozen at calibration
    quanto     activation scales frozen at calibration, weight scales from the maximum; no clip mask in its gradient;
               keeps int8 codes for backward, and a Linear's forward multiplies them as integers

None is needed: one that is absent, or fails, says so in its place in the table. Nothing of a peer is imported before it
is asked for.

    pip install torchao==0.18.0 brevitas==0.13.4 nvidia-modelopt==0.47.0 optimum-quanto==0.2.7
"""

import copy
import logging
import os
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")
Operation = tuple[Callable[[Tensor], Tensor], list[Tensor]]
"""A fake quantization of one tensor, and the parameters it learns."""


class PeerError(Exception):
    """A peer that can't be compared: `str` is short enough for a table cell."""


def torchao(model: nn.Module, x: Tensor) -> nn.Module:
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    if any(isinstance(m, nn.Conv2d) for m in model.modules()):
        raise PeerError("no Conv2d")
    acts = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    weights = IntxFakeQuantizeConfig(torch.int8, "per_channel", is_symmetric=True)
    quantize_(model, QATConfig(activation_config=acts, weight_config=weights, step="prepare"))
    return model


def torchao_operation(x: Tensor) -> Operation:
    from torchao.quantization.qat import IntxFakeQuantizeConfig
    from torchao.quantization.qat.fake_quantizer import IntxFakeQuantizer

    module = IntxFakeQuantizer(IntxFakeQuantizeConfig(torch.int8, "per_channel", is_dynamic=False, range_learning=True))
    module._initialized = True  # what its `initialize_fake_quantizers` does before the first forward
    module(x.detach())
    return module, list(module.parameters())


def pt2e(model: nn.Module, x: Tensor) -> nn.Module:
    from torchao.quantization.pt2e import allow_exported_model_train_eval
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    batch = torch.export.Dim("batch", min=1, max=4096)
    exported = torch.export.export(model.train(), (x,), dynamic_shapes=({0: batch},)).module()
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
    prepared = allow_exported_model_train_eval(prepare_qat_pt2e(exported, quantizer))
    prepared.eval()  # BatchNorm must not learn from calibration; ranges do so nevertheless
    with torch.no_grad():
        prepared(x)
    return prepared


def pt2e_operation(x: Tensor) -> Operation:
    from torchao.quantization.pt2e import FusedMovingAvgObsFakeQuantize

    module = FusedMovingAvgObsFakeQuantize(dtype=torch.int8, quant_min=-128, quant_max=127)
    module(x.detach())
    return module, []


def brevitas(model: nn.Module, x: Tensor) -> nn.Module:
    from brevitas import nn as qnn
    from brevitas.graph.calibrate import calibration_mode
    from brevitas.graph.quantize import layerwise_quantize
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat

    how = {"input_quant": Int8ActPerTensorFloat, "weight_quant": Int8WeightPerChannelFloat}
    layers = {nn.Linear: (qnn.QuantLinear, how), nn.Conv2d: (qnn.QuantConv2d, how)}
    prepared = layerwise_quantize(model, layers).eval()
    with torch.no_grad(), calibration_mode(prepared):
        prepared(x)
    return prepared


def brevitas_operation(x: Tensor) -> Operation:
    from brevitas import nn as qnn
    from brevitas.graph.calibrate import calibration_mode
    from brevitas.quant import Int8ActPerTensorFloat

    module = qnn.QuantIdentity(act_quant=Int8ActPerTensorFloat)
    with torch.no_grad(), calibration_mode(module):
        module(x)
    return module, list(module.parameters())


def modelopt(model: nn.Module, x: Tensor) -> nn.Module:
    import modelopt.torch.quantization as mtq

    return mtq.quantize(model.eval(), mtq.INT8_DEFAULT_CFG, lambda m: m(x))


def modelopt_operation(x: Tensor) -> Operation:
    from modelopt.torch.quantization.nn import TensorQuantizer

    module = TensorQuantizer(amax=x.detach().abs().max())
    return module, []


def quanto(model: nn.Module, x: Tensor) -> nn.Module:
    from optimum.quanto import Calibration, qint8, quantize

    quantize(model.eval(), weights=qint8, activations=qint8)
    with torch.no_grad(), Calibration():
        model(x)
    return model


def quanto_operation(x: Tensor) -> Operation:
    from optimum.quanto import qint8, quantize_activation

    scale = x.detach().abs().max() / 127
    return lambda t: quantize_activation(t, qint8, scale).dequantize(), []


@dataclass(frozen=True)
class Peer:
    """How to make its training model and its fake quantization.

    Attributes:
        module: What a user imports for it.
        prepare: Turns a float model into its W8A8 one, calibrated on the batch; may change the model in place.
        operation: Its fake quantization of one tensor with a range that fits it, with a learned scale where it has one.
    """

    module: str
    prepare: Callable[[nn.Module, Tensor], nn.Module]
    operation: Callable[[Tensor], Operation]


PEERS = {
    "torchao": Peer("torchao.quantization.qat", torchao, torchao_operation),
    "PT2E": Peer("torchao.quantization.pt2e.quantize_pt2e", pt2e, pt2e_operation),
    "Brevitas": Peer("brevitas.nn", brevitas, brevitas_operation),
    "ModelOpt": Peer("modelopt.torch.quantization", modelopt, modelopt_operation),
    "quanto": Peer("optimum.quanto", quanto, quanto_operation),
}


def attempt(peer: str, make: Callable[[Peer], T], notes: list[str]) -> T | str:
    """What `make` returns, or why there is nothing, in a few words.

    Args:
        peer: Name in `PEERS`.
        make: Given the peer.
        notes: Receives the message of what failed, on one line.
    """
    if find_spec(PEERS[peer].module.partition(".")[0]) is None:
        return "absent"
    logging.disable(logging.WARNING)  # they tell of GPU kernels that they did not load, and what they inserted
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            return make(PEERS[peer])
    except PeerError as error:
        return str(error)
    except Exception as error:
        notes.append(f"{peer}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        return type(error).__name__
    finally:
        logging.disable(logging.NOTSET)


def prepared(peer: Peer, model: nn.Module, x: Tensor) -> nn.Module:
    """A training model of the peer, in training mode, that was seen to quantize and to learn.

    Raises:
        PeerError: if in evaluation it computes what the float model does, or nothing like it, or some weight gets no
            gradient.
    """
    before = copy.deepcopy(model).eval()(x).detach()
    quantized = peer.prepare(copy.deepcopy(model), x)
    quantized.eval()
    error = float((quantized(x).detach() - before).norm() / before.norm())
    if not 1e-4 < error < 1:
        raise PeerError(f"off by {error:.1e}")
    quantized.train()  # a statement: that of an exported graph returns nothing
    quantized(x).square().mean().backward()
    weights = [w for w in quantized.parameters() if w.ndim > 1]
    if len(weights) < sum(w.ndim > 1 for w in model.parameters()):
        raise PeerError("weights missing")
    if not all(w.grad is not None and w.grad.any() for w in weights):
        raise PeerError("no gradient")
    quantized.zero_grad()
    return quantized


def operation(peer: Peer, x: Tensor) -> Operation:
    """Its fake quantization, seen to round and to pass a gradient.

    Raises:
        PeerError: if it does not.
    """
    function, learned = peer.operation(x)
    leaf = x.detach().clone().requires_grad_()
    y = function(leaf)
    error = float((y.detach() - leaf.detach()).norm() / leaf.detach().norm())
    if not 1e-4 < error < 0.1:
        raise PeerError(f"off by {error:.1e}")
    y.square().mean().backward()
    if leaf.grad is None or not all(t.grad is not None for t in learned):
        raise PeerError("no gradient")
    for t in learned:
        t.grad = None
    return function, learned
