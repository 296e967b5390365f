"""Decode throughput with experts in process against transformers' own experts implementations.

`python -m benchmarks decode_in_process` decodes batches of random prompts with one and the same engine around
transformers' model, its experts computed by `eager`, `batched_mm`, `grouped_mm` or by moeless, in turns: once with
moeless's continuous batching (prefill included) and once with a bare greedy loop over a static cache.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks._decoding import Batched, Prompts, Way, compare, decode_statically, in_turns
from benchmarks._models import IMPLEMENTATIONS, random_model, random_prompts
from moeless.packages.tensor_files import dtype_of_name

PROMPT_LENGTH = 16
LOOPS = ("continuous", "static")


def main(argv: list[str] | None = None) -> None:
    """Print a table for each shape, dtype and loop; with --json, write the figures too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=("mixtral", "olmoe"), default=["mixtral", "olmoe"])
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32"])
    parser.add_argument("--loops", nargs="+", choices=LOOPS, default=list(LOOPS))
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=48, help="new tokens of each sequence")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where to keep the random models; a temporary folder by default")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="few tokens and repeats")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.tokens, arguments.repeats = 8, 3
    torch.set_num_threads(arguments.threads)
    figures: dict[str, dict[int, dict[str, list[float]]]] = {}
    for shape in arguments.shapes:
        for dtype in arguments.dtypes:
            for loop in arguments.loops:
                title = f"{shape}, {dtype}, {loop}, {arguments.threads} thread(s)"
                with ways_of(
                    shape, dtype, loop, arguments.implementations, threads=arguments.threads, folder=arguments.folder
                ) as (ways, vocab_size):
                    figures[title] = {
                        batch: in_turns(
                            ways,
                            random_prompts(batch, PROMPT_LENGTH, vocab_size),
                            arguments.tokens,
                            arguments.repeats,
                        )
                        for batch in arguments.batches
                    }
                compare(title, figures[title])
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2))


@contextmanager
def ways_of(
    shape: str, dtype_name: str, loop: str, implementations: list[str], *, threads: int, folder: Path | None
) -> Iterator[tuple[dict[str, Way], int]]:
    """Every candidate around the same engine, and the size of the vocabulary."""
    dtype = dtype_of_name(dtype_name)
    with ExitStack() as stack:
        model = stack.enter_context(random_model(shape, folder))
        theirs, ours = model.by_transformers(dtype), model.by_moeless(dtype)
        ways: dict[str, Way] = {}
        if loop == "static":
            ways["moeless"] = partial(decode_statically, ours)
            for name in implementations:
                ways[name] = partial(_decode_with, theirs, name)
        else:
            engines = {"moeless": Batched(ours, threads=threads)}
            for name in implementations:
                engines[name] = Batched(
                    theirs, threads=threads, before=partial(theirs.set_experts_implementation, name)
                )
            for engine in engines.values():
                stack.callback(engine.close)
            ways.update(engines)
        yield ways, ours.config.vocab_size


def _decode_with(model: Any, implementation: str, prompts: Prompts, num_tokens: int) -> float:
    model.set_experts_implementation(implementation)
    return decode_statically(model, prompts, num_tokens)


if __name__ == "__main__":
    main()
