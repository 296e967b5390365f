"""What is wrong with a user's files and options, as the error that the command line prints as one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from moeless.core.errors import ConfigError, MoelessError


@contextmanager
def told_in_one_line() -> Iterator[None]:
    """Turn the errors of reading, checking and drawing a user's files into ConfigError.

    A ValueError is one: that is what moeless_predictors, which knows nothing of moeless, raises for bad files and
    settings.
    """
    try:
        yield
    except MoelessError:
        raise
    except (ValueError, ModuleNotFoundError) as error:
        raise ConfigError(str(error)) from error
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}" if error.filename else str(error)) from error
