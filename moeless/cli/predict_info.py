"""`moeless predict info`: which predictors a file holds, and why. docs/predictors.md."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moeless.cli._console import one_line_errors
from moeless.cli._extras import require_extra
from moeless.cli._options import input_file
from moeless.cli._predictors import show_choices


def info_command(
    predictors: Annotated[Path, typer.Argument(callback=input_file, help="File that `moeless predict fit` wrote.")],
) -> None:
    """Print which predictor was chosen for each layer and distance, and why."""
    require_extra("plan", "moeless predict info")
    from moeless_predictors.predictor_set import PredictorSet

    with one_line_errors():
        show_choices(PredictorSet.load(predictors))
