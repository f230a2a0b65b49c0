"""What a run remembers: `progress.json` keeps what its stages measured, so that a run that was killed resumes where it
stopped (`ckpt=last`).
"""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from pytorch_lightning.loggers import CSVLogger

from qat.config.overrides import going_on
from qat.errors import UserError
from qat.files import read_object, write_object
from qat.lightning.resume import continue_csv
from qat.lightning.runs.resume_settings import check_settled, settled
from qat.lightning.weights import read_checkpoint
from qat.run_files import FLOAT_CHECKPOINT, PROGRESS


class Progress:
    """The memory of one run: as its folder has it if the run resumes, else that of a run which has done nothing yet.

    Args:
        cfg: The composed and resolved config.
        folder: The run's folder.
        main: Whether this process is the one that writes.

    Attributes:
        resuming: Whether an earlier command began the run.
        start: The checkpoint that it started from in place of float training, if any.
        settings: Those that a resumed run has to keep.
        stages: What each stage that is complete has measured.
        seconds: How long each took.
        trained: Once training has ended: the `limits` it was to reach, and its `best` checkpoint, as seen from the
            folder.
        packed_bytes: Size of the packed integers, once there are any.

    Raises:
        UserError: if there is no run to resume, or one with other settings, or if another one is in the folder.
    """

    def __init__(self, cfg: DictConfig, folder: Path, main: bool) -> None:
        self.resuming: bool = cfg.ckpt == "last"
        self._file, self._main = folder / PROGRESS, main
        if self.resuming:
            content = self._recalled(cfg)
        else:
            self._check_unused()
            content = {"start": cfg.ckpt, "settings": settled(cfg), "stages": {}, "seconds": {}}
        self.start: str | None = content["start"]
        self.settings: dict[str, Any] = content.get("settings", {})  # older versions noted none
        self.stages: dict[str, dict[str, Any]] = content["stages"]
        self.seconds: dict[str, float] = content["seconds"]
        self.trained: dict[str, Any] | None = content.get("trained")
        self.packed_bytes: int | None = content.get("packed_bytes")

    def _recalled(self, cfg: DictConfig) -> dict[str, Any]:
        folder = self._file.parent
        if not self._file.is_file():
            raise UserError(f"ckpt=last: there is no run to resume in {folder}; name its folder with run_dir=...")
        content = read_object(self._file, "start", "stages", "seconds")
        check_settled(settled(cfg), content.get("settings", {}), folder)
        return content

    def _check_unused(self) -> None:
        """Raises if an earlier command trained or measured something here, and did not end before it could."""
        if not self._main or not self._file.is_file():  # the first process may have begun before the others
            return
        folder = self._file.parent
        if read_object(self._file, "stages")["stages"] or (folder / FLOAT_CHECKPOINT).is_file():
            raise UserError(
                f"{folder} holds a run: {going_on(folder)} goes on with it; give another a folder of "
                "its own with run_dir=..."
            )

    def to_dict(self) -> dict[str, Any]:
        """What is written, and reported."""
        late = {"trained": self.trained, "packed_bytes": self.packed_bytes}
        return {
            "start": self.start, "settings": self.settings, "stages": self.stages, "seconds": self.seconds,
            **{key: value for key, value in late.items() if value is not None},
        }  # fmt: skip

    def save(self) -> None:
        if self._main:
            write_object(self._file, self.to_dict())

    def complete(self, stage: str, values: dict[str, Any], seconds: float) -> None:
        """Remembers a stage and what it measured, beside what it had measured before; without values, only its time."""
        if values:
            self.stages.setdefault(stage, {}).update(values)
        self.seconds[stage] = round(seconds, 2)
        self.save()

    def resume_from(self, last: Path, *loggers: Any) -> str | None:
        """The checkpoint to go on from, if this run was interrupted after it was written."""
        if not self.resuming or not last.is_file():
            return None
        step = read_checkpoint(last)["global_step"]
        for logger in loggers:
            if self._main and isinstance(logger, CSVLogger):
                continue_csv(logger, step)
        return str(last)
