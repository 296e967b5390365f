"""Measure load predictors on recorded routing: recall, load error, stragglers, coverage and width of the bound.

`python -m benchmarks.predictors FILE [FILE ...]` imports routing files as `moeless trace import` does (several of one
model are taken together), divides them by sequence, fits every kind and measures it on the other sequences. With
`--split-by-label` whole subjects are held out: those of a file's labels, or one of several files without labels.
Without files it measures synthetic routing, which shows only that it runs.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
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
    parser.add_argument("--layers", type=int, nargs="+", help="source layers to measure; default: all")
    parser.add_argument("--kinds", nargs="+", default=["popularity", "transition", "history"])
    parser.add_argument("--split-by-label", action="store_true", help="hold out whole subjects")
    parser.add_argument("--test-share", type=float, default=0.2, help="share of the sequences or subjects to test on")
    parser.add_argument("--seed", type=int, default=0, help="seed of the division and of the batches")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="one distance")
    arguments = parser.parse_args(argv)
    config = EvaluationConfig(
        fit=FitConfig(kinds=tuple(arguments.kinds), distances=(1,) if arguments.quick else tuple(arguments.distances)),
        layers=None if arguments.layers is None else tuple(arguments.layers),
        split_by_label=arguments.split_by_label,
        test_share=arguments.test_share,
        seed=arguments.seed,
    )
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
    Console(width=140).print(evaluation_table(evaluation))
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
        if trace.labels is None:
            trace = replace(trace, labels=(file.stem,) * trace.num_sequences)
        traces.append(trace)
    return concat(traces) if len(traces) > 1 else traces[0]


if __name__ == "__main__":
    main()
