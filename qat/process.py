"""What a process has around it: packages that may be missing, its environment, and where the words of others go."""

import io
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from typing import Any

from qat.errors import UserError


def imported(name: str, otherwise: str) -> Any:
    """A module of an optional dependency.

    Raises:
        UserError: with the message `otherwise`, if it is not installed.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError:
        raise UserError(otherwise) from None


@contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """Sets one variable of the environment meanwhile."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def silent(level: int = logging.WARNING) -> Iterator[None]:
    """Keeps back what packages say of their progress, of deprecations and of libraries that they can do without: what
    is wrong comes as an exception.

    `sys.stderr` stays: a package that is imported meanwhile may hand it to log handlers, which would keep another one.

    Args:
        level: Log records are kept back up to this level.
    """
    disabled = logging.root.manager.disable
    logging.disable(level)
    try:
        with warnings.catch_warnings(action="ignore"), redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)
