"""The secrets of a run: what its processes prove to each other, and the keys of its clients.

They never stand in a deployment's arguments, which Serve shows in its config and status: every process reads them for
itself, from a file that only its owner can read, or from the environment.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from moeless.core.errors import ConfigError

RUN_SECRET_VARIABLE = "MOELESS_RUN_SECRET"  # noqa: S105  # a name
API_KEYS_VARIABLE = "MOELESS_API_KEY"
_MAX_FILE_BYTES = 1 << 20


class _SecretsFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A misspelt `api_keys` is refused: a server without keys is open to all."""

    run_secret: str
    api_keys: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSecrets:
    """Raises ConfigError for a secret that cannot be used; the message does not show it."""

    run_secret: str = field(repr=False)
    """Both ends of the data plane and of the token channel must prove it."""
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    """Keys that clients may send; empty asks for none."""

    def __post_init__(self) -> None:
        if not self.run_secret:
            raise ConfigError("the run secret must not be empty")
        for key in self.api_keys:
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                raise ConfigError("api-key must be printable ASCII without spaces and not empty")

    def write(self, path: Path) -> None:
        """Make the file, which must not exist, readable by its owner alone."""
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(msgspec.json.encode(_SecretsFile(run_secret=self.run_secret, api_keys=self.api_keys)))
        except BaseException:
            path.unlink()
            raise

    def to_environment(self) -> dict[str, str]:
        """Variables that `read_secrets` finds them in."""
        return {RUN_SECRET_VARIABLE: self.run_secret, API_KEYS_VARIABLE: " ".join(self.api_keys)}


def read_secrets(file: str | None, environment: Mapping[str, str] = os.environ) -> RunSecrets:
    """The secrets of this process's run.

    Args:
        file: JSON with run_secret and, if there are any, api_keys; None reads MOELESS_RUN_SECRET and MOELESS_API_KEY
            (keys apart by spaces) from `environment`.
    Raises: ConfigError if they are not there, or if others than its owner can read the file.
    """
    if file is None:
        run_secret = environment.get(RUN_SECRET_VARIABLE)
        if not run_secret:
            raise ConfigError(f"{RUN_SECRET_VARIABLE} must be set on every node, or secrets_file name a file")
        return RunSecrets(run_secret=run_secret, api_keys=tuple(environment.get(API_KEYS_VARIABLE, "").split()))
    try:
        with Path(file).open("rb") as opened:
            mode = stat.S_IMODE(os.fstat(opened.fileno()).st_mode)
            if mode & 0o077:
                raise ConfigError(f"secrets file {file} must have mode 0600 (chmod 600), has {mode:04o}")
            content = msgspec.json.decode(opened.read(_MAX_FILE_BYTES), type=_SecretsFile)
    except OSError as error:
        raise ConfigError(f"secrets file {file} must be readable on every node: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise ConfigError(f"secrets file {file} must be JSON with run_secret and api_keys: {error}") from error
    return RunSecrets(run_secret=content.run_secret, api_keys=content.api_keys)
