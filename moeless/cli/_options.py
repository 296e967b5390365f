"""Checks of options that several commands share, and errors that name each option as the user typed it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from moeless.core.errors import ConfigError


def input_file(param: typer.CallbackParam, value: Path | None) -> Path | None:
    """Option callback: a file to read. Raises ConfigError unless it is one that can be read."""
    if value is None:
        return None
    name = _name(param)
    if not value.exists():
        raise ConfigError(f"{name} must be a file that exists, got {value}")
    if value.is_dir():
        raise ConfigError(f"{name} must be a file, got the folder {value}")
    if not os.access(value, os.R_OK):
        raise ConfigError(f"{name} must be a file that you may read, got {value}")
    return value


def input_path(param: typer.CallbackParam, value: Path | None) -> Path | None:
    """Option callback: a file or folder to read. Raises ConfigError unless it is one that can be read."""
    return value if value is not None and value.is_dir() else input_file(param, value)


def output_file(param: typer.CallbackParam, value: Path | None) -> Path | None:
    """Option callback: a file to write. Raises ConfigError before the work unless it can be written after it."""
    if value is None:
        return None
    name = _name(param)
    if value.is_dir():
        raise ConfigError(f"{name} must be a file, got the folder {value}")
    if not value.parent.is_dir():
        raise ConfigError(f"{name} must be in a folder that exists, got {value}")
    if not os.access(value if value.exists() else value.parent, os.W_OK):
        raise ConfigError(f"{name} must be a file that you may write, got {value}")
    return value


def from_to(minimum: float, maximum: float | None = None) -> Callable[[typer.CallbackParam, Any], Any]:
    """Option callback: a number. Raises ConfigError unless it is from `minimum` to `maximum`."""

    def check(param: typer.CallbackParam, value: Any) -> Any:
        if value is not None and not (minimum <= value and (maximum is None or value <= maximum)):
            rule = f"at least {minimum:g}" if maximum is None else f"from {minimum:g} to {maximum:g}"
            raise ConfigError(f"{_name(param)} must be {rule}, got {value}")
        return value

    return check


def above_zero(param: typer.CallbackParam, value: float | None) -> float | None:
    """Option callback: an amount or a time. Raises ConfigError unless it is above 0 and finite."""
    if value is not None and not 0 < value < math.inf:
        raise ConfigError(f"{_name(param)} must be above 0 and finite, got {value}")
    return value


def not_empty(param: typer.CallbackParam, value: Any) -> Any:
    """Option callback: a name, or a list of them. Raises ConfigError if one is empty or blank."""
    if any(not name.strip() for name in (value if isinstance(value, list) else [value]) if name is not None):
        raise ConfigError(f"{_name(param)} must not be empty, got {value!r}")
    return value


@contextmanager
def options_for(fields: Mapping[str, str]) -> Iterator[None]:
    """Put the option in place of the field that a ConfigError begins with. `fields`: field to option."""
    try:
        yield
    except ConfigError as error:
        name, space, rest = str(error).partition(" ")
        stem, colon, _ = name.partition(":")
        if stem not in fields:
            raise
        raise ConfigError(f"{fields[stem]}{colon}{space}{rest}") from error


def _name(param: typer.CallbackParam) -> str:
    """`--json` for an option, `TRACE` for an argument."""
    first = param.opts[0]
    return first if first.startswith("-") else first.upper()
