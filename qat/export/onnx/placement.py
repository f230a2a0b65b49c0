"""Where Q/DQ nodes stand in an ONNX file and what types they have, by the engine that reads it.

ort             as ONNX Runtime's CPU kernels want it (`qat.export.onnx.export`)
openvino        the same, but signed activations are int8 (with a zero point it multiplies two activations in float),
                and grids behind grids have other scales, since its kernels multiply by reciprocals; what its plugin
                rewrites to something else is written otherwise (`qat.export.onnx.openvino`)
tensorrt        TensorRT, "Working with Quantized Types": Q/DQ at the inputs of quantizable operations, int8 with
                zero points of zero (other types and zero points are refused by its parser), ReLU in front of
                Q, where it fuses with the convolution, float biases (its parser knows no DequantizeLinear of int32)
qnn             ONNX Runtime's QNN execution provider runs *QDQ node units*: every operation, reshapes and pools
                among them, stands between DequantizeLinear and QuantizeLinear; uint8 or uint16 activations, int8
                weights, int32 biases. A ReLU that an unsigned grid makes superfluous is left out, as
                get_qnn_qdq_config's quantizer does
"""

from dataclasses import dataclass
from typing import Literal

OPSET = 21
OPSET_2_BITS, IR_2_BITS = 25, 13
"""The first with INT4, and the first with INT2: what the file asks for only where it holds such weights."""


@dataclass(frozen=True)
class Placement:
    """How a converted model is written for one engine.

    Attributes:
        signed_codes: The activations whose codes are int8 (int16): `all`, those with a `signed` grid, or `none`, where
            128 (32768) is added to signed codes and all are uint8 (uint16).
        clips_codes: Whether the limits of narrow grids are a Clip of the codes; else a float one in front of them.
        folds_limits: Whether ReLU and Clip become limits of the codes; else only what the codes limit anyway goes.
        narrowest: Bits of the smallest type that weights are stored in: 8, 4 or 2; those below 8 are cast to a byte.
        packs_products: Whether products of floats and integer weights are ONNX Runtime's operation for them
            (`qat.export.onnx.nbits`).
        float_biases: Whether biases are float constants.
        guards_fusions: Whether what ONNX Runtime would fuse wrongly, or not at all, is kept apart.
        pads_images: Whether images of three channels get a fourth (`qat.export.onnx.channels`).
        units: Whether operations that only move values stand between Q/DQ nodes of their own.
        steadies: Whether a grid behind a grid divides by a scale that no arithmetic rounds otherwise
            (`qat.export.onnx.cascades`).
        evades: Whether what OpenVINO's plugin rewrites to something else is kept from it (`qat.export.onnx.openvino`).
    """

    signed_codes: Literal["none", "signed", "all"] = "none"
    clips_codes: bool = True
    folds_limits: bool = True
    narrowest: int = 8
    packs_products: bool = False
    float_biases: bool = False
    guards_fusions: bool = True
    pads_images: bool = False
    units: bool = False
    steadies: bool = False
    evades: bool = False


ORT = Placement(narrowest=2, pads_images=True)
OPENVINO = Placement(signed_codes="signed", narrowest=4, steadies=True, evades=True)
TENSORRT = Placement(signed_codes="all", clips_codes=False, folds_limits=False, float_biases=True, guards_fusions=False)
QNN = Placement(clips_codes=False, folds_limits=False, guards_fusions=False, units=True)
