"""argparse for the subcommands that have no config: what it complains of is one line, like every mistake."""

import argparse
from typing import NoReturn

from qat.errors import UserError, nearest


class Parser(argparse.ArgumentParser):
    """A parser that says what to write, its `usage`, instead of exiting."""

    def error(self, message: str) -> NoReturn:
        """Raises a `UserError`: the nearest option for an unknown one, else the usage."""
        raise complaint(self, message) or UserError(f"write {self.usage}")


def complaint(parser: argparse.ArgumentParser, message: str) -> UserError | None:
    """The error for an unknown option, from argparse's own words; `None` if they are about something else."""
    unknown = message.partition("unrecognized arguments: ")[2].split(" ")[0]
    if not unknown.startswith("-"):
        return None
    options = [text for action in parser._actions for text in action.option_strings]
    return UserError(f"unknown option '{unknown}'{nearest(unknown, options)}")
