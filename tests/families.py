"""Tiny random models of every family that the tests check, as checkpoints in hub format with a tokenizer.

Two or three layers, a few experts, float32. Weights are drawn so that routing is diverse and ties are unlikely:
transformers' own initialization leaves routers nearly flat and biases at zero.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

VOCAB_SIZE = 320
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>")

CHAT_TEMPLATE = (
    "{{ '<|bos|>' }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "num_experts_per_tok": 2,
    "pad_token_id": PAD_ID,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "tie_word_embeddings": False,
}
_LATENT_ATTENTION: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
_INDEXER: dict[str, Any] = {"index_topk": 64, "index_head_dim": 16, "index_n_heads": 2}
_GROUPED_ROUTER: dict[str, Any] = {"n_group": 2, "topk_group": 1}
_DELTA_NET: dict[str, Any] = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}

PARITY_FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 6, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40},
    "qwen3_moe": {"num_local_experts": 8, "moe_intermediate_size": 24, "head_dim": 16, "norm_topk_prob": True},
    "olmoe": {"num_experts": 8, "num_key_value_heads": 4, "num_experts_per_tok": 3},
    "deepseek_v2": {
        **_LATENT_ATTENTION,
        **_GROUPED_ROUTER,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "topk_method": "group_limited_greedy",
        "moe_intermediate_size": 24,
        "routed_scaling_factor": 1.5,
    },
    "deepseek_v3": {
        **_LATENT_ATTENTION,
        **_GROUPED_ROUTER,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_nextn_predict_layers": 0,
        "moe_intermediate_size": 24,
    },
    "phimoe": {"num_local_experts": 4, "attention_bias": True, "lm_head_bias": True},
    "gpt_oss": {
        "num_local_experts": 4,
        "head_dim": 16,
        "sliding_window": 8,
        "swiglu_limit": 1.5,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "glm4_moe": {
        "n_routed_experts": 8,
        "first_k_dense_replace": 1,
        "num_hidden_layers": 3,
        "moe_intermediate_size": 24,
        "head_dim": 16,
        "use_qk_norm": True,
        "num_nextn_predict_layers": 0,
    },
    "granitemoe": {
        "num_local_experts": 4,
        "embedding_multiplier": 4.0,
        "residual_multiplier": 0.5,
        "logits_scaling": 2.0,
        "tie_word_embeddings": True,
    },
    "ernie4_5_moe": {
        "moe_num_experts": 6,
        "moe_k": 2,
        "moe_intermediate_size": 24,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 2,
        "num_hidden_layers": 3,
        "tie_word_embeddings": True,
    },
}
"""The list that must be at parity, engine and workers included (Llama-4 is in REFUSED_FAMILIES)."""

OTHER_FAMILIES: dict[str, dict[str, Any]] = {
    "afmoe": {
        "num_experts": 8,
        "num_dense_layers": 1,
        "moe_intermediate_size": 24,
        "head_dim": 16,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "aria_text": {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1, "head_dim": 8},
    "axk1": {
        **_LATENT_ATTENTION,
        **_GROUPED_ROUTER,
        "n_routed_experts": 8,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 24,
    },
    "axk2": {
        **_LATENT_ATTENTION,
        **_INDEXER,
        "n_routed_experts": 8,
        "moe_intermediate_size": 24,
        "gated_norm_rank": 4,
    },
    "cohere2_moe": {
        "logit_scale": 1.0,
        "num_experts": 4,
        "head_dim": 8,
        "num_shared_experts": 1,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "deepseek_v32": {
        **_LATENT_ATTENTION,
        **_INDEXER,
        **_GROUPED_ROUTER,
        "n_routed_experts": 8,
        "mlp_layer_types": ["dense", "sparse"],
        "moe_intermediate_size": 24,
    },
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "head_dim": 16,
        "partial_rotary_factor": 0.5,
        "q_lora_rank": 16,
        "n_routed_experts": 8,
        "moe_intermediate_size": 24,
        "mlp_layer_types": ["moe", "moe"],
        "layer_types": ["sliding_attention", "sliding_attention"],
        "sliding_window": 8,
        "hc_mult": 2,
        "o_groups": 2,
        "o_lora_rank": 8,
        "swiglu_limit": 1.5,
        "num_nextn_predict_layers": 0,
        **_INDEXER,
    },
    "dots1": {
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
    },
    "exaone_moe": {
        "num_experts": 8,
        "moe_intermediate_size": 24,
        "sliding_window": 8,
        "mlp_layer_types": ["dense", "sparse"],
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "flex_olmo": {"num_experts": 5, "num_key_value_heads": 4},
    "gemma4_text": {
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 24,
        "head_dim": 16,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": VOCAB_SIZE,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "tie_word_embeddings": True,
    },
    "glm4_moe_lite": {
        **_LATENT_ATTENTION,
        "n_routed_experts": 8,
        "mlp_layer_types": ["dense", "sparse"],
        "moe_intermediate_size": 24,
    },
    "glm_moe_dsa": {
        **_LATENT_ATTENTION,
        **_INDEXER,
        "n_routed_experts": 8,
        "mlp_layer_types": ["dense", "sparse"],
        "moe_intermediate_size": 24,
    },
    "granitemoe_swa": {
        "num_local_experts": 4,
        "shared_intermediate_size": 24,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "granitemoehybrid": {
        "num_local_experts": 4,
        "shared_intermediate_size": 24,
        "layer_types": ["linear_attention", "full_attention"],
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "mamba_chunk_size": 16,
    },
    "granitemoeshared": {"num_local_experts": 4, "shared_intermediate_size": 24},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, "head_dim": 8},
    "hy_v3": {
        "num_experts": 8,
        "moe_intermediate_size": 24,
        "head_dim": 16,
        "mlp_layer_types": ["dense", "sparse"],
    },
    "hy_v4": {
        **_LATENT_ATTENTION,
        **_INDEXER,
        "n_routed_experts": 8,
        "moe_intermediate_size": 24,
        "mlp_layer_types": ["dense", "sparse"],
        "indexer_types": ["full", "full"],
        "swiglu_limit": 1.5,
        "hc_mult": 2,
    },
    "inkling_text": {
        "head_dim": 8,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 8,
        "sliding_window_size": 8,
        "logits_mup_width_multiplier": 1.0,
        "route_scale": 2.0,
        "d_rel": 4,
        "rel_extent": 16,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "moe_intermediate_size": 24,
        "layer_types": ["hybrid_sliding", "hybrid"],
        "mlp_layer_types": ["dense", "sparse"],
    },
    "jamba": {
        "num_experts": 4,
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "kimi_linear": {
        **_LATENT_ATTENTION,
        "q_lora_rank": None,
        "num_experts": 8,
        "num_experts_per_token": 2,
        "moe_intermediate_size": 24,
        "mlp_layer_types": ["dense", "sparse"],
        "layer_types": ["linear_attention", "full_attention"],
        "linear_head_dim": 8,
        "linear_num_heads": 4,
    },
    "laguna": {
        "num_experts": 8,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
        "head_dim": 16,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse"],
        "num_attention_heads_per_layer": [4, 4],
    },
    "lfm2_moe": {
        "num_experts": 8,
        "moe_intermediate_size": 24,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention"],
        "tie_word_embeddings": True,
    },
    "mellum": {
        "num_local_experts": 8,
        "moe_intermediate_size": 24,
        "head_dim": 16,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "mlp_layer_types": ["sparse", "sparse"],
    },
    "mimo_v2_flash": {
        "n_routed_experts": 8,
        "moe_intermediate_size": 24,
        "head_dim": 16,
        "v_head_dim": 8,
        "sliding_window": 8,
        "layer_types": ["full_attention", "sliding_attention"],
        "mlp_layer_types": ["dense", "sparse"],
    },
    "minimax": {
        "num_local_experts": 4,
        "head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"],
        "block_size": 8,
    },
    "minimax_m2": {"num_local_experts": 8, "head_dim": 16, "rotary_dim": 8},
    "minimax_m3_vl_text": {
        "num_local_experts": 4,
        "head_dim": 16,
        "rotary_dim": 8,
        "dense_intermediate_size": 48,
        "shared_intermediate_size": 24,
        "swiglu_limit": 1.5,
        "mlp_layer_types": ["dense", "sparse"],
        "layer_types": ["full_attention", "full_attention"],
    },
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
        "head_dim": 8,
        "n_routed_experts": 8,
        "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 24,
        "moe_latent_size": 16,
        "ssm_state_size": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "chunk_size": 16,
        "use_mamba_kernels": False,
    },
    "qwen3_5_moe_text": {
        **_DELTA_NET,
        "num_experts": 8,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
        "head_dim": 16,
    },
    "qwen3_next": {
        **_DELTA_NET,
        "num_experts": 8,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
        "head_dim": 16,
    },
    "qwen4_exp_text": {
        **_DELTA_NET,
        "layer_types": ["linear_attention", "indexed_attention"],
        "num_experts": 8,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
        "head_dim": 16,
        "hc_count": 2,
        "hc_lowrank": 8,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 32,
        "indexer_compress_ratio": 4,
        "ple_layer_ids": [1],
        "ple_embed_dim": 16,
        "ngram_size": 2,
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 64,
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 2,
    },
    "solar_open": {"n_routed_experts": 8, "moe_intermediate_size": 24, "head_dim": 16},
    "zaya": {
        "num_experts": 4,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 24,
        "head_dim": 8,
        "router_hidden_size": 16,
        "layer_types": ["hybrid", "hybrid"],
    },
}
"""Checked for packing and logits only."""

REFUSED_FAMILIES: dict[str, dict[str, Any]] = {
    "llama4_text": {
        "num_local_experts": 4,
        "head_dim": 8,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 48,
        "attention_chunk_size": 16,
    },
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 512,
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    },
    "longcat_flash": {
        **_LATENT_ATTENTION,
        "num_layers": 1,
        "head_dim": 8,
        "ffn_hidden_size": 48,
        "expert_ffn_hidden_size": 24,
        "n_routed_experts": 4,
        "zero_expert_num": 2,
        "moe_topk": 2,
    },
    "doge": {"is_moe": True, "num_experts": 16, "num_key_value_heads": 4},
    "jetmoe": {"num_local_experts": 4, "kv_channels": 8, "num_key_value_heads": 2},
}
"""MoE families whose experts do not use transformers' experts interface."""

FAMILIES = PARITY_FAMILIES | OTHER_FAMILIES
_ALL = FAMILIES | REFUSED_FAMILIES


def make_model(family: str, *, seed: int = 0) -> PreTrainedModel:
    """A random model in float32 and eval mode; equal seeds give equal weights."""
    config = CONFIG_MAPPING[family](**(_BASE | _ALL[family]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        _randomize(model)
    return model


def make_checkpoint(family: str, folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Write a random checkpoint of `family` in hub format, with a tokenizer, and return its folder."""
    model = make_model(family, seed=seed).to(dtype)
    model.config.dtype = dtype
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = PAD_ID, EOS_ID
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a chat template: any text round-trips."""
    return PreTrainedTokenizerFast(
        tokenizer_object=_trained_tokenizer(),
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|end|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=_BASE["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
    )


@functools.cache
def _trained_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([Path(__file__).read_text(encoding="utf-8")], trainer)
    return tokenizer


@torch.no_grad()
def _randomize(model: PreTrainedModel) -> None:
    """Matrices by fan-in, routers steeper, and noise on every vector (norms, biases, correction biases)."""
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape)
        if tensor.dim() < 2:
            tensor.add_(0.1 * noise)
            continue
        is_router = any(part in ("gate", "router") for part in name.split("."))
        tensor.copy_(noise * (3.0 if is_router else 1.0) / tensor.shape[-1] ** 0.5)
