"""Specs: YAML in, YAML out; whatever cannot be is refused by key, value and way out."""

import dataclasses
import json
import pickle

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qat.errors import UserError
from qat.grid.formats import FLOATS
from qat.grid.spec import FIXED_BITS, QuantSpec

BLOCK = {"granularity": "group", "group_size": 32}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        pytest.param({"format": "e4m4"}, r"format=e4m4: no such format; did you mean 'e4m3'", id="format"),
        pytest.param({"bits": 0}, r"bits=0: format=int has 1 to 16 bits", id="no-bits"),
        pytest.param({"bits": 17}, r"bits=17: format=int has 1 to 16", id="too-many-bits"),
        pytest.param({"bits": None}, r"bits=null: format=int has 1 to 16", id="int-without-bits"),
        pytest.param({"bits": 17, "format": "midrise"}, r"bits=17: format=midrise has 1 to 16", id="midrise-17"),
        pytest.param({"bits": 8, "format": "e2m1"}, r"bits=8 .*which has 4: set bits: 4 or bits: null", id="e2m1-8"),
        pytest.param({"bits": 2, "format": "binary"}, r"bits=2 .*which has 1", id="binary-2"),
        pytest.param(
            {"bits": None, "format": "e4m3", "signed": False}, r"signed=False with format=e4m3.*leave", id="f-u"
        ),
        pytest.param({"bits": None, "format": "ternary", "symmetric": False}, r"symmetric=False with.*leave", id="t-a"),
        pytest.param(
            {"bits": 2, "format": "midrise", "narrow": False}, r"narrow=False with format=mid", id="midrise-n"
        ),
        pytest.param({"bits": 1, "signed": True}, r"bits=1: .*format: binary .*signed: false", id="one-signed-bit"),
        pytest.param(
            {"signed": False, "narrow": True}, r"narrow=True with signed=False.*signed: true", id="unsigned-narrow"
        ),
        pytest.param({"symmetric": False, "narrow": True}, r"narrow=True .*symmetric=False", id="affine-narrow"),
        pytest.param({"granularity": "group"}, r"granularity=group with group_size=None", id="group-without-size"),
        pytest.param({**BLOCK, "group_axis": 1}, r"group_axis=1 .* counts from the end", id="axis-from-the-front"),
        pytest.param({"group_axis": -1}, r"group_axis=-1 with granularity=tensor", id="axis-without-groups"),
        pytest.param({"group_size": 32}, r"granularity=tensor with group_size=32", id="size-without-group"),
        pytest.param({"granularity": "group", "group_size": 0}, r"group_size=0: must be at least 1", id="empty-groups"),
        pytest.param({"scale": "e8m0"}, r"scale=e8m0 with granularity=tensor: .*granularity=group", id="mx-tensor"),
        pytest.param(
            {"scale": "e4m3", "granularity": "channel"}, r"scale=e4m3 with granularity=channel", id="nv-channel"
        ),
        pytest.param(
            {**BLOCK, "scale": "e8m0", "symmetric": False}, r"scale=e8m0 with symmetric=False", id="mx-affine"
        ),
        pytest.param({"granularity": "token"}, r"granularity=token with quantizer=lsq.*quantizer: dynamic", id="token"),
        pytest.param(
            {"rounding_mode": "stochastic", "format": "ternary", "bits": None}, r"rounding_mode=sto", id="sto"
        ),
        pytest.param({"bitz": 4}, r"act\.bitz: no such setting; did you mean 'bits'", id="key"),
        pytest.param({"bits": "4"}, r"act\.bits='4': must be a whole number or null", id="text-for-number"),
        pytest.param({"bits": 4.0}, r"act\.bits=4.0: must be a whole number", id="fraction"),
        pytest.param({"bits": True}, r"act\.bits=True: must be a whole number", id="bool-for-number"),
        pytest.param({"symmetric": 1}, r"act\.symmetric=1: must be true or false", id="number-for-bool"),
        pytest.param({"signed": "yes"}, r"act\.signed='yes': must be true or false or null", id="text-for-bool"),
        pytest.param(
            {"granularity": "row"}, r"act\.granularity='row': must be one of tensor, channel", id="granularity"
        ),
        pytest.param({"scale": None}, r"act\.scale=None: must be one of float32, float16, pow2", id="scale"),
        pytest.param({"options": [1]}, r"act\.options=\[1\]: must be a mapping", id="options"),
        pytest.param({"quantizer": 3}, r"act\.quantizer=3: must be a name", id="quantizer"),
    ],
)
def test_what_cannot_be_is_refused_under_its_key(values, message):
    with pytest.raises(UserError, match=message) as caught:
        QuantSpec.from_dict(values, "act")
    assert str(caught.value).startswith("act")


@st.composite
def specs(draw):
    """Valid specs of every format, granularity and scale."""
    format = draw(st.sampled_from(["int", "midrise", *FIXED_BITS]))
    bits = (
        draw(st.integers(1, 16)) if format in ("int", "midrise") else draw(st.sampled_from([None, FIXED_BITS[format]]))
    )
    symmetric = draw(st.booleans()) or format != "int"
    signed = draw(st.sampled_from([None, True, False] if format == "int" and bits != 1 else [None]))
    may_be_narrow = format != "int" or (signed if not symmetric else signed is not False)
    narrow = draw(st.sampled_from([None, True] if may_be_narrow else [None]))
    granularity = draw(st.sampled_from(["tensor", "channel", "group", "token"]))
    block = ["e8m0", "e4m3"] if granularity == "group" and symmetric else []
    return QuantSpec(
        bits=bits, format=format, signed=signed, symmetric=symmetric, narrow=narrow, granularity=granularity,
        group_size=draw(st.integers(1, 64)) if granularity == "group" else None,
        scale=draw(st.sampled_from(["float32", "pow2", *block])),
        quantizer="dynamic" if granularity == "token" else draw(st.sampled_from(["lsq", "minmax"])),
        rounding_mode=draw(st.sampled_from(["nearest", "stochastic"])) if format == "int" else "nearest",
        options=draw(st.dictionaries(st.sampled_from(["a", "b"]), st.floats(0, 1), max_size=2)),
    )  # fmt: skip


@given(specs())
def test_a_spec_survives_json_and_pickle(spec):
    assert QuantSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    again = pickle.loads(pickle.dumps(spec))
    assert again == spec and hash(again) == hash(spec)


@example(QuantSpec(bits=1, narrow=True), False, False)
@example(QuantSpec(bits=4, narrow=True), True, False)
@given(specs(), st.booleans(), st.booleans())
def test_resolving_settles_signs_once_and_for_all(spec, nonnegative, weight):
    if (
        spec.format == "int"
        and spec.bits == 1
        and weight
        and spec.symmetric
        and not nonnegative
        and spec.signed is None
    ):
        with pytest.raises(UserError, match=r"bits=1: .*format: binary"):
            spec.resolved(nonnegative=nonnegative, weight=weight)
        return
    resolved = spec.resolved(nonnegative=nonnegative, weight=weight)
    assert resolved.signed is not None and resolved.narrow is not None
    assert resolved.resolved(nonnegative=nonnegative, weight=weight) == resolved
    assert spec.signed in (None, resolved.signed)
    assert spec.narrow in (None, resolved.narrow) if resolved.signed else not resolved.narrow
    assert resolved.quant_min <= 0 < resolved.quant_max
    assert resolved.size <= 2**resolved.width
    if resolved.narrow and resolved.signed:
        assert resolved.quant_min == -resolved.quant_max
    unsettled = {"signed": spec.signed, "narrow": spec.narrow, "group_axis": spec.group_axis}
    assert dataclasses.replace(resolved, **unsettled) == spec


@pytest.mark.parametrize("nonnegative", [False, True])
@pytest.mark.parametrize(
    ("values", "weight", "codes"),
    [
        pytest.param({"bits": 8}, True, {False: (-127, 127), True: (0, 255)}, id="weight8"),
        pytest.param({"bits": 3}, True, {False: (-4, 3), True: (0, 7)}, id="weight3-keeps-its-lowest-code"),
        pytest.param({"bits": 8}, False, {False: (-128, 127), True: (0, 255)}, id="act8"),
        pytest.param({"bits": 4, "symmetric": False}, False, {False: (0, 15), True: (0, 15)}, id="affine"),
        pytest.param({"bits": 1}, False, {False: (0, 1), True: (0, 1)}, id="one-bit"),
        pytest.param({"bits": 16, "signed": True}, False, {k: (-32768, 32767) for k in (False, True)}, id="int16"),
        pytest.param({"bits": 2, "format": "midrise"}, True, {k: (-3, 3) for k in (False, True)}, id="midrise"),
        pytest.param({"bits": None, "format": "ternary"}, True, {k: (-1, 1) for k in (False, True)}, id="ternary"),
        pytest.param({"bits": None, "format": "binary"}, True, {k: (-1, 1) for k in (False, True)}, id="binary"),
        pytest.param({"bits": None, "format": "e2m3"}, True, {k: (-7.5, 7.5) for k in (False, True)}, id="e2m3"),
    ],
)
def test_the_codes_of_a_grid(values, weight, codes, nonnegative):
    resolved = QuantSpec.from_dict(values).resolved(nonnegative=nonnegative, weight=weight)
    assert (resolved.quant_min, resolved.quant_max) == codes[nonnegative]


@pytest.mark.parametrize(("format", "emax"), [("e4m3", 8), ("e5m2", 15), ("e3m2", 4), ("e2m3", 2), ("e2m1", 2)])
def test_the_top_exponents_are_those_of_the_microscaling_specification(format, emax):
    assert QuantSpec(None, format).max_exponent == emax


@pytest.mark.parametrize("format", FIXED_BITS)
def test_leaving_bits_out_of_a_format_that_brings_its_own_is_the_same_spec(format):
    assert QuantSpec(None, format) == QuantSpec(FIXED_BITS[format], format)
    assert QuantSpec(None, format).width == QuantSpec(None, format).bits == FIXED_BITS[format]


@pytest.mark.parametrize("format", FLOATS)
def test_the_codes_of_a_float_are_its_bit_patterns(format):
    assert QuantSpec(None, format).size == 2 * len(FLOATS[format].magnitudes)
    assert not QuantSpec(None, format).integer


@pytest.mark.parametrize(
    ("spec", "label"),
    [
        (QuantSpec(4, signed=True, granularity="channel"), "int4/channel"),
        (QuantSpec(8, signed=False), "uint8"),
        (QuantSpec(8, signed=False, symmetric=False), "uint8 affine"),
        (QuantSpec(3, "midrise", granularity="group", group_size=64), "midrise3/group64"),
        (QuantSpec(None, "binary"), "binary"),
        (QuantSpec(None, "ternary", scale="pow2"), "ternary pow2"),
        (QuantSpec(None, "e2m1", granularity="group", group_size=16, scale="e4m3"), "e2m1/group16 e4m3"),
        (QuantSpec(8, signed=True, granularity="token", quantizer="dynamic"), "int8/token"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_labels(spec, label):
    assert spec.short == label
