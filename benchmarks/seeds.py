"""Share of seeded tokens that change when a request is decoded in a crowd instead of alone.

`python -m benchmarks seeds` generates seeded requests one by one, and again among others, on the bundled model in
bfloat16. Sums in another order round otherwise, so the logits differ in their last bits. Two figures: how many requests
and tokens come out otherwise, and, on equal prefixes and with equal draws, how many tokens another way of drawing
would have changed: greedy decoding, Gumbel-max (the engine's) and the inverse of the cumulated distribution.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from moeless.bundled import bundled_model_path
from moeless.core.generation import GenerationDelta, GenerationRequest, SamplingParams
from moeless.engine.assemble import Assembly, assemble_engine
from moeless.engine.config import EngineConfig
from moeless.engine.protocol import Engine
from moeless.engine.transformers import hooks
from moeless.engine.transformers.randomness import keys_of, random_bits, stream_of
from moeless.engine.transformers.row_sampler import RowSampler
from moeless.engine.transformers.sampling import Sampled, Vocabulary, sample
from moeless.packages.pack import pack_checkpoint
from moeless.packages.packed_model import PackedModel
from moeless.text.tokenizer import Tokenizer

Logits = dict[tuple[int, int], Tensor]
"""By stream and position."""

_TEXT = (
    "In the morning the people of the village went down to the river, where the boats lay, and spoke of the weather, "
    "of the harvest and of the road over the mountains that nobody had taken since the snow."
)


class Generator:
    """Runs requests through one engine, and keeps their logits; `forced` tokens are given instead of the sampled."""

    def __init__(self, packed: PackedModel, tokenizer: Any, dtype: str, threads: int) -> None:
        config = EngineConfig(num_threads=threads, prefix_sharing=False, max_running=64)
        self.engine: Engine = assemble_engine(packed, tokenizer, Assembly(engine=config, dtype=dtype)).engine
        self.logits: Logits = {}
        self.forced: dict[tuple[int, int], int] = {}
        self._tokens: dict[str, list[int]] = {}
        self._left = 0
        self._done = threading.Event()
        self.engine.set_on_step(self._on_step)
        hooks.sample = self._sample  # type: ignore[attr-defined]
        self.engine.start()

    def run(self, requests: Sequence[GenerationRequest]) -> dict[str, list[int]]:
        """All of them at once; their tokens."""
        self._tokens, self._left = {request.request_id: [] for request in requests}, len(requests)
        self._done.clear()
        for request in requests:
            self.engine.submit(request)
        self._done.wait()
        return self._tokens

    def _sample(self, logits_BV: Tensor, rows: Sequence[RowSampler], vocabulary: Vocabulary | None = None) -> Sampled:
        sampled = sample(logits_BV, rows, vocabulary)
        for b, row in enumerate(rows):
            self.logits[row.stream, row.position] = logits_BV[b].clone()
            sampled.token_ids[b] = self.forced.get((row.stream, row.position), sampled.token_ids[b])
        return sampled

    def _on_step(self, deltas: list[GenerationDelta]) -> None:
        for delta in deltas:
            self._tokens[delta.request_id] += [token.token_id for token in delta.logprobs]
            self._left -= delta.finish_reason is not None
        if self._left == 0:
            self._done.set()


def main(argv: list[str] | None = None) -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=32, help="seeded requests that are measured")
    parser.add_argument("--crowd", type=int, default=16, help="requests decoded at a time, half of them measured")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="few requests and tokens")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.requests, arguments.tokens = 8, 32
    with tempfile.TemporaryDirectory() as folder:
        pack_checkpoint(bundled_model_path(), Path(folder) / "packed")
        packed = PackedModel.open(Path(folder) / "packed")
        tokenizer = Tokenizer.load(packed.backbone_path)
        generator = Generator(packed, tokenizer, arguments.dtype, arguments.threads)
        try:
            measure(generator, tokenizer, arguments)
        finally:
            generator.engine.stop()


def measure(generator: Generator, tokenizer: Any, arguments: argparse.Namespace) -> None:
    """Seeded and greedy requests alone and in a crowd; then the same prefixes with each way of drawing."""
    words = tokenizer.encode_prompt(_TEXT)
    prompts = [words[n % 7 : n % 7 + 5 + n % 23] for n in range(arguments.requests + arguments.crowd)]
    console = Console()
    table = Table("requests", "come out otherwise", "tokens, all after the first other one included")
    alone: dict[str, list[int]] = {}
    for kind, temperature in (("greedy", 0.0), ("seeded", 1.0)):
        requests = [request(n, prompt, temperature, arguments.tokens) for n, prompt in enumerate(prompts)]
        generator.logits = {}
        alone = {}
        for each in requests[: arguments.requests]:
            alone |= generator.run([each])
        crowded = in_crowds(generator, requests, arguments)
        num_differing = sum(alone[name] != crowded[name] for name in alone)
        num_tokens = sum(a != b for name in alone for a, b in zip(alone[name], crowded[name], strict=True))
        total = sum(map(len, alone.values()))
        table.add_row(kind, f"{num_differing} of {len(alone)}", f"{num_tokens / total:.1%}")
    console.print(table)

    generator.logits, generator.forced = {}, {}
    requests = [request(n, prompt, 1.0, arguments.tokens) for n, prompt in enumerate(prompts)]
    for each in requests[: arguments.requests]:
        generator.run([each])
    logits_alone = generator.logits
    streams = {stream_of(n): str(n) for n in range(arguments.requests)}
    generator.forced = {
        (stream, position): token for stream, name in streams.items() for position, token in enumerate(alone[name])
    }
    generator.logits = {}
    in_crowds(generator, requests, arguments)
    console.print(changed_tokens(logits_alone, generator.logits))


def in_crowds(
    generator: Generator, requests: Sequence[GenerationRequest], arguments: argparse.Namespace
) -> dict[str, list[int]]:
    """The measured requests again, half a crowd at a time, the rest of the crowd others."""
    half = arguments.crowd // 2
    others = requests[arguments.requests :]
    tokens: dict[str, list[int]] = {}
    for start in range(0, arguments.requests, half):
        measured = requests[start : min(start + half, arguments.requests)]
        tokens |= generator.run([*measured, *others[: arguments.crowd - len(measured)]])
    return tokens


def request(number: int, prompt: list[int], temperature: float, num_tokens: int) -> GenerationRequest:
    """The request's number is its id and its seed."""
    sampling = SamplingParams(max_tokens=num_tokens, temperature=temperature, seed=number, ignore_eos=True, logprobs=0)
    return GenerationRequest(request_id=str(number), prompt_token_ids=prompt, sampling=sampling)


def changed_tokens(alone: Logits, crowded: Logits) -> Table:
    """On equal prefixes, how many tokens each way of drawing changes."""
    keys = sorted(set(alone) & set(crowded))
    first, second = (torch.stack([logits[key] for key in keys]) for logits in (alone, crowded))
    table = Table("way of drawing", "tokens changed", title=f"{len(keys)} tokens on equal prefixes")
    greedy = first.argmax(dim=-1) != second.argmax(dim=-1)
    table.add_row("greedy", f"{float(greedy.float().mean()):.1%}")
    params = SamplingParams(max_tokens=1)
    rows = []
    for stream, position in keys:
        row = RowSampler(params)
        row.stream, row.position = stream, position
        rows.append(row)
    drawn = [np.array(sample(logits, rows).token_ids) for logits in (first, second)]
    table.add_row("Gumbel-max", f"{float((drawn[0] != drawn[1]).mean()):.1%}")
    bits = random_bits(
        np.zeros(1, np.uint32), keys_of(*(np.array(part, np.uint64) for part in zip(*keys, strict=True)))
    )
    uniform = torch.from_numpy((bits.astype(np.float64) + 0.5) / 2**32).unsqueeze(1)
    ends = [logits.double().softmax(dim=-1).cumsum(dim=-1) for logits in (first, second)]
    inverse = [torch.searchsorted(each, uniform).squeeze(1) for each in ends]
    table.add_row("inverse CDF", f"{float((inverse[0] != inverse[1]).float().mean()):.1%}")
    table.caption = f"logits equal to the last bit: {float((first == second).float().mean()):.1%}"
    return table


if __name__ == "__main__":
    main()
