"""What layers cost: against hand counts, and against the files."""

import json
import struct

import pytest
import torch
from small_models import Drawn, Shape, lived
from torch import nn

from qat.calibrate import calibrate
from qat.convert import EVERYTHING, convert
from qat.export.packed import WEIGHTS, save_packed
from qat.insert import apply_plan
from qat.measure.cost import average_bits, bit_operations
from qat.measure.storage import with_bytes
from qat.models import ResNet
from qat.planning.audit import audit, bops
from qat.planning.planner import make_plan
from qat.policies.policy import QuantPolicy
from qat.search import Search
from qat.search.costs import Files, make_costs
from qat.search.space import make_space

CIFAR_RESNET20 = (
    16 * 3 * 9 * 32**2 + 6 * 16 * 16 * 9 * 32**2 + (16 + 5 * 32) * 32 * 9 * 16**2 + (32 + 5 * 64) * 64 * 9 * 64
)
CIFAR_RESNET20 += 64 * 10
PROJECTIONS = 16 * 32 * 16**2 + 32 * 64 * 8**2
"""MACs of the two 1x1 convolutions that the published count (option B) has; ours pads its shortcuts (option A)."""


def _rows(model, x, policy):
    plan, recording = make_plan(model.eval(), QuantPolicy.from_dict(policy), lambda: model(x))
    return plan, with_bytes(audit(model, plan, recording), model, plan)


def test_resnet20_has_the_macs_and_parameters_of_a_hand_count():
    _, rows = _rows(ResNet(20), torch.randn(2, 3, 32, 32), {"weight": {"bits": 4}, "act": {"bits": 8}})
    assert sum(row.macs for row in rows) == CIFAR_RESNET20 == 40_551_040
    assert CIFAR_RESNET20 + PROJECTIONS == 40_813_184, "the 40.8 M of the literature"
    assert sum(row.params for row in rows) == 269_722
    assert bops(rows) == CIFAR_RESNET20 * 4 * 8


def test_float_counts_32_bits():
    assert bit_operations(10, None, 8) == 10 * 32 * 8
    assert average_bits([(100, 4), (300, 8)]) == 7 and average_bits([]) is None


CHANNEL = {"bits": 4, "granularity": "channel"}
MX = {"format": "e2m1", "bits": None, "granularity": "group", "group_size": 4, "scale": "e8m0", "range": "minmax"}


@pytest.mark.parametrize(
    ("shape", "weight", "act", "rules"),
    [
        pytest.param(Shape(), CHANNEL, 8, {}, id="conv-norm"),
        pytest.param(Shape(), {"bits": 3}, 4, {}, id="one-scale-that-a-norm-folds-into"),
        pytest.param(Shape(bias=True, norm=False), {"bits": 5}, 8, {}, id="biases"),
        pytest.param(Shape(bias=True, norm=False), CHANNEL, None, {}, id="weights-only"),
        pytest.param(Shape(), CHANNEL, 8, {"a": {"match": "stem", "weight": "off"}}, id="a-float-layer-and-its-norm"),
        pytest.param(Shape(kind="linear"), CHANNEL | {"granularity": "group", "group_size": 4}, 8, {}, id="groups"),
        pytest.param(Shape(), {"format": "binary", "bits": None}, 8, {}, id="binary"),
        pytest.param(Shape(), {"format": "ternary", "bits": None}, 8, {}, id="ternary"),
        pytest.param(Shape(bias=True, norm=False), CHANNEL | {"bits": 12}, 8, {}, id="12-bits"),
        pytest.param(Shape(norm=False), {"bits": 10, "symmetric": False}, 8, {}, id="affine-10-bits"),
        pytest.param(Shape(norm=False), {"format": "midrise", "bits": 2, "scale": "pow2"}, 8, {}, id="midrise-pow2"),
        pytest.param(Shape(bias=True, norm=False), {"format": "e4m3", "bits": None}, 8, {}, id="fp8"),
        pytest.param(Shape(kind="linear"), MX, 8, {}, id="mxfp4"),
        pytest.param(Shape(kind="linear"), MX | {"scale": "e4m3"}, 8, {}, id="block-scales-that-a-norm-folds-into"),
    ],
)
def test_the_bytes_of_the_layers_are_those_of_the_file_but_for_header_and_activation_grids(
    shape, weight, act, rules, tmp_path
):
    torch.manual_seed(0)
    model = Drawn(shape)
    x = model.example(4)
    plan, rows = _rows(model, x, {"weight": weight, "act": act and {"bits": act}, "rules": rules})
    stored, grids = _stored(model, plan, x, tmp_path)
    assert sum(row.bytes for row in rows) == stored - grids


class Two(nn.Module):
    """A layer with a bias, and one of two inputs."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Bilinear(8, 8, 4)

    def forward(self, x):
        return self.b(self.a(x), x)


@pytest.mark.parametrize(
    ("settings", "float_biases"),
    [
        pytest.param({}, 4, id="two-inputs"),
        pytest.param({"round_bias": "never"}, 12, id="never-rounded"),
        pytest.param({"act": {"bits": 8, "quantizer": "dynamic", "granularity": "token"}}, 12, id="measured-inputs"),
    ],
)
def test_a_bias_that_no_accumulator_of_one_scale_takes_costs_a_float(settings, float_biases, tmp_path):
    torch.manual_seed(0)
    model, x = Two(), torch.randn(3, 8)
    plan, rows = _rows(model, x, {"weight": CHANNEL, "act": {"bits": 8}, **settings})
    stored, grids = _stored(model, plan, x, tmp_path)
    codes = (64 + 256) // 2 + 5 * 12
    assert sum(row.bytes for row in rows) == stored - grids == codes + 4 * float_biases + 12 * (12 - float_biases)


def test_negative_gammas_cost_full_range_codes_a_bit(tmp_path):
    torch.manual_seed(0)
    model = lived(Drawn(Shape()))
    x = model.example(4)
    plan, rows = _rows(model, x, {"weight": CHANNEL | {"bits": 2}, "act": {"bits": 8}})
    stored, grids = _stored(model, plan, x, tmp_path)
    body = next(row for row in rows if row.name == "body")
    assert body.bytes == (8 * 8 * 9 * 3) // 8 + 8 * (5 + 12), "three bits a code, for a two-bit grid"
    assert sum(row.bytes for row in rows) == stored - grids


def test_a_shared_weight_is_counted_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x).relu())

    _, (a, b) = _rows(Tied(), torch.randn(2, 8), {"weight": {"bits": 4}, "act": {"bits": 8}})
    assert (a.params, b.params) == (72, 8)
    assert a.bytes - b.bytes == 64 * 4 // 8 + 5


@pytest.mark.parametrize(
    "act", [{"bits": 8}, {"bits": 3}, {"bits": 5, "scale": "pow2"}, {"bits": 4, "symmetric": False}], ids=str
)
@pytest.mark.parametrize("read", [False, True], ids=["alone", "read-by-others"])
def test_a_parameter_that_is_added_costs_its_codes_and_their_scale(act, read, tmp_path):
    class Added(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.table = nn.Linear(8, 8), nn.Linear(8, 8), nn.Parameter(torch.randn(5, 8))

        def forward(self, x):
            y = self.b(self.a(x) + self.table)
            return y + self.table.mean() if read else y

    model, x = Added(), torch.randn(2, 5, 8)
    plan, rows = _rows(model, x, {"weight": {"bits": 8}, "act": act})
    added = next(row for row in rows if row.name == "add_0")
    assert added.params == 40 and added.weight_bits == act["bits"] and added.reason is None
    assert added.bytes == 40 * act["bits"] // 8 + (2 if "scale" in act else 5) + 160 * read
    stored, grids = _stored(model, plan, x, tmp_path)
    assert sum(row.bytes for row in rows) == stored - grids


def _stored(model, plan, x, folder):
    """Bytes of tensors in the packed file, and those of activation grids among them."""
    apply_plan(model, plan)
    calibrate(model, lambda: model(x))
    save_packed(convert(model, plan, EVERYTHING), plan, folder)
    content = (folder / WEIGHTS).read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    grids = [v["data_offsets"] for k, v in header.items() if "input_quantizer" in k]
    return len(content) - size - 8, sum(end - start for start, end in grids)


@pytest.mark.parametrize("name", ["packed", "size"])
@pytest.mark.parametrize("larger", [2, 8], ids=["the-narrowest-has-the-larger-rest", "the-widest-has"])
def test_no_file_is_larger_than_predicted(name, larger):
    model = Drawn(Shape(norm=False)).eval()
    x, policy = model.example(2), QuantPolicy.from_dict({"weight": CHANNEL, "act": {"bits": 8}})
    space = make_space(model, policy, Search([2, 8], [8]), lambda: model(x))
    choices = {bits: {layer.name: (bits, 8) for layer in space.layers} for bits in (2, 8)}
    codes = make_costs(space, Files(**{name: {2: 0, 8: 0}}))[name]
    codes = {bits: codes.total(choice) - codes.fixed for bits, choice in choices.items()}
    files = {bits: int(codes[bits]) + 1000 + 7 * (bits == larger) for bits in choices}
    cost = make_costs(space, Files(**{name: files}))[name]
    predicted = {bits: cost.total(choice) for bits, choice in choices.items()}
    assert all(files[bits] <= predicted[bits] for bits in files) and predicted[larger] == files[larger]
