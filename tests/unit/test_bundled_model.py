"""The model shipped with the package: its size, its form, and that its experts tell the domains apart."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless.bundled import bundled_model_path

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

MAX_BYTES = 12_000_000
PASSAGES = {
    "python": (
        "    def close(self):\n        if self._sock is not None:\n            self._sock.close()\n"
        "            self._sock = None\n\n    def __enter__(self):\n        return self\n"
    ),
    "english": (
        "Return the value of the attribute if it is present, otherwise the default. "
        "If the object does not support the operation, an exception is raised.\n"
    ),
    "drama": "DUKE OF YORK:\nMy lord, I will not speak of this again;\nThe king is come, and all his noble men.\n",
    "arithmetic": "12 + 30 = 42\n7 * 8 = 56\n45 - 21 = 24\n9 + 6 = 15\n18 / 3 = 6\n60 + 25 = 85\n",
    "italian": (
        "Don Abbondio non sapeva che cosa dire; e la povera donna, con le lacrime agli occhi,\n"
        "si mise a sedere vicino alla porta della casa.\n"
    ),
}


@pytest.fixture(scope="module")
def model() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(bundled_model_path(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(bundled_model_path())


def test_the_weights_fit_the_package() -> None:
    assert (bundled_model_path() / "model.safetensors").stat().st_size <= MAX_BYTES


def test_the_weights_are_stored_in_bfloat16_with_one_tensor_for_each_expert_matrix() -> None:
    from safetensors import safe_open

    with safe_open(bundled_model_path() / "model.safetensors", framework="pt") as tensors:
        names = list(tensors.keys())
        dtypes = {tensors.get_slice(name).get_dtype() for name in names}
    assert dtypes == {"BF16"}
    assert "model.layers.5.mlp.experts.15.down_proj.weight" in names


def test_every_layer_has_sixteen_experts_of_which_a_token_uses_two(model: Any) -> None:
    gates = [layer.mlp.gate for layer in model.model.layers]
    assert len(gates) >= 6
    assert {(gate.num_experts, gate.top_k) for gate in gates} == {(16, 2)}


def test_the_card_reports_quality_and_routing() -> None:
    card = (bundled_model_path() / "README.md").read_text(encoding="utf-8")
    for heading in ("## Data", "## Training", "## Held-out quality", "## Routing", "## Samples", "## Licence"):
        assert heading in card


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_the_tokenizer_gives_every_text_back(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_the_chat_template_ends_where_the_assistant_speaks(tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "What is 1 + 1?"},
    ]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|endoftext|><|system|>Be brief.<|end|><|user|>Hello<|end|><|assistant|>Hi.<|end|>"
        "<|user|>What is 1 + 1?<|end|><|assistant|>"
    )


def test_the_chat_markers_are_single_tokens(tokenizer: Any) -> None:
    for marker in ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>", "<|pad|>"):
        assert len(tokenizer.encode(marker, add_special_tokens=False)) == 1


def test_generation_stops_at_the_end_of_an_answer(tokenizer: Any) -> None:
    config = json.loads((bundled_model_path() / "generation_config.json").read_text(encoding="utf-8"))
    assert tokenizer.convert_tokens_to_ids("<|end|>") in config["eos_token_id"]


def test_a_sum_is_answered_in_the_form_learnt_and_the_answer_ends(model: Any, tokenizer: Any) -> None:
    """The form, not the number: the model is too small and too briefly trained to calculate."""
    messages = [{"role": "user", "content": "What is 12 + 7?"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False)])
    out = model.generate(ids, do_sample=False, max_new_tokens=16)
    assert re.fullmatch(r"12 \+ 7 = \d+\.<\|end\|>", tokenizer.decode(out[0, ids.shape[1] :]))


@pytest.mark.parametrize("domain", PASSAGES)
def test_the_model_knows_each_domain(model: Any, tokenizer: Any, domain: str) -> None:
    ids = torch.tensor([tokenizer.encode("<|endoftext|>" + PASSAGES[domain], add_special_tokens=False)])
    with torch.no_grad():
        nats = model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
    assert nats / math.log(2) / len(PASSAGES[domain].encode()) < 3.0  # bits per byte; random weights need over 4


def test_the_domains_prefer_different_experts(model: Any, tokenizer: Any) -> None:
    loads = [_expert_loads(model, tokenizer, text) for text in PASSAGES.values()]
    divergences_L = np.mean(
        [_divergence_bits(a, b) for i, a in enumerate(loads) for b in loads[:i]],
        axis=0,
    )
    assert divergences_L.max() > 0.15


def _expert_loads(model: Any, tokenizer: Any, text: str) -> np.ndarray:
    """Share of the assignments of each expert, shape (L, E)."""
    ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
    with torch.no_grad():
        logits_per_layer = model(ids, output_router_logits=True).router_logits
    counts = [np.bincount(logits.topk(2).indices.flatten().numpy(), minlength=16) for logits in logits_per_layer]
    loads_LE = np.array(counts, dtype=float)
    return loads_LE / loads_LE.sum(axis=-1, keepdims=True)


def _divergence_bits(a_LE: np.ndarray, b_LE: np.ndarray) -> np.ndarray:
    """Jensen-Shannon divergence of each layer."""

    def entropy(load_LE: np.ndarray) -> np.ndarray:
        return -(load_LE * np.log2(np.where(load_LE > 0, load_LE, 1.0))).sum(axis=-1)

    return entropy((a_LE + b_LE) / 2) - (entropy(a_LE) + entropy(b_LE)) / 2
