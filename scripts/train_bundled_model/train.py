"""The training loop of the bundled model: a schedule keyed on elapsed time, so that it ends when it should.

Called by __main__. Shapes: B = rows, T = tokens of a row, N = B * T, L = layers, E = experts, K = experts per token.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from scripts.train_bundled_model.fast_moe import FAST_EXPERTS, chunked_cross_entropy, register_fast_experts
from scripts.train_bundled_model.muon import Muon
from scripts.train_bundled_model.tokens import RowSampler, TokenStream

logger = logging.getLogger(__name__)
_LOG_STEPS = 25


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    minutes: float = 50.0
    """Wall-clock time of the training loop."""
    batch_tokens: int = 3072
    context: int = 256
    """Tokens of a row; short, because attention is the dearest part of a step at this width."""
    long_context: int = 1024
    """Tokens of a row at the end of the training, so that the later positions are learnt too."""
    long_from: float = 0.9
    """Share of the training after which rows are long."""
    domain_weights: Mapping[str, float] = field(
        default_factory=lambda: {"python": 0.27, "english": 0.18, "drama": 0.17, "arithmetic": 0.22, "italian": 0.16}
    )
    learning_rate: float = 4e-3
    """Peak, of AdamW: embeddings, routers and norms."""
    matrix_learning_rate: float = 6e-3
    """Peak, of Muon: attention and experts."""
    warmup_steps: int = 40
    stable_until: float = 0.4
    """Share of the training after which the learning rate falls linearly to zero."""
    weight_decay: float = 0.1
    balance_weight: float = 0.02
    """Weight of the load-balance loss. It is computed over the whole batch, never for one row: no expert dies, yet the
    experts may divide the domains among themselves."""
    router_z_weight: float = 1e-4
    """Weight of the mean squared log-sum-exp of the router's logits; keeps them within bfloat16's precision."""
    checkpoint_minutes: float = 4.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.minutes <= 0:
            raise ValueError(f"minutes must be > 0, got {self.minutes}")
        for context in (self.context, self.long_context):
            if self.batch_tokens % context:
                raise ValueError(f"batch_tokens must be a multiple of {context}, got {self.batch_tokens}")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingReport:
    num_steps: int
    num_tokens: int
    duration_s: float
    num_threads: int
    epochs: Mapping[str, int]


def build_model(*, vocab_size: int, pad_id: int, bos_id: int, eos_id: int, seed: int) -> Qwen3MoeForCausalLM:
    """Six layers of sixteen experts, 5.5 million parameters; a fifth of them work on a token."""
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=vocab_size,
        hidden_size=160,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        moe_intermediate_size=96,
        intermediate_size=192,
        num_experts=16,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        hidden_act="silu",
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.04,
        pad_token_id=pad_id,
        bos_token_id=bos_id,
        eos_token_id=eos_id,
    )
    return Qwen3MoeForCausalLM(config)


def backbone_forward(model: Qwen3MoeForCausalLM, ids_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The stock layers, called one by one so that the router's logits come out of a compiled graph.

    Returns: hidden states after the last norm (B, T, D), router logits (L, N, E), chosen experts (L, N, K).
    """
    hidden = model.model.embed_tokens(ids_BT)
    positions = torch.arange(ids_BT.shape[1]).unsqueeze(0)
    rotary = model.model.rotary_emb(hidden, positions)
    logits, chosen = [], []
    for layer in model.model.layers:
        attended, _ = layer.self_attn(layer.input_layernorm(hidden), position_embeddings=rotary, attention_mask=None)
        hidden = hidden + attended
        normed = layer.post_attention_layernorm(hidden)
        flat = normed.reshape(-1, normed.shape[-1])
        layer_logits, weights, index = layer.mlp.gate(flat)
        hidden = hidden + layer.mlp.experts(flat, index, weights).view_as(hidden)
        logits.append(layer_logits.float())
        chosen.append(index)
    return model.model.norm(hidden), torch.stack(logits), torch.stack(chosen)


def balance_loss(logits_LNE: Tensor, chosen_LNK: Tensor) -> Tensor:
    """Mean over layers of E times the sum over experts of load share x mean probability; 1 when balanced.

    Source: Switch Transformers, section 2.2 (arXiv 2101.03961), over the global batch as in arXiv 2501.11873.
    """
    num_experts = logits_LNE.shape[-1]
    load_LE = functional.one_hot(chosen_LNK, num_experts).float().mean(dim=(1, 2))
    probability_LE = logits_LNE.softmax(dim=-1).mean(dim=1)
    return num_experts * (load_LE * probability_LE).sum(dim=-1).mean()


def train(
    model: Qwen3MoeForCausalLM,
    streams: Mapping[str, TokenStream],
    config: TrainingConfig,
    *,
    compile_graph: bool,
    clock: Callable[[], float] = time.monotonic,
    save: Callable[[Qwen3MoeForCausalLM], None],
) -> TrainingReport:
    """Train in place; `save` is called every few minutes.

    Args:
        model: float32 weights; the products run in bfloat16.
        streams: training tokens by domain.
        compile_graph: fuse the small operations with torch.compile (needs a C++ compiler).
    """
    register_fast_experts()
    model.set_experts_implementation(FAST_EXPERTS)
    forward = torch.compile(backbone_forward, dynamic=False) if compile_graph else backbone_forward
    samplers = {name: RowSampler(stream, seed=config.seed + i) for i, (name, stream) in enumerate(streams.items())}
    optimizers = _optimizers(model, config)
    groups = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
    rng = random.Random(config.seed)
    begin, saved_at, step, recent = clock(), clock(), 0, []
    while (progress := (clock() - begin) / (60 * config.minutes)) < 1:
        context = config.context if progress < config.long_from else config.long_context
        ids_BT = _draw_batch(samplers, config, context, rng)
        with torch.autocast("cpu", torch.bfloat16):
            hidden_BTD, logits_LNE, chosen_LNK = forward(model, ids_BT)
        targets_BT = functional.pad(ids_BT[:, 1:], (0, 1), value=-100)
        loss = chunked_cross_entropy(hidden_BTD.flatten(0, 1), model.lm_head.weight, targets_BT.flatten())
        balance = balance_loss(logits_LNE, chosen_LNK)
        z_loss = logits_LNE.logsumexp(dim=-1).square().mean()
        (loss + config.balance_weight * balance + config.router_z_weight * z_loss).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group, peak in groups:
            group["lr"] = peak * _schedule(step, progress, config)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        recent.append(loss.item())
        if step % _LOG_STEPS == 0:
            elapsed_s = clock() - begin
            logger.info(
                "trained step=%d elapsed_s=%.0f tokens_per_s=%.0f loss=%.3f balance=%.3f grad_norm=%.2f context=%d",
                *(step, elapsed_s, step * config.batch_tokens / elapsed_s),
                *(float(np.mean(recent[-_LOG_STEPS:])), balance.item(), norm.item(), context),
            )
        if clock() - saved_at > 60 * config.checkpoint_minutes:
            save(model)
            saved_at = clock()
    return TrainingReport(
        num_steps=step,
        num_tokens=step * config.batch_tokens,
        duration_s=clock() - begin,
        num_threads=torch.get_num_threads(),
        epochs={name: sampler.num_epochs for name, sampler in samplers.items()},
    )


def _optimizers(model: Qwen3MoeForCausalLM, config: TrainingConfig) -> list[torch.optim.Optimizer]:
    """Muon for attention and experts, AdamW for the embeddings, routers and norms."""
    muon: list[Tensor] = []
    adam: list[Tensor] = []
    for name, parameter in model.named_parameters():
        is_inner_matrix = parameter.ndim > 1 and "embed" not in name and "gate.weight" not in name
        (muon if is_inner_matrix else adam).append(parameter)
    return [
        Muon(muon, lr=config.matrix_learning_rate, weight_decay=config.weight_decay),
        torch.optim.AdamW(adam, lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def _schedule(step: int, progress: float, config: TrainingConfig) -> float:
    """Share of the peak learning rate: warm-up, plateau, then a straight line to zero."""
    warmup = min(1.0, (step + 1) / config.warmup_steps)
    return warmup * min(1.0, (1 - progress) / (1 - config.stable_until))


def _draw_batch(samplers: Mapping[str, RowSampler], config: TrainingConfig, context: int, rng: random.Random) -> Tensor:
    weights = [config.domain_weights[name] for name in samplers]
    names = rng.choices(list(samplers), weights=weights, k=config.batch_tokens // context)
    return torch.from_numpy(np.stack([samplers[name].draw(context) for name in names])).long()
