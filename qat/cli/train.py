"""`qat train [key=value ...]`: composes the config, and hands it to `qat.lightning.runs.run.run`.

Hydra does what it is good at (composition, run directories, `--cfg`, the words that complete another). Around it:
mistakes are one line with the nearest right thing, and leave nothing on the disk. Torch and Lightning are imported by
the task, after composition succeeded.
"""

import argparse
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import hydra

# The parser of hydra.main, which offers no other way to see its arguments.
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from qat.cli import interrupted
from qat.cli.arguments import complaint
from qat.cli.completion import completion
from qat.cli.output import NoteNewDirs, discard, discard_all
from qat.config.configs import configs_dir, finalize_config, group_overrides
from qat.config.explain import COMPOSITION_ERRORS, explain
from qat.config.instantiate import HYDRA_1_4, VERSION, allowed_patterns
from qat.config.overrides import going_on, key_of, value_of
from qat.errors import UserError, refused, unmakeable
from qat.policies.renamed import renamed_override
from qat.process import environment
from qat.run_files import HYDRA, OVERRIDES, PROGRESS

# What Lightning says of every trainer: advertisements, hardware that is not used, and what the progress bar shows.
SMALL_TALK = (
    "💡 Tip", "GPU available", "TPU available", "Loading `train_dataloader`", "`Trainer.fit` stopped: `max_epochs",
    "`Trainer(limit_test_batches=1)`", "`Trainer(limit_val_batches=1)`",
)  # fmt: skip
# Hydra 1.4 wants to know whose code a config may call.
TRUST: dict[str, Any] = {"execution_whitelist": allowed_patterns()} if HYDRA_1_4 else {}


class _Task:
    """The function that Hydra calls for each job. It keeps a single run's `UserError`, which Hydra would announce in
    its own way.
    """

    def __init__(self, argv: list[str]) -> None:
        self.argv = argv
        self.started = False
        self.error: UserError | None = None

    def __call__(self, cfg: DictConfig) -> Any:
        sys.argv = self.argv  # Lightning starts the other ranks with it
        job = HydraConfig.get()
        run_dir = Path(job.runtime.output_dir)
        try:
            _prepare(cfg, run_dir)
            self.started = True
            from qat.lightning.runs.run import run

            return run(cfg, run_dir)
        except (UserError, OSError) as error:
            mistake = refused(error) if isinstance(error, OSError) else error
            if mistake is None:
                raise
            discard(run_dir)
            self.error = mistake
            if hint := _corrected(run_dir):
                print(hint, file=sys.stderr)
        except Exception as error:  # of the user's own code, perhaps
            if hint := _corrected(run_dir):
                error.add_note(hint)
            raise
        except (KeyboardInterrupt, SystemExit) as stop:
            if interrupted(stop) and (run_dir / PROGRESS).is_file():
                print(f"qat: it goes on with: {going_on(run_dir)}", file=sys.stderr)
            raise


def _corrected(run_dir: Path) -> str | None:
    """How a run goes on that a mistake has stopped, if this command began it."""
    if run_dir.absolute() not in NoteNewDirs.made or not (run_dir / PROGRESS).is_file():
        return None
    return f"qat: corrected, it goes on with: {going_on(run_dir)} ..."


def main(argv: list[str]) -> int:
    """Runs the command; every mistake in `argv` or in the config is a `UserError`, and leaves nothing written."""
    task = _Task(sys.argv)
    args = parse(argv)
    if args.shell_completion and args.overrides != ["query=bash"]:
        print(completion(args.overrides))
        return 0
    options = argv.copy()
    for text in args.overrides:
        options.remove(text)
    before = _run_before(args.overrides)
    if before is not None and args.config_dir is None and (config_dir := _config_dir(before)) is not None:
        args.config_dir = config_dir
        options += ["--config-dir", config_dir]
    args.overrides = group_overrides(args.overrides, args.config_dir)
    for text in args.overrides:
        if key_of(text) == "run_dir" and value_of(text) in (None, ""):
            raise UserError(f"{text}: a run writes into a folder; leave this out for one named after the time")
    if _sweeping(args):
        from qat.cli.sweep import main as sweep

        return sweep(args)
    overrides = args.overrides if before is None else _resumed(args.overrides, before)
    try:
        with _hydra_environment([*options, *overrides]):
            hydra.main(config_path=str(configs_dir()), config_name="train", **VERSION, **TRUST)(task)()
        if task.error is not None:
            raise task.error
    except COMPOSITION_ERRORS as error:  # some are OSErrors, too
        if task.started:
            raise
        discard_all()
        raise explain(error, overrides, args.config_dir) from error
    except (UserError, OSError) as error:
        discard_all()
        if isinstance(error, FileNotFoundError) and not task.started:  # all that Hydra makes by then
            raise unmakeable(error, "run_dir") from error
        raise
    except ValueError as error:
        if task.started or not isinstance(error.__cause__, OSError):
            raise
        discard_all()
        raise error.__cause__ from error  # of a log file that cannot be opened
    return 0


def quieten(logger: str) -> None:
    """Keeps small talk out of a logger's handlers ("" is the root, where Hydra's are)."""
    for handler in logging.getLogger(logger).handlers:
        handler.addFilter(lambda record: not record.getMessage().startswith(SMALL_TALK))


def _sweeping(args: argparse.Namespace) -> bool:
    """Whether the command line asks for a sweep, and not only to be shown something."""
    shows = args.help or args.hydra_help or args.cfg or args.info or args.shell_completion
    chosen = any(text.startswith(("sweep=", "sweep/")) and text != "sweep=[]" for text in args.overrides)
    many = args.multirun or "hydra.mode=MULTIRUN" in args.overrides
    if many and (args.cfg or args.info):
        raise UserError(f"-m runs, and {'--cfg' if args.cfg else '--info'} shows: leave one of them out")
    return not shows and (many or chosen)


def _run_before(overrides: list[str]) -> Path | None:
    """The folder of a run that these overrides go on with: `ckpt=last run_dir=DIR`."""
    given = {key_of(text): value_of(text) for text in overrides}
    folder = Path(str(given.get("run_dir", "")))
    return folder if given.get("ckpt") == "last" and "run_dir" in given and (folder / OVERRIDES).is_file() else None


def _config_dir(run: Path) -> str | None:
    """The `--config-dir` that a run was started with."""
    sources = OmegaConf.select(OmegaConf.load(run / HYDRA), "hydra.runtime.config_sources") or []
    return next((source.path for source in sources if source.provider == "command-line"), None)


def _resumed(overrides: list[str], run: Path) -> list[str]:
    """The overrides that a run began with, and then those given now."""
    given = [key_of(text) for text in overrides]
    hydras = OmegaConf.select(OmegaConf.load(run / HYDRA), "hydra.overrides.hydra") or []
    began = map(renamed_override, OmegaConf.load(run / OVERRIDES))
    before = [*began, *(text for text in hydras if key_of(text) == "hydra.searchpath")]
    return [*(text for text in before if key_of(text) not in given), *overrides]


def _prepare(cfg: DictConfig, run_dir: Path) -> None:
    """Checks what only the whole config shows, and readies the log handlers that Hydra has just made."""
    quieten("")
    finalize_config(cfg, run_dir)
    if cfg.get("sweep"):
        raise UserError("this config has a sweep, and the command is for one run: add -m to run the sweep, or ~sweep")
    if cfg.get("search"):
        raise UserError("this config has a search, which training does not look at: qat search ..., or ~search")


@contextmanager
def _hydra_environment(argv: list[str]) -> Iterator[None]:
    """Shows Hydra its own arguments, and lets its exceptions reach us instead of being printed."""
    before = sys.argv
    sys.argv = [sys.argv[0], *argv]
    try:
        with environment("HYDRA_FULL_ERROR", "1"):
            yield
    finally:
        sys.argv = before


def parse(argv: list[str]) -> argparse.Namespace:
    """Hydra's parser, run before Hydra does: a wrong option is one line, and options may stand among overrides."""
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        raise complaint(parser, message) or UserError(message)

    parser.error = refuse
    return parser.parse_intermixed_args(argv)
