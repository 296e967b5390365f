"""`moeless policy check`: whether a scaling policy is valid, and fits a model. docs/policy.md."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moeless.cli._console import one_line_errors, say, say_aside
from moeless.cli._options import from_to, input_file
from moeless.core.cluster import ModelShape
from moeless.core.errors import ConfigError
from moeless.core.policy import load_policy, resolve, unapplied_settings


def check_command(
    file: Annotated[Path, typer.Argument(callback=input_file, help="Policy to check: YAML or JSON.")],
    num_layers: Annotated[
        int | None, typer.Option(callback=from_to(1), help="MoE layers of a model: check that the rules fit it.")
    ] = None,
    num_experts: Annotated[int | None, typer.Option(callback=from_to(1), help="Experts of each of its layers.")] = None,
    expert_bytes: Annotated[
        int, typer.Option(callback=from_to(1), help="Bytes of one expert, for memory budgets.")
    ] = 1,
    model_id: Annotated[str, typer.Option(help="Name of the model, by which rules choose.")] = "",
) -> None:
    """Check a policy; with the size of a model, also whether its rules and budgets fit that."""
    if (num_layers is None) != (num_experts is None):
        raise ConfigError("--num-layers and --num-experts must be given together")
    with one_line_errors():
        policy = load_policy(file)
        if num_layers is not None and num_experts is not None:
            model = ModelShape(
                num_layers=num_layers, num_experts=num_experts, top_k=1, expert_bytes=expert_bytes, hidden_bytes=1
            )
            try:
                resolve(policy, model, model_id=model_id)
            except ConfigError as error:
                raise ConfigError(f"{file}: {error}") from error
    for notice in unapplied_settings(policy):
        say_aside(f"note: {notice}")
    num_rules = len(policy.rules)
    say(f"{file}: a valid policy, {num_rules} rule{'s' * (num_rules != 1)}")
