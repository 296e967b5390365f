"""Joins the commands into `moeless`. Prints a deliberate error as one line and exits with its code."""

from __future__ import annotations

import sys

import typer

from moeless import __version__
from moeless.cli._console import say_aside
from moeless.cli._renamed import ScenarioCommand
from moeless.cli.experts import experts_command
from moeless.cli.pack import pack_command
from moeless.cli.plan import plan_command
from moeless.cli.policy_check import check_command
from moeless.cli.policy_schema import schema_command
from moeless.cli.predict_eval import evaluate_command
from moeless.cli.predict_fit import fit_command
from moeless.cli.predict_info import info_command as predictors_info_command
from moeless.cli.serve import serve_command
from moeless.cli.simulate import simulate_command
from moeless.cli.trace_import import import_command
from moeless.cli.trace_info import info_command as trace_info_command
from moeless.cli.trace_record import record_command
from moeless.core.errors import MoelessError

policy_app = typer.Typer(no_args_is_help=True, help="Scaling policies: check one, print their schema.")
policy_app.command("check")(check_command)
policy_app.command("schema")(schema_command)

predict_app = typer.Typer(no_args_is_help=True, help="Predictors of expert load: measure, fit, look inside.")
predict_app.command("eval")(evaluate_command)
predict_app.command("fit")(fit_command)
predict_app.command("info")(predictors_info_command)

trace_app = typer.Typer(no_args_is_help=True, help="Routing and arrival traces: import, record, look inside.")
trace_app.command("record")(record_command)
trace_app.command("import")(import_command)
trace_app.command("info")(trace_info_command)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Serve Mixture-of-Experts language models with serverless experts.",
)
app.command("serve")(serve_command)
app.command("experts")(experts_command)
app.command("pack")(pack_command)
app.add_typer(trace_app, name="trace")
app.add_typer(predict_app, name="predict")
app.add_typer(policy_app, name="policy")
app.command("simulate", cls=ScenarioCommand)(simulate_command)
app.command("plan", cls=ScenarioCommand)(plan_command)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def main() -> None:
    """Entry point."""
    try:
        app()
    except MoelessError as error:
        say_aside(f"moeless: {' '.join(str(error).split())}")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        say_aside("moeless: interrupted")
        sys.exit(130)
