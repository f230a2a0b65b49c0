"""Which functions a policy reaches, and coverage as a contract."""

import pytest
import torch
import torch.nn.functional as F
from test_insert import Model, conv, inserted, planned
from torch import nn

from qat.config.presets import preset
from qat.errors import UserError
from qat.insert import named_quantizers
from qat.models.resnet import ResNet
from qat.planning.audit import audit, bops, check_coverage, coverage
from qat.planning.planner import make_plan
from qat.policies.policy import ALL_KINDS, DEFAULT_KINDS, QuantPolicy

X = (4, 6, 8)


def mixture() -> nn.Module:
    def forward(m, x):
        y = m.block(x)
        return torch.softmax(y @ x.mT, -1).exp() @ (y * x) + x

    return Model(forward, block=Model(lambda m, x: F.gelu(m.a(x) * x).exp(), a=nn.Linear(8, 8)))


EDGES = {"add_0", "matmul_0", "matmul_1"}


@pytest.mark.parametrize(
    ("policy", "sites"),
    [
        pytest.param({}, EDGES, id="default"),
        pytest.param({"sites": "off"}, set(), id="sites-off"),
        pytest.param({"act": "off"}, set(), id="act-off"),
        pytest.param({"kinds": ["add"]}, {"add_0"}, id="one-kind"),
        pytest.param({"kinds": []}, set(), id="no-kind"),
        pytest.param(
            {"kinds": "all"}, EDGES | {"mul_0", "block.mul_0", "block.gelu_0", "softmax_0"}, id="every-kind"
        ),
        pytest.param(
            {"rules": {"r": {"match": "block.*", "act": {"bits": 8}}}}, EDGES, id="a-rule-for-layers-adds-no-function"
        ),
        pytest.param({"rules": {"r": {"match": "block.mul_*", "act": {"bits": 8}}}}, EDGES | {"block.mul_0"},
                     id="a-pattern-that-names-it"),
        pytest.param({"rules": {"r": {"match": "*", "type": "mul", "act": {}}}}, EDGES | {"mul_0", "block.mul_0"},
                     id="a-type-that-names-it"),
        pytest.param({"rules": {"r": {"match": "*", "type": "matmul", "act": "off"}}}, {"add_0"}, id="a-type-off"),
    ],
)  # fmt: skip
def test_a_policy_reaches_the_kinds_it_names(policy, sites):
    assert set(planned(mixture(), torch.randn(X), **policy).sites) == sites


def test_a_function_that_a_rule_turns_on_starts_from_the_settings_of_sites():
    policy = {"sites": {"bits": 7}, "rules": {"r": {"match": "mul_0", "act": {"quantizer": "minmax"}}}}
    spec = planned(mixture(), torch.randn(X), **policy).activations["mul_0.input_0"]
    assert (spec.bits, spec.quantizer) == (7, "minmax")


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        pytest.param({"kinds": ["ad"]}, r"no kind of function is called 'ad'; did you mean 'add'", id="kind"),
        pytest.param({"kinds": "add"}, r"quant.kinds='add': must be all or a list", id="kinds-as-a-word"),
        pytest.param({"concat": "share"}, r"quant.concat='share': must be one of separate, shared",
                     id="concat"),
        pytest.param({"require_coverage": 99}, r"quant.require_coverage=99: must be a share", id="percent"),
        pytest.param({"kind": []}, r"quant.kind: no such setting; did you mean 'kinds'", id="key"),
    ],
)  # fmt: skip
def test_mistakes_name_the_nearest_right_thing(policy, message):
    with pytest.raises(UserError, match=message):
        QuantPolicy.from_dict({"act": {"bits": 8}, **policy})


def test_an_unaddressed_function_is_no_match():
    with pytest.raises(UserError, match=r"no layer matches 'block\.g\*'"):
        planned(mixture(), torch.randn(X), rules={"r": {"match": "block.g*", "act": "off"}})


def test_residual_networks_have_the_sites_they_always_had():
    x = torch.randn(2, 3, 16, 16)
    plan = planned(ResNet(8, 3, 10), x)
    assert {name.rpartition(".")[2] for name in plan.sites} == {"add_0", "avg_pool_0"}
    assert set(DEFAULT_KINDS) < set(ALL_KINDS)


# -- presets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sites", "weights", "inputs"),
    [
        pytest.param("literature", set(), 1, 1, id="literature"),
        pytest.param(
            "integer_only", EDGES | {"mul_0", "block.mul_0", "block.gelu_0", "softmax_0"}, 1, 1, id="integer-only"
        ),
        pytest.param("weights_only", set(), 1, 0, id="weights-only"),
        pytest.param("dynamic", set(), 1, 1, id="dynamic"),
        pytest.param("w8a8", EDGES, 1, 1, id="w8a8"),
    ],
)
def test_a_preset_trains_with_the_grids_of_its_name(name, sites, weights, inputs):
    model, x = mixture(), torch.randn(X)
    plan = planned(model, x, **preset(name))
    assert set(plan.sites) == sites and len(plan.weights) == weights
    assert bool(plan.layers["block.a"].input) == bool(inputs)
    inserted(model, x, **preset(name)).train()(x).square().mean().backward()
    assert model.block.a.weight.grad.abs().sum() > 0
    assert all(p.grad is None or p.grad.isfinite().all() for _, q in named_quantizers(model) for p in q.parameters())


# -- coverage ----------------------------------------------------------------------------------------------------------


def rows_of(model: nn.Module, x: torch.Tensor, **policy):
    policy = {"weight": {"bits": 8}, "act": {"bits": 8}, **policy}
    plan, recording = make_plan(model, QuantPolicy.from_dict(policy), lambda: model(x))
    return audit(model, plan, recording)


def test_everything_on_integers_is_full_coverage():
    rows = rows_of(mixture(), torch.randn(X))
    assert coverage(rows)[0] == 1
    assert bops(rows) == sum(row.macs for row in rows) * 8 * 8  # a product of two activations as one with a weight
    check_coverage(rows, {"": 1.0})


def test_too_little_coverage_names_the_largest_gaps_and_their_reasons():
    rules = {"r": {"match": "*", "type": "matmul", "act": "off"}}
    rows = rows_of(mixture(), torch.randn(X), rules=rules)
    linear, product = 6 * 8 * 8, 6 * 6 * 8  # of one sample
    share = linear / (linear + 2 * product)
    assert coverage(rows)[0] == pytest.approx(share)
    check_coverage(rows, {"": share})
    message = (
        r"quant.require_coverage=0.99: 39.99% of the multiply-accumulates are on integers; float are "
        r"'matmul_0' 30.0% \(rule 'r' leaves it float\); 'matmul_1' 30.0% \(rule 'r' leaves it float\)"
    )
    with pytest.raises(UserError, match=message.replace("39.99", f"{int(share * 1e4) / 100:.2f}")):
        check_coverage(rows, {"": 0.99})


@pytest.mark.parametrize(
    ("weight", "act", "formats", "stored"),
    [
        pytest.param("e4m3", "e4m3", "e4m3", 0, id="both"),
        pytest.param("e2m1", "e4m3", "e2m1 and e4m3", 0, id="two-formats"),
        pytest.param("int", "e4m3", "e4m3", 1, id="input"),
    ],
)
def test_floating_point_codes_are_no_integers(weight, act, formats, stored):
    grids = {"weight": {"format": weight, "bits": 8 if weight == "int" else None}}
    grids["act"] = {"format": act, "bits": None}
    rows = rows_of(mixture(), torch.randn(X), **grids)
    assert coverage(rows) == (0, stored)
    assert rows[0].reason == f"computed in float: {formats} codes are no integers"
    assert rows[-1].reason == f"computed in float: {act} codes are no integers"
    products, bits = [row for row in rows if row.weight is None], rows[-1].act_bits
    assert bops(products) == sum(row.macs for row in products) * bits * bits, "their bits count, whatever they are"
    with pytest.raises(UserError, match=r"require_coverage=1.0: 0.00% .* 100.0% \(computed in float: .* no integers"):
        check_coverage(rows_of(nn.Linear(8, 4), torch.randn(2, 8), **grids), {"": 1.0})


def test_the_callback_holds_the_model_to_it(tmp_path):
    import pytorch_lightning as pl
    from torch.utils.data import DataLoader

    import qat

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.body = Model(lambda m, x: m.a(x).mean((2, 3)), a=conv())

        def training_step(self, batch, index):
            return self.body(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    policy = {"weight": {"bits": 8}, "require_coverage": 0.99}
    trainer = pl.Trainer(
        max_steps=1, callbacks=[qat.QATCallback(policy)], logger=False, enable_checkpointing=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    module = Module()
    with pytest.raises(
        UserError, match=r"quant.require_coverage=0.99: 0.00% .* 'body.a' 100.0% \(policy leaves its input"
    ):
        trainer.fit(module, DataLoader(torch.randn(8, 3, 8, 8), 4))
    assert not list(named_quantizers(module))


@pytest.mark.parametrize(
    ("layer", "call", "name", "what"),
    [
        pytest.param(None, lambda m, x: torch.einsum("btc,bsc->bts", m.a(x), x), "einsum_0", "einsum", id="einsum"),
        pytest.param(nn.ConvTranspose1d(6, 6, 3), lambda m, x: m.b(m.a(x)), "b", "ConvTranspose1d", id="transposed"),
        pytest.param(nn.Bilinear(8, 8, 4), lambda m, x: m.b(m.a(x), x), "b", "Bilinear", id="bilinear"),
    ],
)
def test_what_the_runtime_computes_in_float_is_no_integer_coverage(layer, call, name, what):
    rows = rows_of(Model(call, a=nn.Linear(8, 8), **({"b": layer} if layer else {})), torch.randn(X))
    row = next(row for row in rows if row.name == name)
    assert row.act and row.macs and row.integer_macs == 0
    assert row.reason == f"ONNX Runtime has no integer kernel for {what}"
    with pytest.raises(UserError, match=f"'{name}' .* no integer kernel for {what}"):
        check_coverage(rows, {"": 0.99})


class Times(nn.Module):
    """A product with a parameter, which nothing but its shape tells what it is."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.a, self.table = nn.Linear(8, 8), nn.Parameter(torch.randn(shape))

    def forward(self, x):
        return self.a(x) @ self.table


def test_groups_of_a_stack_of_matrices_are_refused():
    group = {"bits": 4, "granularity": "group", "group_size": 2}
    planned(Times(8, 6), torch.randn(X), weight=group)
    with pytest.raises(UserError, match=r"'matmul_0': granularity=group .* 'table' is a stack of them \[4, 8, 6\]"):
        planned(Times(4, 8, 6), torch.randn(X), weight=group)


def test_a_vector_has_no_output_channels_and_stays_float():
    rows = rows_of(Times(8), torch.randn(X))
    row = next(row for row in rows if row.name == "matmul_0")
    assert (row.weight, row.act, row.reason) == (None, None, "one side of the product is a vector of parameters")
