"""Refuses options by their old names, in a line that names the new one."""

from __future__ import annotations

from typing import Any, ClassVar

from typer.core import TyperCommand

from moeless.core.errors import ConfigError


class RenamedOptions(TyperCommand):
    """A command that knows the names its options had before."""

    renamed: ClassVar[dict[str, str]] = {}
    """Old name to new name."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Raises ConfigError for an old name."""
        for arg in args:
            old = arg.partition("=")[0]
            if old in self.renamed:
                raise ConfigError(f"{old} must not be given: the option is now {self.renamed[old]}")
        return super().parse_args(ctx, args)


class ScenarioCommand(RenamedOptions):
    """`moeless simulate` and `moeless plan`."""

    renamed: ClassVar[dict[str, str]] = {
        "--policies": "--systems",
        "--load-gb-s": "--fetch-gb-s",
        "--eplb-redundant": "--eplb-spare-replicas",
    }
