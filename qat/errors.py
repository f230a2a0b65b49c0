"""The one exception for mistakes a user can fix, and the hint that goes with it.

Whoever raises `UserError` says what is wrong, where (config key, module path or file) and the nearest right thing.
The command line prints the message as it is, without a traceback, and exits with status 2.
"""

import difflib
import errno
from collections.abc import Iterable

# What a file system refuses, whoever asks; a file that is merely missing may be a bug.
_REFUSALS = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOSPC, errno.EDQUOT,
    errno.ENAMETOOLONG,
)  # fmt: skip

SHOWN = 8
"""How many names a hint lists where none is close."""


class UserError(ValueError):
    """Something the user wrote or passed is wrong; the message is complete without a traceback.

    Args:
        text: What is wrong, where, and the nearest right thing.
        by: The class that complains of its arguments, which the message then begins with. Whoever knows under which
            config key the object was built says that instead, in front of `text`.
    """

    def __init__(self, text: str, by: str | None = None) -> None:
        super().__init__(text if by is None else f"{by}: {text}")
        self.text = text


def require(key: str, value: object, ok: bool, expected: str) -> None:
    """Raises a UserError that names the setting unless `ok`."""
    if not ok:
        raise UserError(f"{key}={value!r}: expected {expected}")


def refused(error: OSError) -> UserError | None:
    """The message for what the file system did not allow, with the path; `None` for an error of another kind."""
    if error.errno not in _REFUSALS or error.filename is None:
        return None
    return UserError(f"{error.filename}: {error.strerror}")


def unmakeable(error: OSError, key: str | None = None) -> UserError:
    """The error for a folder that the file system would not make; `key` is the config key that names it, if any."""
    where = error.filename if key is None else f"{key}={error.filename}"
    return UserError(f"{where}: there is no such folder, and none can be made ({error.strerror})")


def first_line(error: BaseException) -> str:
    """What an error of somebody else's code says first, or its type's name where it says nothing."""
    return _lines(error)[0]


def last_line(error: BaseException) -> str:
    """What it says last, where the lines before it are places or a headline."""
    return _lines(error)[-1].strip()


def _lines(error: BaseException) -> list[str]:
    return str(error).strip().splitlines() or [type(error).__name__]


def nearest(name: str, options: Iterable[str]) -> str:
    """Returns a hint to append to an error: the closest of `options`, or else the first few of them.

    >>> nearest("layr1", ["layer1", "head"])
    "; did you mean 'layer1'?"
    """
    options = list(dict.fromkeys(options))
    close = difflib.get_close_matches(name, options, n=2, cutoff=0.6)
    if close:
        return "; did you mean " + " or ".join(f"'{c}'" for c in close) + "?"
    if not options:
        return "; there is nothing to choose from"
    rest = f", ... ({len(options)} in all)" if len(options) > SHOWN else ""
    return "; choose from " + ", ".join(options[:SHOWN]) + rest
