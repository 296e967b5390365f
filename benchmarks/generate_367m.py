"""Tokens per second of a model of 367 million parameters against transformers' `generate`.

`python -m benchmarks generate_367m` generates after batches of random prompts with moeless's engine, experts in
process, and with `generate` and each of transformers' experts implementations, in turns, prefill included.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks._decoding import Batched, Prompts, Way, compare, generate, in_turns
from benchmarks._models import CONFIGS, IMPLEMENTATIONS, random_model, random_prompts
from moeless.packages.tensor_files import dtype_of_name

PROMPT_LENGTH = 32


def main(argv: list[str] | None = None) -> None:
    """Print a table for each dtype; with --json, write the figures too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(CONFIGS), default="367m")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS, default=["eager", "grouped_mm"])
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each sequence")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where to keep the random model; a temporary folder by default")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="few tokens and repeats, small batches")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.tokens, arguments.repeats, arguments.batches = 8, 2, [1, 8]
    torch.set_num_threads(arguments.threads)
    figures: dict[str, dict[int, dict[str, list[float]]]] = {}
    with random_model(arguments.shape, arguments.folder) as model:
        for dtype_name in arguments.dtypes:
            dtype = dtype_of_name(dtype_name)
            theirs = model.by_transformers(dtype)
            engine = Batched(model.by_moeless(dtype), threads=arguments.threads)
            ways: dict[str, Way] = {"moeless": engine}
            for name in arguments.implementations:
                ways[f"generate, {name}"] = partial(_generate_with, theirs, name)
            title = f"{arguments.shape}, {dtype_name}, {arguments.threads} thread(s)"
            figures[title] = {
                batch: in_turns(
                    ways,
                    random_prompts(batch, PROMPT_LENGTH, theirs.config.vocab_size),
                    arguments.tokens,
                    arguments.repeats,
                )
                for batch in arguments.batches
            }
            engine.close()
            compare(title, figures[title])
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2))


def _generate_with(model: Any, implementation: str, prompts: Prompts, num_tokens: int) -> float:
    model.set_experts_implementation(implementation)
    return generate(model, prompts, num_tokens)


if __name__ == "__main__":
    main()
