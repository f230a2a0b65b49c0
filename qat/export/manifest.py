"""The manifest beside an exported file: `model.onnx.json` says which files belong to it and what their hashes are.

A runtime that is given a damaged file may crash, or compute something else without a word; so every file is held
against its manifest before a runtime sees it. The manifest carries a checksum of itself. That guards against damage and
mix-ups, not against a forger, who can compute hashes, too.
"""

import hashlib
import json
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qat import __version__
from qat.errors import UserError
from qat.files import read_object, sha256

FORMAT = 1


def digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of all of a manifest but its own checksum."""
    rest = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def write_manifest(path: Path, target: str, files: Sequence[Path], names: Mapping[str, str]) -> Path:
    """Writes the manifest of `files`.

    Args:
        path: The manifest to write.
        target: Name of the class that made them, without its module, which may move.
        files: The files, and folders of files, as they are.
        names: The name that each is going to have.
    """
    hashes = {name: sha256(file) for made in files for file, name in _inside(made, names[made.name])}
    manifest: dict[str, Any] = {"format": FORMAT, "qat": __version__, "target": target, "sha256": hashes}
    path.write_text(json.dumps(manifest | {"manifest_sha256": digest(manifest)}, indent=1))
    return path


def _inside(made: Path, called: str) -> list[tuple[Path, str]]:
    """The files in a folder with their names below it; a file itself."""
    if not made.is_dir():
        return [(made, called)]
    return [
        (file, f"{called}/{file.relative_to(made).as_posix()}") for file in sorted(made.rglob("*")) if file.is_file()
    ]


def valid_manifest(path: Path, version: int) -> dict[str, Any]:
    """A manifest whose format and checksum are right.

    Raises:
        UserError: if it is missing, damaged, or of another format than `version`.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; it holds the hashes, and is copied along with what it describes")
    manifest = read_object(path, "format")
    if (found := manifest["format"]) != version:
        maker = manifest.get("qat")
        by = f" (made by qat {maker})" if isinstance(maker, str) else ""
        raise UserError(f"{path}: has format {str(found)[:20]}{by}; this version reads format {version}")
    if manifest.get("manifest_sha256") != digest(manifest):
        raise UserError(f"{path}: is damaged: its content does not have the checksum that it states")
    return manifest


def check_manifest(path: Path, target: str) -> dict[str, Any]:
    """Holds a file and its companions against the manifest beside it.

    Raises:
        UserError: if one of them is missing, damaged, swapped, or of another version or target.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file")
    beside = path.with_name(f"{path.name}.json")
    manifest = valid_manifest(beside, FORMAT)
    if manifest["target"] != target:
        raise UserError(f"{beside}: is of a file that {manifest['target']} made, not {target}")
    present = [name for _, name in _inside(path, path.name)]
    if unknown := next((name for name in present if name not in manifest["sha256"]), None):
        raise UserError(f"{beside}: describes {', '.join(manifest['sha256'])}, not {unknown}")
    for name, expected in manifest["sha256"].items():
        file = path.parent / name
        if not file.is_file():
            raise UserError(f"{file}: no such file; {beside.name} says that it belongs to {path.name}")
        if sha256(file) != expected:
            raise UserError(f"{file}: does not match {beside.name}: damaged, or of another model")
    return manifest


def stated(manifest: Path) -> dict[str, Any]:
    """Content of a manifest, unchecked; empty if there is none, or a damaged one."""
    try:
        return read_object(manifest)
    except (OSError, UserError):
        return {}


def made_by(path: Path) -> str | None:
    """Name of the class that made a file, as the manifest beside it says; `None` if there is none, or a damaged one."""
    target = stated(path.with_name(f"{path.name}.json")).get("target")
    return target if isinstance(target, str) else None


def check_unclaimed(files: Iterable[Path], listed: Container[str], target: str) -> None:
    """Refuses to write over a file, or over one in a folder, that an earlier export did not write.

    Args:
        files: The files that are about to be written.
        listed: The names that a manifest of the same target gives.
        target: The class that is about to write.

    Raises:
        UserError: naming the first that is there and not listed.
    """
    for path in files:
        for file, name in _inside(path, path.name):
            if file.exists() and name not in listed:
                raise UserError(
                    f"{file}: is there already, and no manifest says that {target} wrote it; choose another name, or "
                    "delete it first"
                )


def companions(path: Path) -> list[Path]:
    """An exported file, the files that belong to it, and their manifest (none of them need exist); of a folder, the
    files in it.

    Raises:
        UserError: if the manifest is damaged.
    """
    beside = path.with_name(f"{path.name}.json")
    names = read_object(beside, "sha256")["sha256"] if beside.is_file() else []
    files = dict.fromkeys([path, *(path.parent / name for name in names)])
    return [*(file for file in files if not file.is_dir()), beside]


def files_bytes(path: Path) -> int:
    """Size of an exported file and what belongs to it, without the manifest."""
    return sum(each.stat().st_size for each in companions(path)[:-1])
