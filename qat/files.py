"""Writing whole files or none: to a temporary name in the same folder, then renamed. Also, locks.

What is read back may have been damaged since, by a full disk or an editor.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from qat.errors import UserError, unmakeable


def make_folder(folder: Path, key: str | None = None) -> None:
    """Makes a folder, and those above it.

    Args:
        folder: The folder; it may be there.
        key: The setting that names it, for messages.

    Raises:
        UserError: if none can be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unmakeable(error, key) from error


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path to write to; it takes the place of `path` if the block succeeds, and vanishes if it does
    not."""
    path = Path(path)
    make_folder(path.parent)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def claimed(lock: Path, taken: str) -> Iterator[None]:
    """Holds a lock file, which stays.

    Raises:
        UserError: with the message `taken`, if another process holds it.
    """
    held = FileLock(lock)
    try:
        held.acquire(timeout=0)
    except Timeout:
        raise UserError(taken) from None
    try:
        yield
    finally:
        held.release()


def replace(made: Path, path: Path) -> None:
    """Puts a new file or folder in the place of an old one; a folder that cannot be put there leaves the old one."""
    if not path.is_dir():
        os.replace(made, path)
        return
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as aside:
        old = Path(aside) / path.name
        os.replace(path, old)  # a folder can only be renamed to a name that is free
        try:
            os.replace(made, path)
        except OSError:
            os.replace(old, path)
            raise


def read_object(path: Path, *keys: str) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UserError: if it is damaged: no JSON, no object, or one without some of `keys`.
    """
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError):  # no UTF-8, no JSON
        raise UserError(f"{path}: is damaged: no JSON") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: is damaged: holds a {type(content).__name__}, no object")
    if missing := [key for key in keys if key not in content]:
        raise UserError(f"{path}: is damaged: lacks '{missing[0]}'")
    return content


def write_object(path: str | Path, content: Any) -> None:
    """Writes what JSON can say."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1))


def sha256(path: str | Path) -> str:
    """The file's SHA-256 as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
