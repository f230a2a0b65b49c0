"""Policies: rules cascade by order, and whatever is wrong in one is named with the nearest right thing."""

from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qat.errors import UserError
from qat.policies.networks import NetworkPolicies, policy_of
from qat.policies.policy import QuantPolicy
from qat.policies.rules import Place

PLACES = [
    Place("conv1", "Conv2d", True),
    Place("layer1.0.conv1", "Conv2d", True),
    Place("layer1.0.add_0", "add", False),
    Place("layer2.0.conv1", "Conv2d", True),
    Place("avg_pool_0", "avg_pool", False),
    Place("head", "Linear", True),
]
DEFAULTS = {"weight": {"bits": 4, "granularity": "channel"}, "act": {"bits": 4}}


def bits(settings: dict, role: str) -> dict[str, int | None]:
    decided = QuantPolicy.from_dict(settings).resolve(PLACES)
    return {name: spec.bits if (spec := roles[role][0]) else None for name, roles in decided.items()}


def policy(**rules) -> dict:
    return {**DEFAULTS, "rules": rules}


def test_defaults_reach_everything():
    assert set(bits(DEFAULTS, "act").values()) == {4}
    assert set(bits(DEFAULTS, "weight").values()) == {4}


def test_sites_are_a_layer_of_their_own_on_top_of_act():
    settings = {"act": {"bits": 4, "quantizer": "minmax"}, "sites": {"bits": 8}}
    decided = QuantPolicy.from_dict(settings).resolve(PLACES)
    assert decided["layer1.0.add_0"]["act"][0].bits == 8
    assert decided["layer1.0.add_0"]["act"][0].quantizer == "minmax"
    assert decided["head"]["act"][0].bits == 4


@pytest.mark.parametrize(
    ("settings", "role", "quantized"),
    [
        pytest.param({"act": {"bits": 4}}, "weight", set(), id="no-weight-settings"),
        pytest.param({**DEFAULTS, "weight": False}, "weight", set(), id="weight-off-as-yaml-reads-it"),
        pytest.param({**DEFAULTS, "act": "off"}, "act", set(), id="act-off-as-a-string"),
        pytest.param({**DEFAULTS, "act": "off", "sites": {"bits": 8}}, "act", {"layer1.0.add_0", "avg_pool_0"},
                     id="sites-alone"),
        pytest.param({**DEFAULTS, "sites": False}, "act", {p.name for p in PLACES if p.has_weight}, id="sites-off"),
        pytest.param(policy(r={"match": "layer*", "act": False}), "act", {"conv1", "avg_pool_0", "head"},
                     id="rule-off"),
        pytest.param({"rules": {"r": {"match": "head", "weight": {}}}}, "weight", {"head"}, id="rule-turns-on"),
    ],
)  # fmt: skip
def test_off_leaves_float(settings, role, quantized):
    assert {name for name, b in bits(settings, role).items() if b} == quantized


@pytest.mark.parametrize(
    ("rule", "matched"),
    [
        pytest.param({"match": "layer1.*"}, {"layer1.0.conv1", "layer1.0.add_0"}, id="star-crosses-dots"),
        pytest.param({"match": "*.conv1"}, {"layer1.0.conv1", "layer2.0.conv1"}, id="suffix"),
        pytest.param({"match": ["head", "conv1"]}, {"head", "conv1"}, id="several-patterns"),
        pytest.param({"match": "@first"}, {"conv1"}, id="first-layer-with-a-weight"),
        pytest.param({"match": "@last"}, {"head"}, id="last-layer-with-a-weight"),
        pytest.param({"match": ["@first", "@last"]}, {"conv1", "head"}, id="both-ends"),
        pytest.param({"match": "*", "type": "Linear"}, {"head"}, id="class"),
        pytest.param({"match": "*", "type": "add"}, {"layer1.0.add_0"}, id="kind-of-site"),
        pytest.param(
            {"match": "layer*", "type": "Conv2d"}, {"layer1.0.conv1", "layer2.0.conv1"}, id="pattern-and-class"
        ),
    ],
)
def test_a_rule_changes_what_it_matches_and_nothing_else(rule, matched):
    changed = bits(policy(r={**rule, "act": {"bits": 7}}), "act")
    assert {name for name, b in changed.items() if b == 7} == matched
    assert {b for name, b in changed.items() if name not in matched} == {4}


def test_first_and_last_follow_execution_order_and_skip_sites():
    decided = QuantPolicy.from_dict(policy(r={"match": "@last", "act": {"bits": 8}})).resolve(PLACES[:3])
    assert decided["layer1.0.conv1"]["act"][0].bits == 8


def test_a_rule_keeps_what_it_does_not_mention():
    settings = policy(r={"match": "head", "weight": {"bits": 8}})
    spec = QuantPolicy.from_dict(settings).resolve(PLACES)["head"]["weight"][0]
    assert (spec.bits, spec.granularity) == (8, "channel")
    assert bits(settings, "act")["head"] == 4


def test_the_decision_names_the_rule_that_made_it():
    settings = policy(a={"match": "*", "act": {"bits": 5}}, b={"match": "head", "act": {"bits": 6}})
    decided = QuantPolicy.from_dict(settings).resolve(PLACES)
    assert [decided["head"]["act"][1], decided["conv1"]["act"][1], decided["conv1"]["weight"][1]] == [
        "b",
        "a",
        "default",
    ]


RULES = st.lists(
    st.tuples(st.sampled_from([p.name for p in PLACES] + ["*", "layer*"]), st.none() | st.integers(2, 8)), max_size=5
)


@given(RULES)
def test_of_the_rules_that_match_the_last_wins(rules):
    named = {f"r{i}": {"match": m, "act": False if b is None else {"bits": b}} for i, (m, b) in enumerate(rules)}
    for name, decided in bits(policy(**named), "act").items():
        matching = [b for m, b in rules if m in (name, "*") or (m == "layer*" and name.startswith("layer"))]
        assert decided == (matching[-1] if matching else 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        pytest.param({"wieght": {}}, "quant.wieght: no such setting; did you mean 'weight'?", id="section"),
        pytest.param({"weight": {"bit": 4}}, "quant.weight.bit: no such setting; did you mean 'bits'?", id="setting"),
        pytest.param({"weight": {"bits": "four"}}, "quant.weight.bits='four': must be", id="type-of-a-value"),
        pytest.param({"act": {"bits": 99}}, "quant.act: bits=99", id="value"),
        pytest.param({"act": True}, "quant.act=True: must be off or settings", id="on-is-no-setting"),
        pytest.param({"act": {"quantizer": "lsk"}}, "quant.act.quantizer=lsk: no such quantizer; did you mean 'lsq'?",
                     id="quantizer"),
        pytest.param({"act": {"range": "mze"}}, "quant.act.range=mze: no such estimator; did you mean 'mse'?",
                     id="range"),
        pytest.param({"act": {"granularity": "channel"}}, "quant.act: granularity=channel: ",
                     id="activation-per-channel"),
        pytest.param({"sites": {"granularity": "group", "group_size": 4}}, "quant.sites: granularity=group: ",
                     id="site-in-groups"),
        pytest.param({"weight": {"granularity": "group", "group_size": 4, "group_axis": -1}},
                     "quant.weight.group_axis=-1: groups of a weight run along its input channels", id="weight-axis"),
        pytest.param({"weight": {"granularity": "group"}}, "group_size goes with granularity=group",
                     id="group-of-nothing"),
        pytest.param({"rules": ["stem"]}, "quant.rules=['stem']: must map a name to each rule", id="rules-as-a-list"),
        pytest.param(policy(stem="@first"), "quant.rules.stem='@first': a rule is a mapping such as",
                     id="rule-as-a-string"),
        pytest.param(policy(stem={"mach": "a"}), "quant.rules.stem.mach: no such setting; did you mean 'match'?",
                     id="key-of-a-rule"),
        pytest.param(policy(stem={"act": False}), "quant.rules.stem.match=None: must be a pattern", id="no-pattern"),
        pytest.param(policy(stem={"match": [], "act": False}), "quant.rules.stem.match=[]: must be a pattern",
                     id="empty-list"),
        pytest.param(policy(stem={"match": [1], "act": False}), "quant.rules.stem.match=[1]: must be a pattern",
                     id="number"),
        pytest.param(policy(stem={"match": "*", "type": 3, "act": False}),
                     "quant.rules.stem.type=3: must be a class name",
                     id="type-of-a-rule"),
        pytest.param(policy(stem={"match": "*"}), "quant.rules.stem: it changes nothing", id="rule-without-settings"),
        pytest.param(policy(stem={"match": "*", "act": {"bitz": 1}}),
                     "quant.rules.stem.act.bitz: no such setting; did you mean 'bits'?", id="setting-in-a-rule"),
        pytest.param(policy(stem={"match": "*", "act": {"bits": 99}}), "quant.rules.stem.act: bits=99",
                     id="value-in-a-rule"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_before_any_model_is_seen(settings, message):
    with pytest.raises(UserError) as error:
        QuantPolicy.from_dict(settings)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        pytest.param({"match": "heed"}, "quant.rules.r.match: no layer matches 'heed'; did you mean 'head'?",
                     id="name"),
        pytest.param({"match": "layr1.*"}, "no layer matches 'layr1.*'; did you mean 'layer1.*'", id="prefix"),
        pytest.param({"match": ["head", "nothing.*"]}, "no layer matches 'nothing.*'", id="one-pattern-of-several"),
        pytest.param({"match": "@frist"}, "no selector '@frist'; did you mean '@first'?", id="selector"),
        pytest.param({"match": "*", "type": "Conv3d"},
                     "quant.rules.r.type: nothing is a 'Conv3d'; did you mean 'Conv2d'?",
                     id="class"),
        pytest.param({"match": "head", "type": "Conv2d"}, "quant.rules.r.match: no layer matches 'head'",
                     id="pattern-and-class-that-exclude-each-other"),
    ],
)  # fmt: skip
def test_a_rule_that_matches_nothing_is_an_error(rule, message):
    built = QuantPolicy.from_dict(policy(r={**rule, "act": {"bits": 8}}))
    with pytest.raises(UserError) as error:
        built.resolve(PLACES)
    assert message in str(error.value)


SEQ, DOREFA = {"format": "ternary", "bits": None, "quantizer": "seq"}, {"bits": 4, "quantizer": "dorefa"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        pytest.param({"weight": SEQ | {"range": "percentile"}},
                     "quant.weight.range=percentile: quantizer=seq has a start of its own for weights; leave range at "
                     "mse, the default", id="weights"),
        pytest.param({"act": DOREFA | {"range": "kl"}}, "quant.act.range=kl: quantizer=dorefa has a start of its own "
                     "for activations; leave range at mse, the default", id="activations"),
        pytest.param({"weight": {"bits": 4, "quantizer": "minmax", "range": "percentile"}},
                     "quant.weight.range=percentile: quantizer=minmax has a start of its own for weights; leave range "
                     "at mse, the default, or set minmax or centred or even", id="some"),
        pytest.param({"weight": {"bits": 4, "range": "lsq"}, "rules": {"stem": {"match": "@first", "weight": SEQ}}},
                     "quant.rules.stem.weight.range=lsq: quantizer=seq has", id="a-rule-s-quantizer"),
        pytest.param({"weight": {"bits": 4, "quantizer": "minmax", "range": "kl"},
                      "rules": {"stem": {"match": "@first", "weight": {"bits": 8}}}},
                     "quant.weight.range=kl: quantizer=minmax has", id="a-rule-that-chooses-neither"),
    ],
)  # fmt: skip
def test_a_range_that_the_quantizer_would_ignore_is_refused_where_it_is_planned(settings, message):
    built = QuantPolicy.from_dict(settings)  # as runs of before hold it
    with pytest.raises(UserError) as error:
        built.resolve(PLACES)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"weight": SEQ | {"range": "mse"}}, id="default"),
        pytest.param({"weight": {"bits": 4, "quantizer": "minmax", "range": "even"}}, id="heeded"),
        pytest.param({"weight": SEQ | {"range": "kl"}, "rules": {"all": {"match": "*", "weight": {"range": "mse"}}}},
                     id="nowhere-in-use"),
        pytest.param({"act": {"quantizer": "lsq_plus", "symmetric": False, "range": "kl"}}, id="activations-alone"),
    ],
)  # fmt: skip
def test_a_range_that_the_quantizer_heeds_or_that_is_the_default_is_planned(settings):
    QuantPolicy.from_dict(settings).resolve(PLACES)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        pytest.param({"modules": {"layer1": DEFAULTS}, "rules": {}},
                     "quant.rules: no such setting beside modules; each network has its own", id="beside"),
        pytest.param({"modules": {"layer1": DEFAULTS}, "wieght": 3}, "quant.wieght: no such setting", id="misspelled"),
        pytest.param({"modules": {"layer1": {"modules": {"0": DEFAULTS}}}},
                     "quant.modules.layer1.modules: no such setting", id="nested"),
        pytest.param({"modules": {}}, "quant.modules={}: must map the path of each network", id="none"),
        pytest.param({"modules": ["layer1"]}, "quant.modules=['layer1']: must map the path of each", id="list"),
        pytest.param({"modules": {"layer1": {"weight": {"bit": 4}}}}, "quant.modules.layer1.weight.bit: no such",
                     id="in-one"),
        pytest.param({"modules": {"layer1": {**DEFAULTS, "concat": "shared"}, "layer2": DEFAULTS}},
                     "concat: the networks of one model share a setting", id="differ"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_policies_of_networks_is_named(settings, message):
    with pytest.raises(UserError) as error:
        policy_of(settings)
    assert message in str(error.value)


def test_a_network_s_rule_is_named_by_its_own_key():
    built = policy_of({"modules": {"layer1": policy(r={"match": "0.conv2", "act": {"bits": 8}})}})
    with pytest.raises(UserError, match=r"^quant\.modules\.layer1\.rules\.r\.match: no layer matches '0\.conv2'"):
        built.resolve(PLACES)


def test_policies_of_networks_are_no_policy_of_a_network():
    several = policy_of({"modules": {"0": DEFAULTS}})
    assert not isinstance(several, QuantPolicy), "its settings are others"
    with pytest.raises(UserError, match="module=layer1: its policy has networks of its own, 0"):
        NetworkPolicies({"layer1": several})


def test_weight_settings_for_sites_alone_are_an_error():
    built = QuantPolicy.from_dict(policy(r={"match": "*add*", "weight": {"bits": 8}}))
    with pytest.raises(UserError, match=r"nothing that it matches has a weight: layer1\.0\.add_0"):
        built.resolve(PLACES)


def test_settings_that_only_fit_together_badly_name_the_place():
    grouped = {"match": "layer*", "weight": {"granularity": "group", "group_size": 4}}
    built = QuantPolicy.from_dict(policy(a=grouped, b={"match": "layer1.*", "weight": {"granularity": "channel"}}))
    with pytest.raises(UserError, match=r"quant\.weight for layer1\.0\.conv1: .*group_size"):
        built.resolve(PLACES)


class TestOverrides:
    """What Hydra's `~quant.rules.x`, `+quant.rules.x=...` and `quant.rules.x=null` leave behind, as plain dicts."""

    RULES: ClassVar = {"stem": {"match": "@first", "act": {"bits": 8}}, "head": {"match": "@last", "act": {"bits": 8}}}

    def test_a_deleted_rule_no_longer_acts(self):
        rules = {name: rule for name, rule in self.RULES.items() if name != "stem"}
        assert bits(policy(**rules), "act")["conv1"] == 4
        assert bits(policy(**rules), "act")["head"] == 8

    def test_a_null_rule_is_a_deleted_one(self):
        null = bits(policy(**{**self.RULES, "stem": None}), "act")
        assert null == bits(policy(head=self.RULES["head"]), "act")

    def test_an_added_rule_comes_last_and_wins(self):
        assert bits(policy(**self.RULES, all={"match": "*", "act": {"bits": 6}}), "act")["head"] == 6

    def test_a_changed_rule_keeps_its_place(self):
        rules = {**self.RULES, "stem": {"match": "*", "act": {"bits": 5}}}
        assert bits(policy(**rules), "act") | {"head": 5} == dict.fromkeys((p.name for p in PLACES), 5)
        assert bits(policy(**rules), "act")["head"] == 8

    def test_null_sections_and_no_rules_mean_off(self):
        assert QuantPolicy.from_dict({"weight": None, "act": None, "sites": {}, "rules": None}).is_off


@pytest.mark.parametrize(
    ("settings", "off"),
    [
        pytest.param({}, True, id="empty"),
        pytest.param({"act": False, "rules": {"r": {"match": "*", "act": False}}}, True, id="rules-that-turn-off"),
        pytest.param({"sites": {"bits": 8}}, False, id="sites"),
        pytest.param({"rules": {"r": {"match": "*", "weight": {"bits": 8}}}}, False, id="a-rule-that-turns-on"),
    ],
)
def test_off_means_that_nothing_asks_for_a_grid(settings, off):
    assert QuantPolicy.from_dict(settings).is_off is off


def test_a_policy_rebuilds_from_its_settings():
    first = QuantPolicy.from_dict(policy(r={"match": ("head", "conv1"), "act": {"bits": 8}}))
    again = QuantPolicy.from_dict(first.settings)
    assert again.settings == first.settings
    assert again.resolve(PLACES) == first.resolve(PLACES)
