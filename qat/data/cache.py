"""Tensors that took long to make, kept in a file whose name is a fingerprint of what they were made from.

The fingerprint covers name, size and modification time of the source files and the options of the work, so a changed
source is another file and a stale one is never read. Files are written under a temporary name and then renamed: a
killed run leaves no half file, and two runs that start together write the same bytes twice.
"""

import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from qat.errors import UserError
from qat.files import atomic

Tensors = dict[str, Tensor]


def cached(folder: Path | None, sources: Sequence[Path], options: object, make: Callable[[], Tensors]) -> Tensors:
    """Returns `make()`, or what it returned for these sources and options before.

    Args:
        folder: where the tensors are kept, created if need be; None makes them anew every time.
        sources: the files they are made from.
        options: whatever else they depend on, as JSON.
        make: makes them.

    A folder that cannot be written costs a warning, not the run; a damaged file is made anew.
    """
    if folder is None or not sources:
        return make()
    path = folder / f"{fingerprint(sources, options)}.safetensors"
    try:
        return load_file(path)
    except (OSError, SafetensorError):
        tensors = make()
    try:
        with atomic(path) as temporary:
            save_file(tensors, temporary)
    except (OSError, UserError, SafetensorError) as error:
        warnings.warn(f"data.cache_dir={folder}: the decoded images could not be kept there ({error})", stacklevel=2)
    return tensors


def fingerprint(sources: Sequence[Path], options: object) -> str:
    """20 hexadecimal digits that change with name, size or modification time of a source, or with the options."""
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sources]
    return hashlib.sha256(json.dumps([stats, options]).encode()).hexdigest()[:20]
