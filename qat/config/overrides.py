"""Overrides as Hydra's grammar has them: reading the value of one, and writing a text so that it is read as it is."""

import re
import shlex
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException


def key_of(override: str) -> str:
    """The key of `key=value`, `+key=value` or `~key`."""
    return override.lstrip("+~").partition("=")[0]


def group_of(override: str) -> str:
    """The top-level key or config group that an override is about: `quant` for `quant.weight.bits=4`, `quant/base=...`
    or `quant@teacher=...`.
    """
    return re.split("[./@]", key_of(override))[0]


def value_of(override: str) -> Any:
    """What Hydra reads behind the `=` of an override; the text as it is where it reads nothing."""
    try:
        return OverridesParser.create().parse_override(override).value()
    except HydraException:
        return override.partition("=")[2]


def quoted(text: str, quote: Quote = Quote.single) -> str:
    """A value that Hydra reads as this text, whatever characters are in it."""
    return QuotedString(text, quote).with_quotes()


def written(key: str, text: str) -> str:
    """The override that sets a key to a text, in quotes only if it needs them; a shell may need others around it."""
    plain = f"{key}={text}"
    if re.fullmatch(r"[\w./-]+", text, re.ASCII) and value_of(plain) == text:
        return plain
    return f"{key}={quoted(text, Quote.double)}"


def going_on(run_dir: Path) -> str:
    """The command that goes on with a run, as one types it into a shell."""
    return shlex.join(["qat", "train", "ckpt=last", written("run_dir", str(run_dir))])
