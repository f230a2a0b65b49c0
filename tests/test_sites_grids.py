"""One grid per tensor: what changes no value passes a grid through, concatenations share one when asked, and an output
gets one only where nobody else asks for it."""

import pytest
import torch
import torch.nn.functional as F
from test_insert import IMAGE, Model, conv, planned, signed
from torch import nn

SQUARE = torch.randint(0, 8, (8,))

PASSES_THROUGH = [
    pytest.param(lambda x: x.reshape(4, 3, 64).view(4, 3, 8, 8), id="reshape"),
    pytest.param(lambda x: x.permute(0, 1, 3, 2).mT.swapaxes(2, 3), id="permute"),
    pytest.param(lambda x: x.chunk(2, 1)[0].repeat_interleave(2, 1)[:, :3], id="chunk-and-repeat-interleave"),
    pytest.param(lambda x: torch.split(x, 4, 2)[1].tile(1, 1, 2, 1), id="split-and-tile"),
    pytest.param(lambda x: x[:1].expand(4, -1, -1, -1), id="expand"),
    pytest.param(lambda x: x.contiguous().clone().to(torch.float64).float(), id="copies-and-types"),
    pytest.param(lambda x: x.roll(1, 2).flip(3).rot90(1, (2, 3)), id="roll-flip-rotate"),
    pytest.param(lambda x: x.index_select(2, SQUARE), id="index-select"),
    pytest.param(lambda x: x.gather(3, SQUARE.expand(4, 3, 8, 8)), id="gather"),
    pytest.param(lambda x: x.masked_fill(SQUARE > 3, 0), id="filled-with-zero"),
    pytest.param(lambda x: x.tril().unflatten(1, (1, 3)).squeeze(1), id="triangle"),
    pytest.param(lambda x: x.narrow(2, 0, 4).repeat(1, 1, 2, 1), id="narrow"),
    pytest.param(lambda x: F.channel_shuffle(x, 3), id="channel-shuffle"),
]


@pytest.mark.parametrize("between", PASSES_THROUGH)
def test_what_changes_no_value_passes_the_grid_through(between):
    plan = planned(Model(lambda m, x: (m.a(x), m.b(between(x))), a=conv(), b=conv()))
    assert plan.layers["b"].input == plan.layers["a"].input == ["a.input"]


@pytest.mark.parametrize(
    "between",
    [
        pytest.param(lambda x: x.masked_fill(SQUARE > 3, 1.0), id="filled-with-one"),
        pytest.param(lambda x: F.interpolate(x, scale_factor=1.0, mode="bilinear"), id="interpolation"),
        pytest.param(lambda x: torch.cat([x, x], 2), id="concatenation"),
    ],
)
def test_what_may_change_values_does_not(between):
    plan = planned(Model(lambda m, x: (m.a(x), m.b(between(x))), a=conv(), b=conv()), sites="off")
    assert plan.layers["b"].input == ["b.input"]


# -- concatenation -----------------------------------------------------------------------------------------------------


def branches(m, x):
    left, right = F.relu(m.a(x)), m.b(x)
    return m.c(torch.cat([left, right], 1)) + m.d(left)


def concatenating() -> nn.Module:
    return Model(branches, a=conv(), b=conv(), c=conv(6), d=conv())


def test_separate_grids_keep_the_sign_of_each_branch():
    plan = planned(concatenating())
    assert plan.sites["cat_0"] == [["cat_0.input_0"], ["cat_0.input_1"]]
    assert plan.layers["d"].input == ["cat_0.input_0"] and plan.layers["c"].input == ["c.input"]
    assert [signed(plan, f"cat_0.input_{i}") for i in range(2)] == [False, True]


def test_a_shared_grid_reaches_all_that_is_joined_and_all_its_readers():
    plan = planned(concatenating(), concat="shared")
    (label,) = {*(label for chain in plan.sites["cat_0"] for label in chain)}
    assert plan.layers["c"].input == plan.layers["d"].input == [label]
    assert signed(plan, label) is True


def test_a_shared_grid_of_rectified_branches_is_unsigned():
    model = Model(lambda m, x: m.c(torch.cat([F.relu(m.a(x)), F.relu(m.b(x))], 1)), a=conv(), b=conv(), c=conv(6))
    plan = planned(model, concat="shared")
    assert plan.sites["cat_0"] == [plan.layers["c"].input] * 2
    assert signed(plan, plan.layers["c"].input[0]) is False


def test_concatenations_in_a_row_share_one_grid():
    def dense(m, x):
        for layer in (m.a, m.b):
            x = torch.cat([x, layer(x[:, :3])], 1)
        return m.c(x)

    plan = planned(Model(dense, a=conv(), b=conv(), c=conv(9)), concat="shared")
    assert len(plan.activations) == 1


# -- outputs -----------------------------------------------------------------------------------------------------------


def test_an_output_that_an_integer_reader_takes_has_that_reader_s_grid():
    model = Model(lambda m, x: m.b(F.gelu(m.a(x)).flatten(1).view(IMAGE)), a=conv(), b=conv())
    plan = planned(model, torch.randn(IMAGE), kinds="all")
    assert plan.sites == {} and plan.layers["b"].input == ["b.input"]


def test_an_output_that_only_floats_read_gets_one():
    model = Model(lambda m, x: torch.softmax(m.a(x), -1).exp(), a=conv())
    plan = planned(model, torch.randn(IMAGE), kinds="all")
    assert plan.sites == {"softmax_0": [["softmax_0.output"]]}
    assert signed(plan, "softmax_0.output") is False


def test_an_activation_module_names_its_site_after_itself():
    model = Model(lambda m, x: m.act(m.a(x)).exp(), a=conv(), act=nn.GELU())
    assert list(planned(model, kinds="all").sites) == ["act.gelu_0"]
