"""`moeless policy schema`: the JSON schema of scaling policies. docs/policy.md."""

from __future__ import annotations

import json

import typer

from moeless.core.policy import policy_schema


def schema_command() -> None:
    """Print the JSON schema of a policy."""
    typer.echo(json.dumps(policy_schema(), indent=2, ensure_ascii=False))
