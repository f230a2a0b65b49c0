"""Float models that several runs share, under names made of what determines them.

Training in float is the same for all runs that differ only in how they quantize. The
name of an entry is a hash of the config parts that it follows from, so a run finds what another has made of the same
parts, and nothing else. An entry appears complete or not at all; while one run makes it, others that want it wait.
"""

import functools
import hashlib
import inspect
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from omegaconf import DictConfig, OmegaConf

from qat import __version__
from qat.config.instantiate import locate
from qat.files import atomic, read_object, sha256, write_object
from qat.run_files import FLOAT_ONNX, FLOAT_WEIGHTS

FILES = (FLOAT_WEIGHTS, FLOAT_ONNX, "float/metrics.csv")
VALUES = "values.json"
# Settings of the trainer that float training does not depend on.
INDIFFERENT = (
    "max_epochs", "default_root_dir", "enable_progress_bar", "enable_model_summary", "log_every_n_steps", "profiler",
)  # fmt: skip


def float_key(cfg: DictConfig) -> str:
    """A hash of what the float model follows from: model, data, training, seed, checkpoint, versions, and the source
    files of the classes (with their bases) and functions that `model`, `data` and `trainer` name.

    Not in it: what those files import from others, and what the data hold; after a change there, take another
    `cache_dir`.
    """
    parts = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(parts, dict)
    start = parts["ckpt"] if parts["ckpt"] != "last" else None
    relevant = {
        "model": {**parts["model"], **(parts["float_model"] or {})} if start is None else parts["model"],
        "data": parts["data"],
        "trainer": {k: v for k, v in parts["trainer"].items() if k not in INDIFFERENT},
        "epochs": parts["float_epochs"] if start is None else None,
        "ckpt": sha256(start) if start is not None else None,
        "float_ckpt": sha256(parts["float_ckpt"]) if parts["float_ckpt"] is not None else None,
        **{key: parts[key] for key in ("seed", "metric")},
        "versions": [__version__, torch.__version__],
    }
    relevant["code"] = {target: _sources(target, key) for target, key in _targets(relevant)}
    return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()[:16]


def _targets(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every `_target_` in plain containers, and where it stands."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, child in children:
        where = f"{key}.{name}".lstrip(".")
        if name == "_target_":
            yield child, where
        else:
            yield from _targets(child, where)


@functools.cache
def _sources(target: str, key: str) -> list[str]:
    """Hashes of the files that define a class and its bases, or a function, as this process found them first: a file
    that is edited later is not what runs.
    """
    named = locate(target, key)
    owner = getattr(named, "__self__", named)  # of a class method
    found: list[str] = []
    for each in inspect.getmro(owner) if inspect.isclass(owner) else [owner]:
        try:
            path = inspect.getsourcefile(each)
        except (TypeError, OSError):  # written in C, or typed at a prompt
            continue
        if path is not None:
            found.append(sha256(path))
    return found


class FloatCache:
    """The float model of a config in a folder that runs share; without a folder, nothing is shared.

    Args:
        cfg: The composed and resolved config.
        start: The checkpoint that the run started from, if any (`cfg.ckpt` of a resumed run says `last`).
        main: Whether this process is the one that writes. The others of a distributed run train along with it, so they
            neither wait for it nor write.
    """

    def __init__(self, cfg: DictConfig, start: str | None, main: bool) -> None:
        self.folder: Path | None = None
        if cfg.cache_dir is not None:
            key = float_key(OmegaConf.merge(cfg, {"ckpt": start}))  # pyright: ignore[reportArgumentType]
            self.folder = Path(cfg.cache_dir) / key
        self.main = main

    @property
    def weights(self) -> Path:
        """The file of the float weights."""
        assert self.folder is not None
        return self.folder / FLOAT_WEIGHTS

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One process at a time makes the entry; one that is there may be in a folder that nobody can write to."""
        if self.folder is None or not self.main or (self.folder / VALUES).is_file():
            yield
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / ".lock"):
            yield

    def load(self, run_folder: Path) -> dict[str, Any] | None:
        """Copies the entry into a run; returns what was measured of it, `None` if there is none."""
        if self.folder is None or not (self.folder / VALUES).is_file():
            return None
        if self.main:
            for name in FILES:
                _copy(self.folder / name, run_folder / name)
        return read_object(self.folder / VALUES, "metric")

    def save(self, run_folder: Path, values: dict[str, Any]) -> None:
        """Makes the entry from a run; what was measured is written last, and makes it one."""
        if self.folder is None or not self.main:
            return
        for name in FILES:
            _copy(run_folder / name, self.folder / name)
        write_object(self.folder / VALUES, values)


def _copy(source: Path, target: Path) -> None:
    if source.is_file():
        with atomic(target) as temporary:
            shutil.copyfile(source, temporary)
