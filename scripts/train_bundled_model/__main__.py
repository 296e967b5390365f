"""Train `moeless-mini` and write it, with its card, where the package looks for it.

    python -m scripts.train_bundled_model --text-dir DATA --out moeless/bundled/moeless-mini --minutes 50

DATA holds tinyshakespeare.txt, promessi_sposi_it.txt and gsm8k_train.jsonl.gz; the rest of the corpus is the
standard library of the Python that runs this. With glibc, MALLOC_MMAP_THRESHOLD_=4000000000
MALLOC_TRIM_THRESHOLD_=8000000000 in the environment saves a third of the time (freed pages are used again), and so
does OMP_WAIT_POLICY=PASSIVE where other work shares the cores.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast, Qwen3MoeForCausalLM

from scripts.train_bundled_model.card import measure_corpus, write_card
from scripts.train_bundled_model.corpus import DOMAINS, Document, load_documents
from scripts.train_bundled_model.evaluate import evaluate_model
from scripts.train_bundled_model.tokens import END, PAD, START, encode_documents, train_tokenizer
from scripts.train_bundled_model.train import TrainingConfig, TrainingReport, build_model, train

logger = logging.getLogger("scripts.train_bundled_model")
_VOCAB_SIZE = 4096


def main(argv: Sequence[str] | None = None) -> None:
    args = _parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    config = TrainingConfig(minutes=args.minutes, seed=args.seed)
    documents = load_documents(args.text_dir, num_sums=args.num_sums, seed=args.seed)
    if args.card_only:
        tokenizer = AutoTokenizer.from_pretrained(args.out)
    else:
        tokenizer = train_tokenizer(documents, vocab_size=_VOCAB_SIZE, max_length=config.long_context)
    streams = {name: encode_documents(tokenizer, _of(documents, name, held_out=False)) for name in DOMAINS}
    logger.info("read corpus tokens=%s", {name: len(stream.ids) for name, stream in streams.items()})
    record_path = args.out / "training.json"
    if not args.card_only:
        start, pad, end = tokenizer.convert_tokens_to_ids([START, PAD, END])
        model = build_model(vocab_size=_VOCAB_SIZE, pad_id=pad, bos_id=start, eos_id=end, seed=args.seed)
        save = partial(save_model, tokenizer=tokenizer, out=args.out)
        report = train(model, streams, config, compile_graph=args.compile, save=save)
        save(model)
        record = {"config": asdict(config), "report": asdict(report)}
        record_path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    _write_card(args.out, documents, {name: len(stream.ids) for name, stream in streams.items()}, seed=args.seed)


def _write_card(out: Path, documents: Sequence[Document], num_tokens: Mapping[str, int], *, seed: int) -> None:
    """Measure the saved model and describe it."""
    record = json.loads((out / "training.json").read_text(encoding="utf-8"))
    held_out = {name: _of(documents, name, held_out=True) for name in DOMAINS}
    model = Qwen3MoeForCausalLM.from_pretrained(out)
    write_card(
        out,
        model_config=model.config,
        num_parameters=model.num_parameters(),
        sizes=measure_corpus(documents, num_tokens),
        config=TrainingConfig(**record["config"]),
        report=TrainingReport(**record["report"]),
        evaluation=evaluate_model(out, held_out, seed=seed),
    )


def save_model(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the checkpoint in bfloat16; each file replaces the old one in one step."""
    out.mkdir(parents=True, exist_ok=True)
    copy = Qwen3MoeForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16)
    end, start, pad = tokenizer.convert_tokens_to_ids([END, START, PAD])
    copy.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.7,
        top_p=0.95,
        bos_token_id=start,
        eos_token_id=[end, start],
        pad_token_id=pad,
    )
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        copy.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        # Names that releases of transformers before 5 read too.
        _update_json(Path(folder) / "config.json", num_experts=model.config.num_experts)
        _update_json(Path(folder) / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
        for path in sorted(Path(folder).iterdir()):
            path.chmod(0o644)
            os.replace(path, out / path.name)
    logger.info("saved model out=%s", out)


def _update_json(path: Path, **values: object) -> None:
    content = {**json.loads(path.read_text(encoding="utf-8")), **values}
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _of(documents: Sequence[Document], domain: str, *, held_out: bool) -> list[Document]:
    return [item for item in documents if item.domain == domain and item.held_out == held_out]


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text-dir", type=Path, required=True, help="folder with the books and GSM8K")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--minutes", type=float, default=50.0, help="time of the training loop")
    parser.add_argument("--num-sums", type=int, default=45_000, help="generated documents of sums")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--card-only", action="store_true", help="measure and describe the model already in --out")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="use torch.compile")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
