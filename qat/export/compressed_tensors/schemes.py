"""A `QuantSpec` in the words of the compressed-tensors format (`QuantizationArgs`), or the reason why it has none for
it.

The format knows the weights and inputs of Linear layers:

    weights    integers of up to 8 bits by tensor, channel or group; e4m3 likewise; blocks of e2m1 (NVFP4, MXFP4) and of
               e4m3 (MXFP8)
    inputs     one static scale; or measured as they pass, for each token, the whole tensor, or blocks; those of NVFP4
               under a static scale of the tensor

It also has one static scale for the keys and one for the values of each attention. They are not written: the package
looks for attentions by a name of an argument that `transformers` has changed since, and passes them over.

A scale that is measured is not in the file: whoever loads it computes it by the format's rule, so training has to have
used that rule. It divides the largest magnitude by half the number of steps (`range: centred` for integers; `range:
minmax` is the same thing for e4m3) and, for blocks that share a power of two, rounds it up first where it would
saturate (`range: even`).
"""

from typing import Any

from qat.errors import UserError
from qat.grid.spec import QuantSpec
from qat.integer import integer_bits
from qat.planning.plan import Plan, kind_of
from qat.quantizers import find

Args = dict[str, Any]
BLOCKS = {("e2m1", 16, "e4m3"): "NVFP4", ("e2m1", 32, "e8m0"): "MXFP4", ("e4m3", 32, "e8m0"): "MXFP8"}
"""Formats of blocks: of the elements, their number, and their scale."""
SCALE_TYPES = {"e8m0": "torch.uint8", "e4m3": "torch.float8_e4m3fn"}


def weight_args(name: str, spec: QuantSpec) -> Args:
    """Arguments for the weight of the layer `name`.

    Raises:
        UserError: if the format has no such grid.
    """
    what = f"weight of '{name}'"
    _check_steps(what, spec)
    if spec.scale in SCALE_TYPES or spec.format == "e2m1":
        return _blocks(what, spec)
    if spec.float_format is not None and spec.format != "e4m3":
        raise UserError(f"{what} is {spec.short}: of floating-point formats there are e4m3 and e2m1; set format: e4m3")
    if _affine(spec) and spec.granularity == "tensor":
        raise UserError(
            f"{what} is {spec.short}: zero points are those of channels or groups; set granularity: channel"
        )
    if integer_bits(spec) > 8:
        raise UserError(f"{what} is {spec.short}: integers have at most 8 bits; set bits: 8")
    return _args(spec, spec.granularity)


def input_args(name: str, spec: QuantSpec) -> Args:
    """Arguments for the input of the layer `name`.

    Raises:
        UserError: if the format has no such grid, or measures it by another rule than was trained with.
    """
    what = f"input of '{name}'"
    if find(spec.quantizer).static:
        return _static(what, spec)
    calibrated = bool((spec.options or {}).get("calibrated"))
    if spec.scale == "e4m3" and not calibrated:
        raise UserError(
            f"{what} is {spec.short}: the format has a calibrated scale of the tensor above those of blocks, and "
            "it is measured here; train with options: {calibrated: true}"
        )
    if spec.format not in ("int", "e4m3", "e2m1"):
        raise UserError(f"{what} is {spec.short}: of floating-point formats there are e4m3 and e2m1; set format: e4m3")
    rule = "even" if spec.scale == "e8m0" else "centred" if spec.integer and spec.symmetric else "minmax"
    if spec.range != rule or (spec.integer and spec.narrow):
        lowest = " without its lowest code" if spec.integer and spec.narrow else ""
        narrow = ", narrow: false" if lowest else ""
        raise UserError(
            f"{what} is measured with range={spec.range}{lowest}, and whoever loads the file measures it by another "
            f"rule: train with range: {rule}{narrow}"
        )
    args = _blocks(what, spec) if spec.scale in SCALE_TYPES else _args(spec, spec.granularity)
    return args | {"dynamic": "local" if calibrated else True}


def _check_steps(what: str, spec: QuantSpec) -> None:
    if not find(spec.quantizer).uniform:
        raise UserError(
            f"{what} has quantizer={spec.quantizer}, whose thresholds are no equal steps; use lsq or minmax"
        )


def _static(what: str, spec: QuantSpec) -> Args:
    _check_steps(what, spec)
    if spec.format not in ("int", "e4m3") or spec.width > 8:
        raise UserError(f"{what} is {spec.short}: static scales are for integers of up to 8 bits and for e4m3")
    if spec.integer and spec.narrow:
        raise UserError(f"{what} is {spec.short} without its lowest code, which the format uses; set narrow: false")
    return _args(spec, "tensor")


def _blocks(what: str, spec: QuantSpec) -> Args:
    if (spec.format, spec.group_size, spec.scale) not in BLOCKS:
        known = "; ".join(f"{n}: format={f} group_size={g} scale={s}" for (f, g, s), n in BLOCKS.items())
        raise UserError(f"{what} is {spec.short}: blocks are {known}")
    return _args(spec, "tensor_group" if spec.scale == "e4m3" else "group") | {"scale_dtype": SCALE_TYPES[spec.scale]}


def _args(spec: QuantSpec, strategy: str) -> Args:
    args: Args = {
        "num_bits": spec.width if spec.float_format else integer_bits(spec),
        "type": "float" if spec.float_format else "int",
        # The format has signed codes: an unsigned grid is an affine one whose zero is the lowest code.
        "symmetric": not _affine(spec),
        "strategy": strategy,
        "dynamic": False,
    }
    return args | ({"group_size": spec.group_size} if spec.group_size else {})


def _check_kinds(plan: Plan) -> None:
    if name := next((n for n, w in plan.parameters.items() if w.weight is not None), None):
        raise UserError(
            f"'{name}' multiplies by '{plan.parameters[name].parameter}', and the format has weights of Linear "
            f'layers alone; add a rule {{match: "{name}", weight: off, act: off}}'
        )
    if plan.batch_norms:
        raise UserError(f"a BatchNorm folds into '{next(iter(plan.batch_norms))}', and the format keeps every layer")
    if site := next((site for site, operands in plan.sites.items() if any(operands)), None):
        what = "keys and values of" if kind_of(site) == "attention" else "operands of"
        raise UserError(
            f"{what} '{site}' are quantized, and the format has inputs of Linear layers alone; train with sites: off "
            "and no rule for kv_cache"
        )


def _affine(spec: QuantSpec) -> bool:
    return not spec.symmetric or spec.signed is False


def _check_zero_points(found: dict[str, tuple[Args, Args | None]]) -> None:
    """`transformers` unpacks the zero points of weights by the scheme of the first group of layers."""
    affine = next((name for name, (weight, _) in found.items() if not weight["symmetric"]), None)
    if affine is None:
        return
    if found[affine][1] is not None:
        raise UserError(
            f"weight of '{affine}' has zero points and its input is quantized, too: the format packs zero points of "
            "weights alone; set act: off or symmetric: true"
        )
    if other := next((name for name, pair in found.items() if pair != found[affine]), None):
        raise UserError(
            f"weight of '{affine}' has zero points, which transformers loads only where all layers have the same grid, "
            f"and '{other}' has another; give both the same, or set symmetric: true"
        )


def schemes(plan: Plan) -> dict[str, tuple[Args, Args | None]]:
    """Arguments of weight and input of every layer that has either.

    Raises:
        UserError: for the first thing in the plan that the format has no word for.
    """
    _check_kinds(plan)
    found = {}
    for name, layer in plan.layers.items():
        grids = [label for labels in layer.inputs for label in labels]
        if len(grids) > 1:
            raise UserError(
                f"input of '{name}' passes two grids ({', '.join(grids)}), and the format has one; give all readers of "
                "that tensor the same act"
            )
        if grids and not layer.weight:
            raise UserError(
                f"'{name}' has a quantized input and a float weight, which the format has not; set act: off"
            )
        if layer.weight:
            inputs = input_args(name, plan.activations[grids[0]]) if grids else None
            found[name] = weight_args(name, plan.weights[layer.weight]), inputs
    _check_zero_points(found)
    return found
