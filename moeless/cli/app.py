"""Joins the commands into `moeless`. Prints a deliberate error as one line and exits with its code."""

from __future__ import annotations

import sys
from typing import Annotated, Any, NoReturn

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

_INTERRUPTED = 130


def _group(help_text: str) -> typer.Typer:
    # Without rich's tables: they cut the names of options where the terminal is narrow.
    return typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        help=help_text,
    )


policy_app = _group("Scaling policies: check one, print their schema.")
policy_app.command("check")(check_command)
policy_app.command("schema")(schema_command)

predict_app = _group("Predictors of expert load: measure, fit, look inside.")
predict_app.command("eval")(evaluate_command)
predict_app.command("fit")(fit_command)
predict_app.command("info")(predictors_info_command)

trace_app = _group("Routing and arrival traces: import, record, look inside.")
trace_app.command("record")(record_command)
trace_app.command("import")(import_command)
trace_app.command("info")(trace_info_command)

app = _group("Serve Mixture-of-Experts language models with serverless experts, and plan what that takes.")
app.command("serve")(serve_command)
app.command("experts", short_help="Show the expert functions of a running server.")(experts_command)
app.command("pack", short_help="Split a checkpoint into expert functions.")(pack_command)
app.add_typer(trace_app, name="trace")
app.add_typer(predict_app, name="predict")
app.add_typer(policy_app, name="policy")
app.command("simulate", cls=ScenarioCommand, short_help="Compare systems in virtual time.")(simulate_command)
app.command("plan", cls=ScenarioCommand, short_help="Size a cluster for an SLO.")(plan_command)

_UsageError: Any = typer.BadParameter.__mro__[1]
"""Error that typer raises for a command line that it cannot read."""


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def main() -> None:
    """Entry point."""
    try:
        code = app(prog_name="moeless", standalone_mode=False)
    except MoelessError as error:
        _fail(str(error), error.exit_code)
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
            sys.exit(error.exit_code)
        command = f" (see {error.ctx.command_path} --help)" if error.ctx is not None else ""
        _fail(f"{error.format_message()}{_value_of(error)}{command}", error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", _INTERRUPTED)
    if code == _INTERRUPTED:  # as typer returns a KeyboardInterrupt
        _fail("interrupted", _INTERRUPTED)
    sys.exit(code if isinstance(code, int) else 0)


def _value_of(error: Any) -> str:
    """The value that typer refused for an option but does not repeat."""
    options = getattr(getattr(error, "param", None), "opts", [])
    for index, argument in enumerate(sys.argv):
        name, equals, value = argument.partition("=")
        if name in options and name.startswith("-") and (equals or index + 1 < len(sys.argv)):
            return f", got {value if equals else sys.argv[index + 1]!r}"
    return ""


def _fail(reason: str, code: int) -> NoReturn:
    say_aside(f"moeless: {' '.join(reason.split())}")
    sys.exit(code)
