"""A quick training path for small MoE models on a CPU: sorted experts and a chunked loss, both in bfloat16.

Called by train.py. The stock implementations spend most of a step on memory traffic and on scattered adds; here
every expert multiplies one contiguous block, the backward is written by hand, and the logits never exist at once.

Shapes: N = tokens, K = experts per token, S = N * K assignments, P = rows of all experts with their padding,
E = experts, D = hidden size, I = expert intermediate size, V = vocabulary size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

FAST_EXPERTS = "sorted_bf16"
_BLOCK_ROWS = 64
"""An expert's rows are filled up with zeros to a multiple of this: a matrix product of a new size costs a
compilation in oneDNN, and loads differ in every step."""
_LOSS_CHUNK_TOKENS = 1024
"""Tokens whose logits exist at once: 1024 x 4096 values stay inside the second-level cache's reach."""


@torch.library.custom_op("moeless_train::sorted_experts", mutates_args=())
def _sorted_experts(
    x_ND: Tensor, gate_up_EID: Tensor, down_EDI: Tensor, index_NK: Tensor, weight_NK: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run every expert on its own block of rows; returns the output and what the backward needs."""
    num_tokens, top_k = index_NK.shape
    flat_S = index_NK.reshape(-1)
    order_S = torch.argsort(flat_S, stable=True)
    counts_E = torch.bincount(flat_S, minlength=gate_up_EID.shape[0])
    blocks_E = (counts_E + _BLOCK_ROWS - 1) // _BLOCK_ROWS * _BLOCK_ROWS
    shift_E = (blocks_E.cumsum(0) - blocks_E) - (counts_E.cumsum(0) - counts_E)
    slot_S = torch.empty_like(order_S)
    slot_S[order_S] = torch.arange(order_S.numel()) + shift_E[flat_S[order_S]]
    x_PD = x_ND.new_zeros(_num_rows(index_NK, gate_up_EID), x_ND.shape[1], dtype=torch.bfloat16)
    x_PD[slot_S] = x_ND.bfloat16().repeat_interleave(top_k, dim=0)
    gate_up, down = gate_up_EID.bfloat16(), down_EDI.bfloat16()
    hidden_PI = x_PD.new_zeros(x_PD.shape[0], gate_up.shape[1])
    y_PD = torch.zeros_like(x_PD)
    bounds = _bounds(blocks_E)
    for expert, (start, end) in enumerate(bounds):
        torch.mm(x_PD[start:end], gate_up[expert].T, out=hidden_PI[start:end])
    gate_PI, up_PI = hidden_PI.chunk(2, dim=-1)
    act_PI = functional.silu(gate_PI) * up_PI
    for expert, (start, end) in enumerate(bounds):
        torch.mm(act_PI[start:end], down[expert].T, out=y_PD[start:end])
    y_NKD = y_PD[slot_S].view(num_tokens, top_k, -1)
    out_ND = torch.bmm(weight_NK.bfloat16().unsqueeze(1), y_NKD).squeeze(1).to(x_ND.dtype)
    return out_ND, x_PD, hidden_PI, slot_S, blocks_E


@torch.library.custom_op("moeless_train::sorted_experts_backward", mutates_args=())
def _sorted_experts_backward(
    grad_ND: Tensor,
    gate_up_EID: Tensor,
    down_EDI: Tensor,
    weight_NK: Tensor,
    x_PD: Tensor,
    hidden_PI: Tensor,
    slot_S: Tensor,
    blocks_E: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, gate_up, down and the gate weights."""
    num_tokens, top_k = weight_NK.shape
    gate_up, down = gate_up_EID.bfloat16(), down_EDI.bfloat16()
    grad_PD = torch.zeros_like(x_PD)
    grad_PD[slot_S] = grad_ND.bfloat16().repeat_interleave(top_k, dim=0)
    weight_P = x_PD.new_zeros(x_PD.shape[0])
    weight_P[slot_S] = weight_NK.bfloat16().reshape(-1)
    gate_PI, up_PI = hidden_PI.chunk(2, dim=-1)
    sigmoid_PI = torch.sigmoid(gate_PI)
    silu_PI = gate_PI * sigmoid_PI
    act_PI = silu_PI * up_PI
    grad_act_PI = torch.zeros_like(act_PI)
    grad_gate_up, grad_down = torch.zeros_like(gate_up), torch.zeros_like(down)
    weighted_PI = act_PI * weight_P.unsqueeze(-1)
    bounds = _bounds(blocks_E)
    for expert, (start, end) in enumerate(bounds):
        torch.mm(grad_PD[start:end], down[expert], out=grad_act_PI[start:end])
        torch.mm(grad_PD[start:end].T, weighted_PI[start:end], out=grad_down[expert])
    grad_weight_P = torch.linalg.vecdot(grad_act_PI.float(), act_PI.float())
    grad_act_PI *= weight_P.unsqueeze(-1)
    grad_hidden_PI = torch.cat(
        (grad_act_PI * up_PI * (sigmoid_PI + silu_PI * (1 - sigmoid_PI)), grad_act_PI * silu_PI), dim=-1
    )
    grad_x_PD = torch.zeros_like(x_PD)
    for expert, (start, end) in enumerate(bounds):
        torch.mm(grad_hidden_PI[start:end], gate_up[expert], out=grad_x_PD[start:end])
        torch.mm(grad_hidden_PI[start:end].T, x_PD[start:end], out=grad_gate_up[expert])
    grad_x_ND = grad_x_PD[slot_S].view(num_tokens, top_k, -1).sum(dim=1)
    return (
        grad_x_ND.to(grad_ND.dtype),
        grad_gate_up.to(gate_up_EID.dtype),
        grad_down.to(down_EDI.dtype),
        grad_weight_P[slot_S].view(num_tokens, top_k).to(weight_NK.dtype),
    )


def _num_rows(index_NK: Tensor, gate_up_EID: Tensor) -> int:
    """Rows that suffice however the tokens are routed."""
    return index_NK.numel() + gate_up_EID.shape[0] * _BLOCK_ROWS


def _bounds(blocks_E: Tensor) -> list[tuple[int, int]]:
    ends = blocks_E.cumsum(0).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


@_sorted_experts.register_fake
def _(
    x_ND: Tensor, gate_up_EID: Tensor, down_EDI: Tensor, index_NK: Tensor, weight_NK: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_rows = _num_rows(index_NK, gate_up_EID)
    return (
        torch.empty_like(x_ND),
        x_ND.new_empty(num_rows, x_ND.shape[1], dtype=torch.bfloat16),
        x_ND.new_empty(num_rows, gate_up_EID.shape[1], dtype=torch.bfloat16),
        index_NK.new_empty(index_NK.numel()),
        index_NK.new_empty(gate_up_EID.shape[0]),
    )


@_sorted_experts_backward.register_fake
def _(
    grad_ND: Tensor, gate_up_EID: Tensor, down_EDI: Tensor, weight_NK: Tensor, *_rest: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(grad_ND),
        torch.empty_like(gate_up_EID),
        torch.empty_like(down_EDI),
        torch.empty_like(weight_NK),
    )


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    _, gate_up, down, _, weight_NK = inputs
    ctx.save_for_backward(gate_up, down, weight_NK, *output[1:])


def _backward(ctx: Any, grad_ND: Tensor, *_unused: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_x, grad_gate_up, grad_down, grad_weight = _sorted_experts_backward(grad_ND.contiguous(), *ctx.saved_tensors)
    return grad_x, grad_gate_up, grad_down, None, grad_weight


_sorted_experts.register_autograd(_backward, setup_context=_save_for_backward)


def _experts_forward(experts: Any, x_ND: Tensor, index_NK: Tensor, weight_NK: Tensor) -> Tensor:
    out_ND: Tensor = _sorted_experts(x_ND, experts.gate_up_proj, experts.down_proj, index_NK, weight_NK)[0]
    return out_ND


def register_fast_experts() -> None:
    """Make FAST_EXPERTS known to transformers' registry of experts implementations."""
    ALL_EXPERTS_FUNCTIONS.register(FAST_EXPERTS, _experts_forward)


def chunked_cross_entropy(hidden_ND: Tensor, embedding_VD: Tensor, target_N: Tensor) -> Tensor:
    """Mean cross entropy of tied-embedding logits; targets of -100 are left out."""
    apply: Callable[[Tensor, Tensor, Tensor], Tensor] = _ChunkedCrossEntropy.apply
    return apply(hidden_ND, embedding_VD, target_N)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """A chunk of tokens at a time; the gradients are computed with the loss."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, embedding_VD: Tensor, target_N: Tensor) -> Tensor:
        embedding = embedding_VD.bfloat16()
        hidden = hidden_ND.bfloat16()
        num_targets = (target_N != -100).sum().clamp(min=1)
        grad_hidden = torch.empty_like(hidden)
        grad_embedding = torch.zeros_like(embedding_VD)
        total = torch.zeros((), dtype=torch.float32)
        for start in range(0, hidden.shape[0], _LOSS_CHUNK_TOKENS):
            rows = slice(start, start + _LOSS_CHUNK_TOKENS)
            target = target_N[rows]
            kept = target != -100
            label = target.clamp(min=0).unsqueeze(-1)
            log_probs = functional.log_softmax((hidden[rows] @ embedding.T).float(), dim=-1)
            total -= (log_probs.gather(-1, label).squeeze(-1) * kept).sum()
            grad = log_probs.exp_()
            grad.scatter_add_(-1, label, torch.full_like(label, -1.0, dtype=grad.dtype))
            grad.mul_((kept / num_targets).unsqueeze(-1))
            grad_bf16 = grad.bfloat16()
            torch.mm(grad_bf16, embedding, out=grad_hidden[rows])
            grad_embedding += grad_bf16.T @ hidden[rows]
        ctx.save_for_backward(grad_hidden, grad_embedding)
        ctx.hidden_dtype = hidden_ND.dtype
        return total / num_targets

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_hidden, grad_embedding = ctx.saved_tensors
        return (grad_hidden * grads[0]).to(ctx.hidden_dtype), grad_embedding * grads[0], None
