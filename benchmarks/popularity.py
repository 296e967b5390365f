"""Compare half-lives of popularity when the subject changes: straggler hits and load error, frozen and online.

`python -m benchmarks.popularity FILE [FILE ...]` takes recorded routing of one model. Subjects are the files' labels,
or the files themselves where they have none. Popularity is fitted to the first part of the subjects and forecasts
batches of the others: once subject after subject, each batch of one subject alone, and once with the subjects mixed in
every batch. `--half` takes every second of the other subjects, so that a half-life chosen on half 0 can be confirmed on
half 1. Without files it measures synthetic routing, which shows only that it runs.

Shapes: T tokens, L MoE layers, E experts, B batches.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy as np
from rich.console import Console
from rich.table import Table

from moeless_predictors.arrays import FloatArray, IntArray
from moeless_predictors.base import one_hot
from moeless_predictors.metrics import relative_l1, straggler_hit_rate
from moeless_predictors.popularity import OnlinePopularity, PopularityPredictor
from moeless_predictors.traces import ImportOptions, RoutingTrace, concat, import_trace
from moeless_predictors.traces.synthetic import synthetic_trace

HALF_LIVES = (128, 256, 512, 1024, 4096)


def main(argv: list[str] | None = None) -> None:
    """Print a table of straggler hits and relative L1 errors by half-life."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="routing of one model")
    parser.add_argument("--batch", type=int, default=64, help="tokens in a batch")
    parser.add_argument("--fit-share", type=float, default=0.5, help="share of the subjects to fit to")
    parser.add_argument("--half", type=int, choices=(0, 1), help="every second of the other subjects")
    parser.add_argument("--reverse", action="store_true", help="fit to the last subjects instead of the first")
    parser.add_argument("--quick", action="store_true", help="every sixth layer")
    arguments = parser.parse_args(argv)
    trace = _trace(arguments.files)
    subjects = sorted(set(trace.labels or ()))
    subjects = [subjects[i] for i in np.random.default_rng(0).permutation(len(subjects))]
    subjects = subjects[::-1] if arguments.reverse else subjects
    num_fitted = max(1, round(arguments.fit_share * len(subjects)))
    fitted, others = subjects[:num_fitted], subjects[num_fitted:]
    others = others if arguments.half is None else others[arguments.half :: 2]
    layers = range(0, trace.num_layers, 6 if arguments.quick else 1)
    table = Table("batches", "frozen", *(str(half_life) for half_life in HALF_LIVES))
    for name, by_subject in (("subject after subject", True), ("mixed", False)):
        rows_Bn = _batches(trace, others, arguments.batch, by_subject=by_subject)
        if not len(rows_Bn):
            parser.error(f"batch must fit the subjects' tokens, got {arguments.batch}")
        measures = [_measured(trace, layer, _rows_of(trace, fitted), rows_Bn) for layer in layers]
        cells = [
            f"{fmean(hit for hit, _ in of_layers):.3f} {fmean(l1 for _, l1 in of_layers):.3f}"
            for of_layers in zip(*measures, strict=True)
        ]
        table.add_row(f"{name} ({len(rows_Bn)})", *cells)
    print(f"fitted to {len(fitted)} subjects, {len(others)} others; straggler in the top tenth, L1; means over layers")
    Console(width=120).print(table)


def _measured(trace: RoutingTrace, layer: int, fit_rows: IntArray, rows_Bn: IntArray) -> list[tuple[float, float]]:
    """Straggler hits and L1, frozen and for each half-life."""
    routing_TE = one_hot(np.asarray(trace.experts_TLk[:, layer]), trace.num_experts)
    load_BE: FloatArray = routing_TE[rows_Bn].sum(axis=1, dtype=np.float64)
    num_tokens_B = np.full(len(rows_Bn), rows_Bn.shape[1])
    X_n1 = np.zeros((len(fit_rows), 1))
    frozen = PopularityPredictor(half_life_tokens=None, top_k=trace.top_k).fit(X_n1, routing_TE[fit_rows])
    forecasts = [np.tile(OnlinePopularity(frozen).load(rows_Bn.shape[1]), (len(rows_Bn), 1))]
    for half_life in HALF_LIVES:
        online = OnlinePopularity(frozen, half_life_tokens=half_life)
        forecasts.append(online.loads(load_BE, num_tokens_B))
    return [(straggler_hit_rate(mean_BE, load_BE), relative_l1(mean_BE, load_BE)) for mean_BE in forecasts]


def _batches(trace: RoutingTrace, subjects: list[str], size: int, *, by_subject: bool) -> IntArray:
    """Rows of each batch, shape (B, size), drawn without replacement."""
    random = np.random.default_rng(0)
    groups = [[subject] for subject in subjects] if by_subject else [subjects]
    batches = []
    for group in groups:
        rows = random.permutation(_rows_of(trace, group))
        batches.append(rows[: len(rows) // size * size].reshape(-1, size))
    return np.concatenate(batches)


def _rows_of(trace: RoutingTrace, subjects: list[str]) -> IntArray:
    is_there_S = np.isin(np.array(trace.labels), subjects)
    return np.flatnonzero(is_there_S[trace.sequence_of_T])


def _trace(files: list[Path]) -> RoutingTrace:
    if not files:
        traces = [synthetic_trace(num_sequences=20, tokens_per_sequence=50, seed=seed) for seed in range(4)]
        return concat([replace(t, labels=(str(i),) * t.num_sequences) for i, t in enumerate(traces)])
    traces = []
    for file in files:
        trace = import_trace(file, ImportOptions(model=files[0].stem)).trace
        if not isinstance(trace, RoutingTrace):
            raise SystemExit(f"{file}: must hold routing, got arrivals")
        traces.append(trace if trace.labels is not None else replace(trace, labels=(file.stem,) * trace.num_sequences))
    return concat(traces) if len(traces) > 1 else traces[0]


if __name__ == "__main__":
    main()
