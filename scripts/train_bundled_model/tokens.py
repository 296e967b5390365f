"""The tokenizer of the bundled model, its chat template, and documents as token streams.

Called by __main__ and train.py.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from scripts.train_bundled_model.corpus import Document

START, PAD, SYSTEM, USER, ASSISTANT, END = SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|pad|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
)
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('the roles are system, user and assistant') }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_SYSTEM_PROMPT = "You are a helpful assistant."
_TOKENIZER_SAMPLE_BYTES = 1_000_000

Int32Array = npt.NDArray[np.int32]


def train_tokenizer(documents: Sequence[Document], *, vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE learnt from about as much text of each domain; digits stand alone so that sums line up."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_balanced_texts(documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=START,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=[SYSTEM, USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
        chat_template=CHAT_TEMPLATE,
    )


def _balanced_texts(documents: Iterable[Document]) -> Iterable[str]:
    used: dict[str, int] = defaultdict(int)
    for document in documents:
        if document.held_out or used[document.domain] > _TOKENIZER_SAMPLE_BYTES:
            continue
        for turn in document.turns:
            used[document.domain] += len(turn)
            yield turn


def render(document: Document, *, with_system: bool = False) -> str:
    """The text that the model reads: what CHAT_TEMPLATE makes of a conversation, or the plain text."""
    if not document.is_chat:
        return START + document.turns[0]
    system = f"{SYSTEM}{_SYSTEM_PROMPT}{END}" if with_system else ""
    roles = (USER, ASSISTANT)
    return START + system + "".join(f"{roles[i % 2]}{turn}{END}" for i, turn in enumerate(document.turns))


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenStream:
    """The documents of one domain, one after the other, as token ids."""

    ids: Int32Array
    starts: Int32Array
    """Start of each document in `ids`."""
    num_bytes: int
    """UTF-8 bytes of the text, markers not counted."""


def encode_documents(tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document]) -> TokenStream:
    """Tokenize documents in order; every seventh conversation opens with a system message."""
    texts = [render(document, with_system=index % 7 == 0) for index, document in enumerate(documents)]
    backend = tokenizer.backend_tokenizer
    encoded = [np.asarray(item.ids, dtype=np.int32) for item in backend.encode_batch(texts)]
    lengths = np.array([len(ids) for ids in encoded])
    return TokenStream(
        ids=np.concatenate(encoded),
        starts=np.concatenate(([0], lengths.cumsum()[:-1])).astype(np.int32),
        num_bytes=sum(len(turn.encode()) for document in documents for turn in document.turns),
    )


class RowSampler:
    """Rows of one domain: its documents in a new random order each epoch, packed without gaps."""

    def __init__(self, stream: TokenStream, *, seed: int) -> None:
        self._stream = stream
        self._rng = np.random.default_rng(seed)
        self._left = np.empty(0, dtype=np.int32)
        self.num_epochs = 0

    def draw(self, num_tokens: int) -> Int32Array:
        """The next `num_tokens` ids."""
        while len(self._left) < num_tokens:
            self._left = np.concatenate((self._left, self._shuffled()))
            self.num_epochs += 1
        row, self._left = self._left[:num_tokens], self._left[num_tokens:]
        return row

    def _shuffled(self) -> Int32Array:
        ends = np.append(self._stream.starts[1:], len(self._stream.ids))
        order = self._rng.permutation(len(ends))
        return np.concatenate([self._stream.ids[self._stream.starts[i] : ends[i]] for i in order])
