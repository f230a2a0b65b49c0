"""No config can rot: each file composes, and its targets take what it says."""

import re
import warnings

import pytest
import torch
from omegaconf import OmegaConf

from qat.config.configs import composed, configs_dir, finalize_config, policy_settings, read_config
from qat.config.instantiate import _check, instantiate
from qat.errors import UserError
from qat.grid.ranges import ESTIMATORS
from qat.lightning.runs.checks import check
from qat.lightning.runs.workspace import Workspace
from qat.policies.policy import QuantPolicy


def _options(group: str) -> list[str]:
    return sorted(path.stem for path in (configs_dir() / group).glob("*.yaml"))


@pytest.fixture
def config(tmp_path):
    def finished(*overrides: str):
        cfg = composed(overrides)
        finalize_config(cfg, tmp_path)
        return cfg

    return finished


TEACHER = "callbacks.distill.teacher=teacher.safetensors"
BUDGETS = {"cifar10/full": 300, "cifar10/taught": 8, "shakespeare/taught": 6}  # to be named behind a recipe
NEEDED = {f"experiment={budget}": [TEACHER] for budget in BUDGETS}  # values that a config leaves to its user
BESIDE = [
    (f"{folder}/{recipe}", budget)
    for budget in BUDGETS
    for folder in [budget.split("/")[0]]
    for recipe in _options(f"experiment/{folder}")
    if f"{folder}/{recipe}" not in BUDGETS
    and recipe not in ("chargpt_float", "llama_w4a16")  # without a QAT stage; of another model
]
EVERY = [
    f"{group}={'/'.join(option)}"
    for group, *option in sorted(
        p.relative_to(configs_dir()).with_suffix("").parts for p in configs_dir().rglob("*/*.yaml")
    )
    if group != "hydra"
]


@pytest.mark.parametrize("choice", EVERY)
def test_every_config_composes_and_its_targets_take_every_key(choice, config):
    cfg = config(choice, *NEEDED.get(choice, []))
    _check(cfg, "", {})
    QuantPolicy.from_dict(policy_settings(cfg.quant))


@pytest.mark.parametrize("path", sorted(configs_dir().rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_begins_with_what_it_is_for(path):
    assert path.read_text().removeprefix("# @package _global_\n").startswith("# ")


def test_the_default_quant_names_every_range_estimator():
    named = re.search(r"qat/grid/ranges\.py: (.*)", (configs_dir() / "quant/w8a8.yaml").read_text())
    assert named and named[1].split(", ") == list(ESTIMATORS)


def test_a_config_that_calls_the_engine_target_as_older_ones_do_is_read(config, tmp_path):
    cfg, path = config("quant=qnn_w8a16"), tmp_path / "config.yaml"
    path.write_text(OmegaConf.to_yaml(cfg).replace("  engine: qnn\n", "  target: qnn\n"))
    assert "engine" not in path.read_text() and read_config(path) == cfg


@pytest.mark.parametrize(
    ("precision", "fast", "warned"),
    [("bf16-mixed", False, True), ("bf16-mixed", True, False), ("32-true", False, False)],
)
def test_bfloat16_without_fast_kernels_is_warned_of(precision, fast, warned, config, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: fast)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        check(Workspace(config("model=mlp", "quant=off", f"trainer.precision={precision}"), tmp_path))
    said = [str(w.message) for w in found if "no fast kernels" in str(w.message)]
    assert len(said) == warned and all(text.startswith(f"trainer.precision={precision}: ") for text in said)


def test_the_policies_of_networks_settle_by_the_rules_of_the_file_to_be_written(config, tmp_path):
    cfg = config("model=resnet20", "model.depth=8", "model.in_channels=1", "export=openvino")
    other = {"calibration_samples": 64, "scale_lr": None, "module": None}
    cfg.quant = {"modules": {"layer1": {"weight": {"bits": 8}}, "layer2": {"weight": {"bits": 4}}}, **other}
    assert Workspace(cfg, tmp_path).policy.engine == "openvino"
    cfg.quant.module = "layer1"
    with pytest.raises(UserError, match="module=layer1: its policy has networks of its own, layer1, layer2"):
        Workspace(cfg, tmp_path)


@pytest.mark.parametrize(("recipe", "budget"), BESIDE)
def test_a_budget_goes_with_every_recipe_beside_it(recipe, budget, config):
    cfg = config(f"experiment=[{recipe},{budget}]", TEACHER)
    _check(cfg, "", {})
    assert cfg.trainer.max_epochs == BUDGETS[budget]
    assert all("_target_" in node for node in cfg.callbacks.values() if node)


@pytest.mark.parametrize(("budget", "recipe"), {budget: recipe for recipe, budget in BESIDE}.items())
def test_a_budget_asks_for_its_teacher(budget, recipe, config):
    with pytest.raises(UserError, match=r"'callbacks\.distill\.teacher' needs a value"):
        config(f"experiment=[{recipe},{budget}]")


@pytest.mark.parametrize("option", _options("trainer"))
def test_a_trainer_is_built_with_every_key_of_its_config(option, config, tmp_path):
    cfg = config(f"trainer={option}", "trainer.accelerator=cpu")
    trainer = instantiate(cfg.trainer, logger=False)
    assert (trainer.max_epochs, trainer.default_root_dir) == (cfg.trainer.max_epochs, str(tmp_path))
    assert trainer.num_devices == cfg.trainer.devices


@pytest.mark.parametrize("option", [option for option in _options("logger") if option != "none"])
def test_a_logger_writes_below_the_run_directory(option, config, tmp_path):
    if option == "tensorboard":
        pytest.importorskip("tensorboard", reason="needs the extra `tensorboard`")
    logger = instantiate(config(f"logger={option}").logger)
    assert logger.save_dir == str(tmp_path)


def test_no_logger_is_none(config):
    assert config("logger=none").logger is None


@pytest.mark.parametrize("option", _options("debug"))
def test_a_debug_config_changes_only_what_the_trainer_and_the_program_know(option, config):
    plain, debug = config(), config(f"debug={option}")
    assert debug != plain
    assert set(debug) == set(plain) and set(debug.trainer) == set(plain.trainer)
    instantiate(debug.trainer, logger=False)


# -- what is monitored -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sweep", ["optuna_pareto", "ray_asha"])
def test_the_best_checkpoint_and_sweeps_look_at_the_val_metric_in_the_direction_of_mode(sweep, config):
    cfg = config(f"sweep={sweep}", "metric=test/mse", "val_metric=val/mse", "mode=min")
    assert (cfg.callbacks.best.monitor, cfg.callbacks.best.mode, cfg.sweep.monitor) == ("val/mse", "min", "val/mse")
    assert cfg.sweep.objectives.metric == "min"


@pytest.mark.parametrize(
    "own",
    [
        ["callbacks.best.monitor=val/mse"],
        ["callbacks.best.mode=max"],
        ["callbacks=[]"],
        ["trainer.max_epochs=0"],
        ["quant=off"],
    ],
)
def test_mode_alone_may_be_turned_round_where_nothing_looks_at_the_val_metric_with_it(own, config):
    assert config("metric=test/mse", "mode=min", *own).val_metric == "val/acc"
    with pytest.raises(UserError, match="val_metric=val/acc: mode=min is said of it, too"):
        config("metric=test/mse", "mode=min")
