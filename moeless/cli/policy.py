"""`moeless policy`: check a scaling policy, and print the schema that policies follow. docs/policy.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from moeless.cli._console import told_in_one_line
from moeless.core.cluster import ModelShape
from moeless.core.errors import ConfigError
from moeless.core.policy import load_policy, policy_schema, resolve

policy_app = typer.Typer(no_args_is_help=True, help="Scaling policies: check one, print their schema.")
_stdout = Console()


@policy_app.command()
def check(
    file: Annotated[Path, typer.Argument(help="Policy to check: YAML or JSON.")],
    num_layers: Annotated[
        int | None, typer.Option(min=1, help="MoE layers of a model: check that the rules fit it.")
    ] = None,
    num_experts: Annotated[int | None, typer.Option(min=1, help="Experts of each of its layers.")] = None,
    expert_bytes: Annotated[int, typer.Option(min=1, help="Bytes of one expert, for memory budgets.")] = 1,
    model_id: Annotated[str, typer.Option(help="Name of the model, by which rules choose.")] = "",
) -> None:
    """Check a policy; with the size of a model, also whether its rules and budgets fit that."""
    if (num_layers is None) != (num_experts is None):
        raise ConfigError("--num-layers and --num-experts must be given together")
    with told_in_one_line():
        policy = load_policy(file)
        if num_layers is not None and num_experts is not None:
            model = ModelShape(
                num_layers=num_layers, num_experts=num_experts, top_k=1, expert_bytes=expert_bytes, hidden_bytes=1
            )
            try:
                resolve(policy, model, model_id=model_id)
            except ConfigError as error:
                raise ConfigError(f"{file}: {error}") from error
    num_rules = len(policy.rules)
    _stdout.print(
        f"{file}: a valid policy, {num_rules} rule{'s' * (num_rules != 1)}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


@policy_app.command()
def schema() -> None:
    """Print the JSON schema of a policy."""
    typer.echo(json.dumps(policy_schema(), indent=2, ensure_ascii=False))
