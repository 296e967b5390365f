"""How well load predictors do on recorded routing: recall, load error, stragglers and coverage by distance.

`python -m benchmarks.predictors FILE [FILE ...]` imports routing files as `moeless trace import` does (several of one
model are taken together), divides them by sequence, fits every kind and measures it on what it did not learn from.
Without files it measures made-up routing, which tells only that it runs.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from moeless.cli.predict_eval import evaluation_table
from moeless_predictors.evaluation import EvaluationConfig, evaluate
from moeless_predictors.fitting import FitConfig
from moeless_predictors.traces import ImportOptions, RoutingTrace, concat, import_trace
from moeless_predictors.traces.synthetic import synthetic_trace


def main(argv: list[str] | None = None) -> None:
    """Print a table; with --json, write the figures of every layer too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="routing of one model")
    parser.add_argument("--distances", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--kinds", nargs="+", default=["popularity", "transition", "history"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="one distance")
    arguments = parser.parse_args(argv)
    distances = (1,) if arguments.quick else tuple(arguments.distances)
    config = EvaluationConfig(fit=FitConfig(kinds=tuple(arguments.kinds), distances=distances))
    with Progress(transient=True) as bar:
        task = bar.add_task("measuring")
        evaluation = evaluate(
            _trace(arguments.files),
            config,
            on_progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    print(
        f"{evaluation.model}: {evaluation.num_train_tokens:,} tokens learned from, {evaluation.num_test_tokens:,} in "
        f"{evaluation.num_test_sequences} sequences tested"
    )
    Console(width=120).print(evaluation_table(evaluation))
    if arguments.json:
        arguments.json.write_text(json.dumps(asdict(evaluation), indent=2))


def _trace(files: list[Path]) -> RoutingTrace:
    if not files:
        return synthetic_trace(num_sequences=60, tokens_per_sequence=50)
    traces = []
    for file in files:
        # One name, so that files of one model can be put together.
        trace = import_trace(file, ImportOptions(model=files[0].stem)).trace
        if not isinstance(trace, RoutingTrace):
            raise SystemExit(f"{file}: must hold routing, got arrivals")
        traces.append(trace)
    return concat(traces) if len(traces) > 1 else traces[0]


if __name__ == "__main__":
    main()
