"""Functions inside a forward are quantized like layers: found, named, run on their grids, and missed when they move."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from test_insert import Model, inserted, planned
from torch import Tensor, nn

from qat.errors import UserError
from qat.insert import apply_plan, named_quantizers, remove
from qat.layers import sites

X = (4, 6, 8)
ALL = {"kinds": "all"}


def linear(width: int = 8) -> nn.Linear:
    return nn.Linear(8, width)


KINDS = [
    pytest.param(lambda m, x: m.a(x) - x, "sub", 2, id="minus"),
    pytest.param(lambda m, x: m.a(x).sub_(x), "sub", 2, id="in-place-minus"),
    pytest.param(lambda m, x: torch.sub(m.a(x), other=x), "sub", 2, id="operand-by-name"),
    pytest.param(lambda m, x: m.a(x) * x, "mul", 2, id="times"),
    pytest.param(lambda m, x: m.a(x) @ x.mT, "matmul", 2, id="at"),
    pytest.param(lambda m, x: torch.bmm(m.a(x), mat2=x.mT), "matmul", 2, id="bmm"),
    pytest.param(lambda m, x: torch.mm(m.a(x)[0], x[0].T), "matmul", 2, id="mm"),
    pytest.param(lambda m, x: torch.baddbmm(x[..., :6], m.a(x), x.mT), "matmul", 2, id="baddbmm-leaves-its-sum-alone"),
    pytest.param(lambda m, x: torch.einsum("btc,bsc->bts", m.a(x), x), "einsum", 2, id="einsum"),
    pytest.param(lambda m, x: torch.einsum("btc,bsc->bts", [m.a(x), x]), "einsum", 2, id="einsum-of-a-list"),
    pytest.param(lambda m, x: F.scaled_dot_product_attention(m.a(x), x, value=x), "attention", 3, id="attention"),
    pytest.param(lambda m, x: torch.cat([m.a(x), x, x], 1), "cat", 3, id="cat"),
    pytest.param(lambda m, x: torch.stack(tensors=(m.a(x), x)), "cat", 2, id="stack"),
    pytest.param(lambda m, x: F.interpolate(m.a(x), scale_factor=2), "interpolate", 1, id="interpolate"),
    pytest.param(lambda m, x: F.softmax(m.a(x), -1), "softmax", 1, id="softmax"),
    pytest.param(lambda m, x: m.a(x).softmax(-1), "softmax", 1, id="softmax-method"),
    pytest.param(lambda m, x: F.gelu(m.a(x)), "gelu", 1, id="gelu"),
    pytest.param(lambda m, x: F.silu(m.a(x)), "silu", 1, id="silu"),
    pytest.param(lambda m, x: F.layer_norm(m.a(x), (8,)), "layer_norm", 1, id="layer-norm"),
]


@pytest.mark.parametrize(("forward", "kind", "operands"), KINDS)
def test_every_kind_is_found_and_run_on_its_grids(forward, kind, operands):
    x = torch.randn(X)
    model = Model(forward, a=linear())
    expected = forward(model, x)
    plan = planned(model, x, kinds=[kind], act={"bits": 8})
    assert {name: len(chains) for name, chains in plan.sites.items()} == {f"{kind}_0": operands}
    assert all(plan.sites[f"{kind}_0"])
    inserted(model, x, kinds=[kind], act={"bits": 8}, weight={"bits": 8})
    y, site = model(x), model.get_submodule(f"{kind}_0")
    assert y.shape == expected.shape and 0 < (y - expected).abs().max() < 0.1 * expected.abs().max() + 0.02
    for quantizer in {m for m in site.modules() if m is not site}:
        quantizer.enable(False)
    assert not torch.equal(model(x), y)


@pytest.mark.parametrize(
    "forward",
    [
        pytest.param(lambda m, x: m.a(x) * 2, id="a-number"),
        pytest.param(lambda m, x: m.a(x) * (x > 0), id="a-mask"),
        pytest.param(lambda m, x: m.a(x) - m.a.bias, id="a-parameter"),
        pytest.param(lambda m, x: torch.cat([torch.arange(3), torch.arange(3)]) + m.a(x).sum(), id="integers"),
    ],
)
def test_what_is_no_pair_of_float_tensors_is_no_site(forward):
    assert planned(Model(forward, a=linear()), torch.randn(X), kinds=["mul", "sub", "cat"]).sites == {}


def test_a_function_that_writes_to_its_operand_still_does():
    def forward(m, x):
        y = m.a(x)
        y.add_(x)
        return y

    x = torch.randn(X)
    model = inserted(Model(forward, a=linear()), x, act={"bits": 8}).train()
    y = model(x)
    assert torch.equal(y, model.add_0.input_quantizer_0(model.a(x)) + model.add_0.input_quantizer_1(x))
    y.square().sum().backward()
    assert model.a.weight.grad.abs().sum() > 0


class Head(nn.Module):
    """A layer without a module."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = linear()
        self.weight, self.bias = nn.Parameter(torch.randn(5, 8)), nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.inner(x), self.weight, self.bias)


def test_a_functional_layer_has_a_weight_grid_and_is_addressed_like_a_layer():
    x = torch.randn(X)
    model = Model(lambda m, x: m.head(x), head=Head())
    plan = planned(model, x, rules={"r": {"match": "@last", "weight": {"bits": 8}}})
    assert plan.parameters["head.linear_0"].parameter == "head.weight"
    assert plan.weights["head.linear_0"].bits == 8 and plan.weights["head.inner"].bits == 4
    keys = list(model.state_dict())
    inserted(model, x, rules={"r": {"match": "*", "type": "linear", "weight": {"bits": 8}}})
    head, site = model.head, model.head.linear_0
    assert site.weight_quantizer.scale.shape == (5,) and site.weight is head.weight
    inner = site.input_quantizer_0(head.inner(x))
    assert torch.equal(model(x), F.linear(inner, site.weight_quantizer(head.weight), head.bias))
    assert [k for k in model.state_dict() if "quantizer" not in k] == keys


@pytest.mark.parametrize(
    ("function", "dimensions", "axis"),
    [
        pytest.param(F.conv1d, 1, 0, id="conv1d"),
        pytest.param(F.conv2d, 2, 0, id="conv2d"),
        pytest.param(F.conv3d, 3, 0, id="conv3d"),
        pytest.param(F.conv_transpose2d, 2, 1, id="conv-transpose2d"),
    ],
)
def test_a_functional_convolution_reads_its_input_and_its_parameter_on_grids(function, dimensions, axis):
    model, x = Model(lambda m, x: function(m.a(x), m.w, padding=1)), torch.randn(2, 4, *[5] * dimensions)
    model.a = nn.ReLU()
    model.w = nn.Parameter(torch.randn(*((6, 4) if axis == 0 else (4, 6)), *[3] * dimensions))
    inserted(model, x)
    site = model.get_submodule(f"{function.__name__}_0")
    assert site.weight is model.w and site.weight_quantizer.scale.shape == (6,)
    expected = function(site.input_quantizer_0(F.relu(x)), site.weight_quantizer(model.w), padding=1)
    assert torch.equal(model(x), expected) and not torch.equal(expected, function(F.relu(x), model.w, padding=1))


def test_other_orientations_of_a_weight_keep_one_scale_per_output_channel():
    model = Model(lambda m, x: torch.addmm(m.b, m.a(x), m.w), a=linear())
    model.w, model.b = nn.Parameter(torch.randn(8, 3)), nn.Parameter(torch.randn(3))
    inserted(model, torch.randn(6, 8))
    assert model.matmul_0.weight_quantizer.scale.shape == (3,)


def test_a_weight_that_a_layer_and_a_function_read_has_one_grid():
    model = Model(lambda m, x: F.linear(m.a(m.embed(x)), m.embed.weight), embed=nn.Embedding(11, 8), a=linear())
    inserted(model, torch.randint(11, (4, 5)))
    assert model.linear_0.weight_quantizer is model.embed.weight_quantizer


def test_twins_that_call_the_same_functions_are_no_sites_of_the_module_around():
    x = torch.randn(X)
    model = Model(lambda m, x: F.linear(m.b(m.a(x)), m.w), a=linear(), b=linear())
    model.w = nn.Parameter(torch.randn(5, 8))
    rules = {"r": {"match": "b", "weight": "off"}}  # a twin that hands its parameter over as it is
    assert planned(model, x, rules=rules).owners == {"": ["linear"]}
    assert inserted(model, x, rules=rules)(x).shape == (4, 6, 5)


def test_parts_of_a_layer_that_is_not_quantized_answer_for_themselves():
    from torch.nn.utils import parametrizations

    x = torch.randn(X)
    model = Model(lambda m, x: m.odd(m.a(x)) @ x.mT, a=linear(), odd=parametrizations.orthogonal(linear()))
    assert inserted(model, x)(x).isfinite().all()


# -- changes between passes --------------------------------------------------------------------------------------------


class Reordered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = linear()

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return (y + x) - y if not self.training else (y - x) + y


def test_sites_that_change_their_order_say_so():
    model = inserted(Reordered(), torch.randn(X), kinds=["add", "sub"]).train()
    with pytest.raises(UserError, match="ran sub where it ran add before; sites are told apart by their order"):
        model(torch.randn(X))


def test_functions_of_kinds_that_nobody_quantizes_may_change():
    model = inserted(Reordered(), torch.randn(X), kinds=["add"]).train()
    assert model(torch.randn(X)).isfinite().all()


def test_an_addition_in_training_alone_names_the_module_itself():
    class More(Reordered):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + x if self.training else x)

    model = inserted(More(), torch.randn(X), kinds=["add"]).train()
    with pytest.raises(UserError, match=r"the forward of the module itself \(More\) ran 2 add sites, but 1 add site "):
        model(torch.randn(X))


# -- composition -------------------------------------------------------------------------------------------------------


class Everything(nn.Module):
    """One site of nearly each kind, in two owners."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head, self.act, self.norm = linear(24), Head(), nn.GELU(), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = torch.softmax(y @ k.mT, -1) @ v - x
        y += x
        z = torch.cat([y * x, self.act(y)], 1)
        return self.head(F.interpolate(z.mT, scale_factor=2).mT) * torch.einsum("btc->b", z)[:, None, None].sigmoid()


@pytest.fixture(scope="module")
def everything() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(X)
    return inserted(Everything(), x, act={"bits": 8}, weight={"bits": 8}, **ALL), x


@pytest.mark.parametrize("training", [pytest.param(True, id="train"), pytest.param(False, id="eval")])
def test_it_compiles_without_a_graph_break(everything, training):
    model, x = copy.deepcopy(everything[0]).train(training), everything[1]
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), model(x), atol=1e-6)


class Branches(nn.Module):
    """Decides by its data what to do, which no compiler can follow, between two sites."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = linear(), linear()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a(x)
        if x.abs().max() > 100:
            x = x / 2
        return x + self.b(x)


def test_a_forward_that_breaks_the_graph_breaks_it_no_more_often_with_sites():
    def as_it_is(graph, _):  # the modes that it was traced under are in it
        def run(*args):
            with torch._C.DisableTorchFunction():
                return graph.forward(*args)

        return run

    torch.manual_seed(0)
    model, x, found = nn.Sequential(Branches(), linear()), torch.randn(X), []
    breaks = torch._dynamo.utils.counters["graph_break"]
    for quantize in (False, True):
        if quantize:
            inserted(model, x, act={"bits": 8}, weight={"bits": 8})
        torch._dynamo.reset()
        breaks.clear()
        y = torch.compile(model.train(), backend=as_it_is)(x)
        assert torch.allclose(y, model(x), atol=1e-6)
        found.append(sum(breaks.values()))
    assert found[0] == found[1] > 0


@pytest.mark.parametrize("strict", [pytest.param(False, id="non-strict"), pytest.param(True, id="strict")])
def test_export_keeps_every_site(everything, strict):
    model, x = everything
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(model, (x,), strict=strict)
    assert torch.allclose(program.module()(x), model(x), atol=1e-6)
    assert not sites._running.modes
    float_model = copy.deepcopy(model)
    remove(float_model)
    assert not torch.allclose(program.module()(x), float_model(x), atol=1e-4)


@pytest.mark.parametrize(
    "copied",
    [pytest.param(copy.deepcopy, id="deepcopy"), pytest.param(lambda m: pickle.loads(pickle.dumps(m)), id="pickle")],
)
def test_a_copy_reads_its_own_weights(everything, copied):
    model, x = everything
    other = copied(model)
    assert torch.equal(other(x), model(x))
    assert other.head.linear_0.weight is other.head.weight and other.head.weight is not model.head.weight


def test_every_scale_learns(everything):
    model, x = copy.deepcopy(everything[0]).train(), everything[1]
    model(x).square().mean().backward()
    grads = {n: q.scale.grad for n, q in named_quantizers(model)}
    assert len(grads) > 15 and all(g is not None and g.isfinite().all() and g.abs().sum() > 0 for g in grads.values())


def test_removal_leaves_nothing_behind(everything):
    model, x = copy.deepcopy(everything[0]), everything[1]
    remove(model)
    assert all(type(m).__module__.startswith(("torch.nn", "test_sites")) for m in model.modules())
    assert not [n for m in model.modules() for n in vars(m) if n.startswith("site")]
    assert model(x).isfinite().all()


def test_a_plan_for_a_model_without_the_parameter_is_an_error():
    x = torch.randn(X)
    plan = planned(Model(lambda m, x: m.head(x), head=Head()), x)
    other = Model(lambda m, x: m.head(x), head=Head())
    other.head.wight = other.head.weight
    del other.head.weight
    with pytest.raises(UserError, match=r"no parameter 'head.weight' in Model; did you mean 'head.wight'"):
        apply_plan(other, plan)
