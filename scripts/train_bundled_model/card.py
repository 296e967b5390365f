"""Write the model card, README.md, from what was measured.

Called by __main__. Every number in the card comes from the arguments, so that the card cannot drift from the model.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import Qwen3MoeConfig

from scripts.train_bundled_model.corpus import DOMAINS, Document
from scripts.train_bundled_model.evaluate import Evaluation, entropy_bits, mean_divergence_bits
from scripts.train_bundled_model.train import TrainingConfig, TrainingReport

_SOURCES = {
    "python": ("source of the CPython {python} standard library", "PSF-2.0"),
    "english": ("its docstrings, `pydoc_data/topics.py` and licence; a few templates", "PSF-2.0"),
    "drama": ("Tiny Shakespeare", "public domain"),
    "arithmetic": ("GSM8K (training split) and generated sums", "MIT"),
    "italian": ("Alessandro Manzoni, *I promessi sposi*", "public domain"),
}
_HEADER = """---
license: apache-2.0
language:
- en
- it
library_name: transformers
pipeline_tag: text-generation
tags:
- mixture-of-experts
---

# moeless-mini

A very small mixture-of-experts language model, trained from random weights for the moeless package. It is there so
that serving, prediction and scaling of experts can be tried, tested and shown on a laptop, with routing that depends
on the text as it does in large models.
"""
_LIMITS = """## Use and limits

Use it to try moeless, in tests and in demonstrations. Its text has the look of each domain and little sense. Its facts
and code are wrong more often than not, and so are its sums, which have the right form and mostly the wrong number:
asked what it can do, it says that it adds numbers, and the score above says how well. It was not tuned for safety and
mirrors its sources: seventeenth-century drama, a novel of 1840, a programming language's library. Do not use it to
answer people.

It knows nothing past the context given above. The perplexities of different domains compare through the bits per byte
only, since digits are tokens of their own. Held-out segments of a book share its style and characters with the
training segments. The weights depend on how many steps fit into the time, so that a second run gives a similar model,
not the same one.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusSize:
    num_documents: int
    num_tokens: int
    num_bytes: int


def write_card(
    out: Path,
    *,
    model_config: Qwen3MoeConfig,
    num_parameters: int,
    sizes: Mapping[str, CorpusSize],
    config: TrainingConfig,
    report: TrainingReport,
    evaluation: Evaluation,
) -> None:
    """Write `out/README.md`."""
    sections = (
        _HEADER,
        _architecture(out, model_config, num_parameters),
        _data(sizes, config),
        _training(config, report),
        _quality(evaluation),
        _routing(evaluation, model_config),
        _samples(evaluation),
        _LIMITS,
        "## Licence\n\nThe weights are under the Apache License 2.0; the sources keep their own licences, above.\n",
    )
    (out / "README.md").write_text("\n".join(sections), encoding="utf-8")


def measure_corpus(documents: Sequence[Document], num_tokens: Mapping[str, int]) -> dict[str, CorpusSize]:
    """Size of the training part of each domain."""
    sizes = {}
    for name in DOMAINS:
        chosen = [document for document in documents if document.domain == name and not document.held_out]
        sizes[name] = CorpusSize(
            num_documents=len(chosen),
            num_tokens=num_tokens[name],
            num_bytes=sum(len(turn.encode()) for document in chosen for turn in document.turns),
        )
    return sizes


def _architecture(out: Path, config: Qwen3MoeConfig, num_parameters: int) -> str:
    size_mb = (out / "model.safetensors").stat().st_size / 1e6
    return f"""## Model

| | |
|---|---|
| family | Qwen3-MoE (`Qwen3MoeForCausalLM`) |
| parameters | {num_parameters / 1e6:.2f} M, {size_mb:.1f} MB in bfloat16 |
| layers | {config.num_hidden_layers}, all MoE: {config.num_experts} experts, top-{config.num_experts_per_tok} |
| hidden size, expert size | {config.hidden_size}, {config.moe_intermediate_size} |
| attention heads | {config.num_attention_heads} of {config.head_dim}, {config.num_key_value_heads} key-value heads |
| vocabulary | {config.vocab_size}, byte-level BPE with single digits; embeddings tied |
| context | {config.max_position_embeddings} tokens |

Conversations are written `<|endoftext|><|user|>question<|end|><|assistant|>answer<|end|>`; the chat template does it.
"""


def _data(sizes: Mapping[str, CorpusSize], config: TrainingConfig) -> str:
    rows = [["domain", "source", "licence", "documents", "MB", "tokens", "share of training"]]
    for name, size in sizes.items():
        source, licence = _SOURCES[name]
        rows.append(
            [
                name,
                source.format(python=platform.python_version()),
                licence,
                f"{size.num_documents:,}",
                f"{size.num_bytes / 1e6:.2f}",
                f"{size.num_tokens:,}",
                f"{config.domain_weights[name]:.0%}",
            ]
        )
    return f"""## Data

{_table(rows)}

One document in 25 is held out: modules (with their docstrings), topics, segments of about 6 kB of a book, GSM8K
problems, and sums by their numbers (above 20). Each domain holds plain text and conversations made from it.
"""


def _training(config: TrainingConfig, report: TrainingReport) -> str:
    rate = report.num_tokens / report.duration_s
    threads = "one thread" if report.num_threads == 1 else f"{report.num_threads} threads"
    epochs = ", ".join(f"{name} {count}" for name, count in report.epochs.items())
    return f"""## Training

{report.num_steps:,} steps of {config.batch_tokens:,} tokens, {report.num_tokens / 1e6:.1f} M tokens in
{report.duration_s / 60:.0f} minutes ({rate:,.0f} tokens per second) on {threads} of a server CPU of two
cores with bfloat16 matrix units, which other work shared. Passes over the data, begun: {epochs}.

Muon for the matrices (peak learning rate {config.matrix_learning_rate}, weight decay {config.weight_decay}) and AdamW
for the rest ({config.learning_rate}); a plateau, then linear decay to zero. Rows of {config.context} tokens, of
{config.long_context} from {config.long_from:.0%} on. Load balance loss of weight {config.balance_weight} over the
whole batch, never for one row, so that experts may take a domain for themselves.
`scripts/train_bundled_model` does all of it, this card included.
"""


def _quality(evaluation: Evaluation) -> str:
    rows = [["domain", "held-out tokens", "perplexity", "bits per byte"]]
    for name, score in evaluation.scores.items():
        rows.append([name, f"{score.num_tokens:,}", f"{score.perplexity:.2f}", f"{score.bits_per_byte:.3f}"])
    sums = ", ".join(f"{limit}: {share:.0%}" for limit, share in evaluation.sum_accuracy.items())
    return f"""## Held-out quality

{_table(rows)}

Plain documents, in windows of the whole context. Arithmetic here is GSM8K as text. Right answers to additions
and subtractions never trained on, asked in a conversation and answered greedily, by the size of the numbers: {sums}.
"""


def _routing(evaluation: Evaluation, config: Qwen3MoeConfig) -> str:
    mix_LE = np.mean(list(evaluation.loads.values()), axis=0)
    head = ["layer", *evaluation.loads, "all", "hottest / mean", "coldest / mean", "divergence"]
    rows = [head]
    for layer in range(config.num_hidden_layers):
        entropies = [f"{entropy_bits(load_LE[layer]):.2f}" for load_LE in evaluation.loads.values()]
        mix = mix_LE[layer]
        rows.append(
            [
                str(layer),
                *entropies,
                f"{entropy_bits(mix):.2f}",
                f"{mix.max() / mix.mean():.2f}",
                f"{mix.min() / mix.mean():.2f}",
                f"{mean_divergence_bits(evaluation.loads, layer):.3f}",
            ]
        )
    rows_hot = [["layer", *evaluation.loads]]
    for layer in range(config.num_hidden_layers):
        hottest = [_hottest(load_LE[layer]) for load_LE in evaluation.loads.values()]
        rows_hot.append([str(layer), *hottest])
    return f"""## Routing

Entropy in bits of the choice of expert on the held-out text ({np.log2(config.num_experts):.0f} when all are chosen
alike), for each domain and for all five in equal parts; the load of the hottest and coldest expert over the mean; the
mean Jensen-Shannon divergence between two domains, in bits.

{_table(rows)}

The two hottest experts of each domain, with their load over the mean:

{_table(rows_hot)}
"""


def _hottest(load_E: np.ndarray) -> str:
    ranked = np.argsort(-load_E)[:2]
    return ", ".join(f"E{expert} {load_E[expert] * len(load_E):.1f}x" for expert in ranked)


def _samples(evaluation: Evaluation) -> str:
    parts = ["## Samples\n\nTemperature 0.7, top-p 0.95; the first answer drawn, cut at 110 tokens.\n"]
    for domain, prompt, answer in evaluation.samples:
        quoted = f"{prompt.strip()}\n---\n{answer.strip()}".replace("```", "'''")
        parts.append(f"**{domain}**\n\n```text\n{quoted}\n```\n")
    return "\n".join(parts)


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
