"""One float network in several frameworks' fake quantization, at any bits, for benchmarks/accuracy_vs_peers.py.

    ours              learned steps, MSE start; weights of four bits and more leave out their lowest code; biases stay
                      float, as everybody else's do
    ours_adaround     the same from weights rounded by AdaRound, 300 steps for each layer on the same images, no labels
    ours_all_codes    as ours, with all codes (`narrow: false`)
    ours_progressive  as ours, by way of 4 and 3 bits, as our recipe for two bits does; W2A2 only
    torch             torch's own fake-quantize modules: ranges that follow the data (moving average)
    pt2e              torchao's `prepare_qat_pt2e` of the exported graph: the same ranges, BatchNorm folded in training
    *_frozen          these two as torch's tutorials have it: ranges stop to follow after 4 of 8 epochs, and BatchNorm's
                      averages after 3
    brevitas          its defaults: learned activation scales, weight scales from each channel's maximum, and no lowest
                      code for weights (ternary at two bits)
    brevitas_learned  learned weight scales from an MSE start, and all codes

All quantize the inputs and weights of convolutions and linear layers, the first and last at 8 bits, and nothing else;
weights per output channel, symmetric.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qat.calibrate import calibrate
from qat.insert import apply_plan, named_quantizers
from qat.planning.planner import make_plan
from qat.policies.policy import QuantPolicy
from qat.starts import AdaRound, Start

FIRST, LAST = "conv1", "linear"
RANGES_STOP, AVERAGES_STOP = 4 / 8, 3 / 8  # shares of training
PROGRESS = {0.0: 4, 0.08: 3, 0.2: 2}  # configs/experiment/cifar10/resnet20_w2a2.yaml


def layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]


def bits_of(name: str, bits: int) -> int:
    return 8 if name in (FIRST, LAST) else bits


def ours(
    model: nn.Module, x: Tensor, weight: int, act: int, narrow: bool | None = None, starts: Sequence[Start] = ()
) -> nn.Module:
    eight = {"weight": {"bits": 8}, "act": {"bits": 8}}
    policy = QuantPolicy.from_dict(
        {
            "weight": {"bits": weight, "granularity": "channel", "narrow": narrow},
            "act": {"bits": act},
            "sites": "off",
            "round_bias": "never",
            "rules": {"first": {"match": FIRST, **eight}, "last": {"match": LAST, **eight}},
        }
    )
    plan, _ = make_plan(model, policy, lambda: model(x[:2]))
    apply_plan(model, plan)
    calibrate(model, lambda: model(x))
    for start in starts:
        start.refine(model, lambda: model(x), plan)
    return model


def progress(model: nn.Module, share: float) -> None:
    bits = [b for start, b in PROGRESS.items() if share >= start][-1]
    for name, quantizer in named_quantizers(model):
        if name.split(".")[0] not in (FIRST, LAST) and quantizer.spec.width != bits:
            quantizer.change_bits(bits)


def with_torch(model: nn.Module, x: Tensor, weight: int, act: int) -> nn.Module:
    import torch.ao.quantization as tq
    from torch.nn.utils import parametrize

    for name, layer in layers(model):
        w, a = bits_of(name, weight), bits_of(name, act)
        fake = tq.FakeQuantize(
            tq.MovingAveragePerChannelMinMaxObserver, quant_min=-(2 ** (w - 1)), quant_max=2 ** (w - 1) - 1,
            dtype=torch.qint8, qscheme=torch.per_channel_symmetric, ch_axis=0,
        )  # fmt: skip
        parametrize.register_parametrization(layer, "weight", fake)
        layer.input_fake = tq.FakeQuantize(tq.MovingAverageMinMaxObserver, quant_min=0, quant_max=2**a - 1)
        layer.register_forward_pre_hook(lambda m, args: (m.input_fake(args[0]),))
    with torch.no_grad():
        model.eval()(x)
    return model


def settle_torch(model: nn.Module, share: float) -> None:
    observe(model, share < RANGES_STOP)
    if share >= AVERAGES_STOP:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()


def with_pt2e(model: nn.Module, x: Tensor, weight: int, act: int) -> nn.Module:
    from torchao.quantization import pt2e
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec, Quantizer

    def spec(bits: int, observer: type, **how: Any) -> QuantizationSpec:
        fake = pt2e.FakeQuantize.with_args(observer=observer)
        return QuantizationSpec(observer_or_fake_quant_ctr=fake, quant_max=how["quant_min"] + 2**bits - 1, **how)

    class ConvAndLinear(Quantizer):
        def annotate(self, model: torch.fx.GraphModule) -> torch.fx.GraphModule:
            ops = torch.ops.aten
            nodes = [n for n in model.graph.nodes if n.target in (ops.conv2d.default, ops.linear.default)]
            for node in nodes:
                own = node in (nodes[0], nodes[-1])
                a, w = (8, 8) if own else (act, weight)
                inputs = spec(
                    a, pt2e.MovingAverageMinMaxObserver, dtype=torch.uint8, quant_min=0, qscheme=torch.per_tensor_affine
                )
                weights = spec(
                    w, pt2e.MovingAveragePerChannelMinMaxObserver, dtype=torch.int8, quant_min=-(2 ** (w - 1)),
                    qscheme=torch.per_channel_symmetric, ch_axis=0,
                )  # fmt: skip
                node.meta["quantization_annotation"] = QuantizationAnnotation(
                    input_qspec_map={node.args[0]: inputs, node.args[1]: weights}, _annotated=True
                )
            return model

        def validate(self, model: torch.fx.GraphModule) -> None:
            pass

    batch = torch.export.Dim("batch", min=1, max=4096)
    exported = torch.export.export(model.train(), (x,), dynamic_shapes=({0: batch},)).module()
    prepared = pt2e.allow_exported_model_train_eval(prepare_qat_pt2e(exported, ConvAndLinear()))
    prepared.eval()
    with torch.no_grad():
        prepared(x)
    return prepared


def settle_pt2e(model: nn.Module, share: float) -> None:
    observe(model, share < RANGES_STOP)
    assert isinstance(model, torch.fx.GraphModule)
    training = [n for n in model.graph.nodes if n.target is torch.ops.aten.batch_norm.default and n.args[5]]
    if share >= AVERAGES_STOP and training:
        for node in training:
            node.args = (*node.args[:5], False, *node.args[6:])
        model.recompile()


def observe(model: nn.Module, observing: bool) -> None:
    """torch's fake-quantize modules follow what they see in evaluation, too, unless they are told not to."""
    for module in model.modules():
        if hasattr(module, "disable_observer"):
            module.enable_observer(observing)


def with_brevitas(model: nn.Module, x: Tensor, weight: int, act: int, **learned: Any) -> nn.Module:
    from brevitas import nn as qnn
    from brevitas.graph.calibrate import calibration_mode
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat, Uint8ActPerTensorFloat

    for name, layer in layers(model):
        how = {
            "weight_quant": Int8WeightPerChannelFloat, "weight_bit_width": bits_of(name, weight),
            "input_quant": Int8ActPerTensorFloat if name == FIRST else Uint8ActPerTensorFloat,
            "input_bit_width": bits_of(name, act), "bias": layer.bias is not None, **learned,
        }  # fmt: skip
        if isinstance(layer, nn.Linear):
            twin = qnn.QuantLinear(layer.in_features, layer.out_features, **how)
        else:
            shape = layer.in_channels, layer.out_channels, layer.kernel_size
            twin = qnn.QuantConv2d(*shape, stride=layer.stride, padding=layer.padding, **how)
        twin.load_state_dict(layer.state_dict(), strict=False)  # starts learned scales anew from these weights
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, twin)
    model.eval()
    with torch.no_grad(), calibration_mode(model):  # which switches what it calibrates to training
        model(x)
    return model


def with_brevitas_learned(model: nn.Module, x: Tensor, weight: int, act: int) -> nn.Module:
    from brevitas.inject.enum import ScalingImplType
    from brevitas.quant import Int8WeightPerChannelFloatMSE

    how = {"weight_scaling_impl_type": ScalingImplType.PARAMETER_FROM_STATS, "weight_narrow_range": False}
    return with_brevitas(model, x, weight, act, weight_quant=Int8WeightPerChannelFloatMSE, **how)


@dataclass(frozen=True)
class Peer:
    """How to make its training model, and how it is led.

    Attributes:
        prepare: Turns a float model into its calibrated one, given 512 images and the bits of weights and activations;
            may change the model in place.
        settle: Called before each step with the share of training that is done.
        requires: What `pip` installs for it.
        only: The one width that it is for; `None` for all.
    """

    prepare: Callable[[nn.Module, Tensor, int, int], nn.Module]
    settle: Callable[[nn.Module, float], None] = lambda model, share: None
    requires: tuple[str, ...] = ()
    only: str | None = None


TORCHAO = ("torchao==0.18.0",)
BREVITAS = ("brevitas==0.13.4",)
PEERS = {
    "ours": Peer(ours),
    "ours_adaround": Peer(partial(ours, starts=[AdaRound(steps=300)])),
    "ours_all_codes": Peer(partial(ours, narrow=False)),
    "ours_progressive": Peer(ours, progress, only="W2A2"),
    "torch": Peer(with_torch),
    "torch_frozen": Peer(with_torch, settle_torch),
    "pt2e": Peer(with_pt2e, requires=TORCHAO),
    "pt2e_frozen": Peer(with_pt2e, settle_pt2e, TORCHAO),
    "brevitas": Peer(with_brevitas, requires=BREVITAS),
    "brevitas_learned": Peer(with_brevitas_learned, requires=BREVITAS),
}
