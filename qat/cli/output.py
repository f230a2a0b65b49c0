"""Cleaning up after a run that never began: nothing of it is left behind.

Hydra makes the run directory, a log file and `.hydra/` before our code sees the config. If a mistake is found there,
they say nothing that the error message did not say. `NoteNewDirs` runs before Hydra's mkdir, so that only what this
process made is ever removed; and what Hydra writes over in a folder that was there, such as a run's config, comes back.
"""

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException


class NoteNewDirs(Callback):
    """A Hydra callback (`hydra.callbacks`) that notes which directories did not exist before the run."""

    made: ClassVar[list[Path]] = []  # every directory that was missing, run or sweep first
    before: ClassVar[dict[Path, bytes]] = {}  # Hydra's files that were there

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        self._note(config.hydra.run)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        self._note(config.hydra.sweep)

    def _note(self, where: DictConfig) -> None:
        self.made.clear()
        self.before.clear()
        # An interpolation without a target, a name that is too long: Hydra is about to say so itself.
        with suppress(OmegaConfBaseException, OSError):
            directory = Path(where.dir).absolute()
            self.made.extend(path for path in (directory, *directory.parents) if not path.exists())
            self.before.update({path: path.read_bytes() for path in (directory / ".hydra").glob("*.yaml")})


def discard(directory: Path) -> None:
    """Removes a directory if this process made it and only Hydra wrote to it, and then its empty new parents; gives one
    that was there Hydra's files back."""
    directory = directory.absolute()
    for path, content in NoteNewDirs.before.items():
        if path.parent.parent == directory:
            path.write_bytes(content)
    made = set(NoteNewDirs.made)
    if not made.intersection([directory, *directory.parents]) or not directory.is_dir():
        return
    if any(not _is_hydras(path) for path in directory.iterdir()):
        return
    shutil.rmtree(directory)
    for parent in directory.parents:
        if parent not in made or any(parent.iterdir()):
            return
        parent.rmdir()


def discard_all() -> None:
    """`discard` for everything that this process made, the deepest first."""
    for directory in sorted(NoteNewDirs.made, key=lambda path: len(path.parts), reverse=True):
        discard(directory)


def _is_hydras(path: Path) -> bool:
    return path.name in (".hydra", "multirun.yaml") or (path.suffix == ".log" and path.is_file())
