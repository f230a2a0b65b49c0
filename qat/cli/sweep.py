"""`qat train -m ...` and `qat train sweep=...`: reads what varies off the command line, and runs the sweep.

The command line is read with Hydra's own grammar (`a,b`, `range(2,9)`, `glob(w*)`, `interval(0.01,0.1)`). Every value
is tried in a composed config before anything runs, so that a mistake in the last point is found before the first.
"""

import argparse
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from qat.config.configs import composed, configs_dir, finalize_config, policy_settings
from qat.config.explain import COMPOSITION_ERRORS, explain
from qat.config.instantiate import build
from qat.config.overrides import group_of, key_of, quoted
from qat.errors import UserError
from qat.sweep.base import Sweep
from qat.sweep.objectives import check
from qat.sweep.results import read_sweep
from qat.sweep.space import Interval, Space, from_yaml
from qat.sweep.task import Task

GROUP = "sweep"
OBJECTIVES = "sweep.objectives"
"""A mapping that the command line replaces as a whole: merged, it could leave out none of the sweep's own."""
FREE = ("run_dir", "cache_dir", "logger", GROUP)
"""Parts of a config that say where a point runs and what is written of it, not what comes of it."""
WHOLE = re.compile(r"(?<!float\()interval\(\s*(?:start\s*=\s*)?[+-]?\d+\s*,\s*(?:end\s*=\s*)?[+-]?\d+\s*\)")
"""An interval whose ends are whole numbers, as then is every number drawn from it."""
HYDRAS = ("hydra/launcher", "hydra/sweeper", "hydra.launcher", "hydra.sweep", "hydra.mode")
"""Hydra's ways to run a sweep, which know neither resuming nor processes of their own."""


def main(args: argparse.Namespace) -> int:
    """Runs the sweep of a command line to its end; status 1 if a point failed or did not verify."""
    try:
        line = _Line(args)
        sweep, task = line.sweep()
    except COMPOSITION_ERRORS as error:
        raise explain(error, _whole(args.overrides), args.config_dir) from error
    with task.claimed(sweep.kind):
        sweep.run(task)
    from qat.report.sweep import tell_bad, write_reports  # imports matplotlib

    swept = read_sweep(task.folder)
    write_reports(swept, task.console)
    if line.logger is not None:
        from qat.report.sweep import log_sweep

        log_sweep(swept, line.logger)
    return 1 if tell_bad(swept, task.console) else 0


def _whole(overrides: list[str]) -> list[str]:
    """The command line with the sweep that `-m` alone means."""
    given = [text for text in overrides if text != f"{GROUP}=[]"]
    return given if any(key_of(text) == GROUP for text in given) else [f"{GROUP}=grid", *given]


class _Line:
    """The command line, taken apart: what all points share, what varies, and what is said of the sweep itself."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.config_dir = str(Path(args.config_dir).absolute()) if args.config_dir else None
        texts = list(args.overrides)
        for text in texts:
            if key_of(text) == "run_dir":
                raise UserError("run_dir is the directory of one run; a sweep has sweep.dir=...")
            if key_of(text).startswith(HYDRAS):
                raise UserError(f"{text}: sweeps here are run by sweep=... and sweep/launcher=..., not by Hydra")
        search_path = create_config_search_path(str(configs_dir()))
        if self.config_dir:
            search_path.append("command-line", f"file://{self.config_dir}")
        parsed = OverridesParser.create(ConfigLoaderImpl(search_path)).parse_overrides(texts)
        self.own: list[str] = []
        self.fixed: list[str] = []
        self.swept: dict[str, Override] = {}
        for text, override in zip(texts, parsed, strict=True):
            if group_of(text) == GROUP:
                whole = [f"~{OBJECTIVES}", f"+{text}"] if text.startswith(f"{OBJECTIVES}=") else [text]
                self.own += [f"{GROUP}=grid"] if text == f"{GROUP}=[]" else whole  # none, but -m: a plain grid
            elif override.is_sweep_override():
                self.swept[text.partition("=")[0]] = override
            else:
                self.fixed.append(text)
        self.logger: dict[str, Any] | None = None

    def sweep(self) -> tuple[Sweep, Task]:
        """The sweep and its task, everything checked."""
        space: Space = {key: _values(override) for key, override in self.swept.items()}
        if not any(key_of(text) == GROUP for text in self.own) and not self._compose(self._first(space)).get(GROUP):
            self.own.insert(0, f"{GROUP}=grid")
        cfg = self._compose([*self.own, *self._first(space)])
        given = {key_of(text) for text in self.fixed}
        settings: Any = OmegaConf.to_container(cfg.sweep)
        written = from_yaml(settings.get("params"))
        space = {k: v for k, v in written.items() if key_of(k) not in given and k not in space} | space
        if not space:
            raise UserError("nothing varies: give a key several values (quant.weight.bits=2,4,8), or sweep=bits_grid")
        objectives = check(cfg.sweep.objectives, cfg.metric, cfg.mode, exports=bool(cfg.export))
        sweep = build(cfg, GROUP, Sweep)
        folder = Path(sweep.dir or self._folder(cfg, space, objectives)).absolute()
        cache = [] if cfg.cache_dir else [f"cache_dir={quoted(str(folder / 'cache'))}"]
        command = (*self._options(cfg, folder), *self.fixed, *cache, f"~{GROUP}")
        console = Console(highlight=False)
        task = Task(command, space, objectives, cfg.metric, cfg.mode, cfg.seed, folder, console)
        sweep.check(task)
        logs = "CSVLogger" in str((cfg.get("logger") or {}).get("_target_"))
        if sweep.reads_logs is not None and not logs:
            raise UserError(f"logger: ending points early reads their csv log: use logger=csv, or {sweep.reads_logs}")
        return sweep, replace(task, config=self._try(space))

    def _options(self, cfg: DictConfig, folder: Path) -> list[str]:
        """Arguments that every point gets besides its overrides."""
        options = ["--config-dir", self.config_dir] if self.config_dir else []
        if "WandbLogger" in str((cfg.get("logger") or {}).get("_target_")):
            self.logger = {"project": cfg.logger.project, "offline": cfg.logger.offline, "group": folder.name}
            options.append(f"logger.group={quoted(folder.name)}")
        return options

    def _folder(self, cfg: DictConfig, space: Space, objectives: dict[str, str]) -> str:
        """The folder of the sweep, named by a hash: the same command has the same."""
        content = json.dumps([self.fixed, {k: str(v) for k, v in space.items()}, objectives, cfg.sweep._target_])
        choice = next((text.partition("=")[2] for text in self.own if key_of(text) == GROUP), GROUP)
        return f"logs/{cfg.name}/sweeps/{choice}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"

    def _try(self, space: Space) -> dict[str, str]:
        """Composes the config with every value once; part of it -> a hash of what it then said.

        As it is written: what an interpolation takes from the clock or the environment (`${oc.env:DATA}`) may differ
        from one machine to another that goes on with the sweep.
        """
        first = self._first(space)
        tried = {"": first}
        for i, (key, values) in enumerate(space.items()):
            for value in values[1:] if isinstance(values, list) else [values.high]:
                tried[f"{key}={value}"] = [*first[:i], f"{key}={value}", *first[i + 1 :]]
        found: dict[str, dict[str, Any]] = {}
        policies: list[dict[str, Any]] = []
        for text, overrides in tried.items():
            cfg = self._written([*self.own, *overrides])
            said = OmegaConf.to_container(cfg)
            assert isinstance(said, dict)
            for part in said:
                if part not in FREE:
                    found.setdefault(str(part), {})[text] = said[part]
            finalize_config(cfg, Path("point"))
            if (settings := policy_settings(cfg.quant)) not in policies:
                policies.append(settings)
        _check_policies(policies)
        texts = {part: json.dumps(said, sort_keys=True, default=str) for part, said in found.items()}
        return {part: hashlib.sha256(text.encode()).hexdigest()[:16] for part, text in texts.items()}

    def _first(self, space: Space) -> list[str]:
        return [f"{key}={v[0] if isinstance(v, list) else v.low}" for key, v in space.items()]

    def _compose(self, more: Sequence[str]) -> DictConfig:
        cfg = self._written(more)
        finalize_config(cfg, Path("point"))
        return cfg

    def _written(self, more: Sequence[str]) -> DictConfig:
        """The config as Hydra composes it, interpolations and all."""
        return composed([*self.fixed, *more], self.config_dir)


def _check_policies(settings: list[dict[str, Any]]) -> None:
    from qat.policies.networks import policy_of  # imports torch: only once all configs are there

    for each in settings:
        policy_of(each)


def _values(override: Override) -> list[str] | Interval:
    """Values of a swept override, as Hydra understands it."""
    value = override.value()
    if isinstance(value, IntervalSweep):
        assert value.start is not None and value.end is not None
        low, high = value.start, value.end
        if WHOLE.search(override.input_line or ""):  # Hydra makes floats of all ends
            low, high = int(low), int(high)
        return Interval(low, high, "log" in value.tags)
    return list(dict.fromkeys(override.sweep_string_iterator()))
