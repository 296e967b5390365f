"""Tokens per second of the engine in process, against transformers' batching on the same model and experts.

`python -m benchmarks engine_overhead` decodes random prompts with a random Mixtral-shaped model (hidden 256, 16
experts, top-2) whose experts transformers computes in every way, so that what differs is the engine: batching,
attention over pages, sampling, detokenising and delivery. Each way has a process of its own, because a second thread
that has used OpenMP slows the first down; they run in turns and are idle in between.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

VOCAB_SIZE = 8192
THEIRS = ("manager sdpa", "manager eager")
WAYS = ("engine", "engine sampling", *THEIRS, "generate")


def main(argv: list[str] | None = None) -> None:
    """Print the table; with --json, write the figures too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 16, 32])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of each sequence")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="two batches, few tokens, few repeats")
    options = parser.parse_args(argv)
    if options.quick:
        options.batches, options.tokens, options.repeats = [1, 16], 32, 3
    result = measure(options)
    _print(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2))


def measure(options: argparse.Namespace) -> dict[int, dict[str, list[float]]]:
    """Batch size → way → tokens per second of each repeat."""
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    context = mp.get_context("spawn")
    lines: dict[str, Connection] = {}
    children = []
    try:
        for way in WAYS:
            ours, theirs = context.Pipe()
            child = context.Process(target=_serve_way, args=(theirs, way, options), daemon=True)
            child.start()
            theirs.close()
            lines[way] = ours
            children.append(child)
        result: dict[int, dict[str, list[float]]] = {}
        for batch in options.batches:
            rates: dict[str, list[float]] = {way: [] for way in WAYS}
            for repeat in range(options.repeats + 1):
                for way, line in lines.items():
                    line.send(batch)
                    rate = line.recv()
                    if repeat:  # the first one warms up
                        rates[way].append(rate)
            result[batch] = rates
        return result
    finally:
        for line in lines.values():
            line.close()
        for child in children:
            child.join(timeout=10)
            if child.is_alive():
                child.kill()


def _print(result: dict[int, dict[str, list[float]]]) -> None:
    table = Table(title="new tokens per second: median (least to most)")
    table.add_column("batch", justify="right")
    for way in WAYS:
        table.add_column(way, justify="right")
    table.add_column("engine / manager", justify="right")
    table.add_column("engine / generate", justify="right")
    for batch, rates in result.items():
        medians = {way: statistics.median(values) for way, values in rates.items()}
        cells = [f"{medians[way]:.0f} ({min(rates[way]):.0f} to {max(rates[way]):.0f})" for way in WAYS]
        best = max(medians[way] for way in THEIRS)
        table.add_row(
            str(batch), *cells, f"{medians['engine'] / best:.2f}", f"{medians['engine'] / medians['generate']:.2f}"
        )
    Console(width=170).print(table)


def _serve_way(line: Connection, way: str, options: argparse.Namespace) -> None:
    """In a child process: run one way for each batch size requested, until the pipe closes."""
    import torch

    torch.set_num_threads(options.threads)
    model = _model(options.layers)
    if way.startswith("engine"):
        opened = _open_engine(model, options, sampling=way == "engine sampling")
    elif way.startswith("manager"):
        opened = _open_manager(model, options, "sdpa" if way == "manager sdpa" else "paged|eager")
    else:
        opened = nullcontext(_generate(model, options))
    with opened as run:
        while True:
            try:
                batch = line.recv()
            except EOFError:
                return
            generator = torch.Generator().manual_seed(batch)
            prompts = torch.randint(0, VOCAB_SIZE, (batch, options.prompt), generator=generator).tolist()
            started_s = time.perf_counter()
            run(prompts)
            line.send(batch * options.tokens / (time.perf_counter() - started_s))


Run = Callable[[list[list[int]]], None]
"""Generates for all prompts at once and returns when every token is there."""


def _model(layers: int) -> Any:
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=VOCAB_SIZE,
        num_local_experts=16,
        num_experts_per_tok=2,
        max_position_embeddings=4096,
        sliding_window=None,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    model = MixtralForCausalLM(config).eval()
    model.set_experts_implementation("grouped_mm")
    return model


def _open_engine(model: Any, options: argparse.Namespace, *, sampling: bool) -> AbstractContextManager[Run]:
    from contextlib import contextmanager

    from tokenizers import Tokenizer, decoders, models

    from moeless.core.generation import GenerationDelta, GenerationRequest, SamplingParams
    from moeless.engine.config import EngineConfig
    from moeless.engine.transformers.build import build_engine

    # Byte-level tokens, so that detokenising is the real thing.
    tokenizer = Tokenizer(models.BPE(vocab={f"Ġt{n}": n for n in range(VOCAB_SIZE)}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    params = SamplingParams(
        max_tokens=options.tokens, temperature=1.0 if sampling else 0.0, top_p=0.95 if sampling else 1.0, seed=1
    )
    texts: dict[str, str] = {}
    running: set[str] = set()
    done = threading.Event()

    def on_step(deltas: list[GenerationDelta]) -> None:
        for delta in deltas:
            texts[delta.request_id] = texts.get(delta.request_id, "") + delta.text
            if delta.finish_reason is not None:
                running.discard(delta.request_id)
                if not running:
                    done.set()

    @contextmanager
    def opened() -> Any:
        config = EngineConfig(kv_cache_bytes=256 << 20, num_threads=options.threads, prefix_sharing=False)
        engine = build_engine(model, tokenizer, config, on_step)
        engine.start()

        def run(prompts: list[list[int]]) -> None:
            done.clear()
            running.update(str(n) for n in range(len(prompts)))
            for n, prompt in enumerate(prompts):
                engine.submit(GenerationRequest(request_id=str(n), prompt_token_ids=prompt, sampling=params))
            if not done.wait(600):
                sys.exit("the engine gave no answer in ten minutes")

        try:
            yield run
        finally:
            engine.stop()

    return opened()


def _open_manager(model: Any, options: argparse.Namespace, attention: str) -> AbstractContextManager[Run]:
    from contextlib import contextmanager

    from transformers import ContinuousBatchingConfig, GenerationConfig

    @contextmanager
    def opened() -> Any:
        model.set_attn_implementation(attention)
        batching = ContinuousBatchingConfig(
            page_size=64,
            num_blocks=256,
            max_batch_tokens=512,
            max_requests_per_batch=64,
            allow_block_sharing=False,
            use_async_batching=False,
            use_cuda_graph=False,
            auto_switch_to_flash=False,
        )
        generation = GenerationConfig(do_sample=False, max_new_tokens=options.tokens, eos_token_id=-1)
        with model.continuous_batching_context_manager(
            generation_config=generation, continuous_batching_config=batching
        ) as manager:

            def run(prompts: list[list[int]]) -> None:
                manager.add_requests(prompts, max_new_tokens=options.tokens)
                left = len(prompts)
                while left:
                    result = manager.get_result(timeout=600)
                    if result is None:
                        sys.exit("the manager gave no answer in ten minutes")
                    left -= result.is_finished()

            yield run

    return opened()


def _generate(model: Any, options: argparse.Namespace) -> Run:
    import torch

    @torch.inference_mode()
    def run(prompts: list[list[int]]) -> None:
        model.generate(torch.tensor(prompts), max_new_tokens=options.tokens, do_sample=False, pad_token_id=0)

    return run


if __name__ == "__main__":
    main()
