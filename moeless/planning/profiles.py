"""Cost profiles of known models, and of any other by a roofline. docs/simulator.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moeless.core.cluster import ModelShape
from moeless.planning.cost import BackboneTime, CostProfile, ExchangeTime, ExpertTime


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """Memory of a device, and the bandwidth and half-precision rate that it reaches in practice."""

    name: str
    bytes_per_s: float
    flops_per_s: float
    memory_bytes: int


# 768 GB/s and 155 dense BF16 TFLOPS on the data sheet; 80 and 60 % of them.
_A6000 = Device(name="A6000", bytes_per_s=614e9, flops_per_s=93e12, memory_bytes=48 * 10**9)
# 3.35 TB/s and 989.
_H800 = Device(name="H800", bytes_per_s=2.7e12, flops_per_s=600e12, memory_bytes=80 * 10**9)
DEVICES = {"a6000": _A6000, "h800": _H800}
_EXCHANGE_LAUNCH_S = 10e-6
"""No exchange takes less beside its bytes: a kernel's launch and a round of flags."""
_HOST_TRIP_S = 20e-6
"""A layer's counts to the host and its split back to the device, for systems that split on the host."""


def published_exchange(
    *,
    dispatch_us: float,
    combine_us: float,
    bytes_per_s: float,
    split_us: float,
    combine_ratio: float = 1.0,
) -> ExchangeTime:
    """From published latencies of 128 tokens to 8 experts each, hidden size 7168, FP8 out and BF16 back.

    The simulator adds the bytes of its own tokens, so those of the published latencies are taken off: 128 x 8 x 7168,
    twice as many back, over the link's bandwidth. What is left, at least a launch, is averaged over both ways. A hub is
    taken to cost what all-to-all of that width costs, and no less: its engine has as many devices as there are workers.

    Args:
        bytes_per_s: of the link that the latencies were measured on.
        split_us: of moeless's split on the host, measured (benchmarks/split.py), beside the way there and back.
    """
    sent_us = 128 * 8 * 7168 / bytes_per_s * 1e6
    launch_us = _EXCHANGE_LAUNCH_S * 1e6
    fixed_us = (max(launch_us, dispatch_us - sent_us) + max(launch_us, combine_us - 2 * sent_us)) / 2
    return ExchangeTime(
        hub_s=fixed_us * 1e-6,
        message_s=0.0,
        all_to_all_s=fixed_us * 1e-6,
        combine_ratio=combine_ratio,
        split_s=_HOST_TRIP_S + split_us * 1e-6,
        split_token_s=10e-9,
    )


# DeepEP's low-latency kernels on 8 and on 64 devices: NVLink of 160 GB/s, a network card of 50.
_EP8 = published_exchange(dispatch_us=77, combine_us=114, bytes_per_s=160e9, split_us=8)
_EP64 = published_exchange(dispatch_us=173, combine_us=314, bytes_per_s=50e9, split_us=15, combine_ratio=2.0)
_LAUNCH_S = 30e-6
"""Launch time of a backbone layer's kernels."""


def roofline_profile(
    name: str,
    device: Device,
    *,
    experts: tuple[int, int, int],
    hidden_size: int,
    expert_parameters: float,
    backbone_parameters: float | None = None,
    kv_bytes: float | None = None,
    attention_flops: float | None = None,
) -> CostProfile:
    """Make the cost profile of a model in BF16.

    Args:
        experts: MoE layers, experts of each, top-k.
        expert_parameters, backbone_parameters: of one expert, and of one layer's other weights.
        kv_bytes, attention_flops: of one layer, for each token and token of its context. What is not given is that of
            attention with as many values in all its heads as the hidden size, and a quarter as many in keys and values.
    """
    backbone_parameters = 2.5 * hidden_size**2 if backbone_parameters is None else backbone_parameters
    kv_bytes = float(hidden_size) if kv_bytes is None else kv_bytes
    attention_flops = 4.0 * hidden_size if attention_flops is None else attention_flops
    num_layers, num_experts, top_k = experts
    expert_bytes = 2 * expert_parameters
    return CostProfile(
        name=name,
        model=ModelShape(
            num_layers=num_layers,
            num_experts=num_experts,
            top_k=top_k,
            expert_bytes=int(expert_bytes),
            hidden_bytes=2 * hidden_size,
        ),
        source=f"roofline of the model's sizes on {device.name}: {device.bytes_per_s / 1e9:g} GB/s, "
        f"{device.flops_per_s / 1e12:g} TFLOPS reached; exchange by what the bytes of DeepEP's latencies on 8 devices "
        "leave; start-up 10 to 40 s as observed of processes, CUDA contexts "
        "and frameworks",
        expert_time=ExpertTime.from_roofline(
            expert_bytes=expert_bytes,
            flops_per_token=2 * expert_parameters,
            bytes_per_s=device.bytes_per_s,
            flops_per_s=device.flops_per_s,
            call_s=5e-6,
        ),
        backbone=BackboneTime(
            step_s=num_layers * (_LAUNCH_S + 2 * backbone_parameters / device.bytes_per_s),
            token_s=num_layers * 2 * backbone_parameters / device.flops_per_s,
            decode_context_s=num_layers * kv_bytes / device.bytes_per_s,
            prefill_context_s=num_layers * attention_flops / device.flops_per_s,
        ),
        exchange=_EP8,
        start_s=0.3e-3,
        device_bytes=device.memory_bytes,
    )


def _h800_deepseek_v3() -> CostProfile:
    layers, flops_per_s, bytes_per_s = 58, 600e12, 2.7e12
    parameters = 231e6  # of attention (MLA) and the shared expert, one byte each
    return CostProfile(
        name="h800-deepseek-v3",
        model=ModelShape(num_layers=layers, num_experts=256, top_k=8, expert_bytes=3 * 7168 * 2048, hidden_bytes=7168),
        source="DeepGEMM's FP8 figures for the two products of an expert, exchange by what the bytes of "
        "DeepEP's latencies on 64 devices leave; backbone by roofline at 2.7 TB/s and 600 TFLOPS",
        expert_time=ExpertTime.from_knots([(64, 19.5e-6), (256, 25.4e-6), (1024, 81.3e-6), (4096, 297e-6)]),
        backbone=BackboneTime(
            step_s=layers * (_LAUNCH_S + parameters / bytes_per_s),
            token_s=layers * 2 * parameters / flops_per_s,
            decode_context_s=layers * 1152 / bytes_per_s,
            prefill_context_s=layers * 81920 / flops_per_s,
        ),
        exchange=_EP64,
        start_s=0.3e-3,
        device_bytes=_H800.memory_bytes,
    )


def _cpu_moeless_mini() -> CostProfile:
    return CostProfile(
        name="cpu-moeless-mini",
        model=ModelShape(num_layers=6, num_experts=16, top_k=2, expert_bytes=4 * 3 * 160 * 96, hidden_bytes=4 * 160),
        source="measured on one core of a cloud server in float32: an expert by its torch operations, messages "
        "over shared memory (benchmarks/exchange.py), grouping and splitting tokens (benchmarks/split.py), the "
        "backbone by its forward pass without scheduling; all-to-all taken to cost one message",
        expert_time=ExpertTime.from_knots(
            [(1, 11.5e-6), (4, 13.5e-6), (16, 24e-6), (64, 53e-6), (256, 170e-6), (1024, 676e-6)]
        ),
        backbone=BackboneTime(step_s=1.9e-3, token_s=28e-6, decode_context_s=0.0, prefill_context_s=50e-9),
        # Grouping takes 90 µs, half of it charged each way; messages to 4 workers and back 160 µs, as measured.
        exchange=ExchangeTime(hub_s=45e-6, message_s=20e-6, all_to_all_s=65e-6, split_s=8e-6, split_token_s=10e-9),
        start_s=0.3e-3,
        worker_start_s=(2.7, 3.0),
    )


def builtin_profiles() -> Mapping[str, CostProfile]:
    """Profiles by name, each for one model on one device."""
    profiles = (
        _h800_deepseek_v3(),
        _cpu_moeless_mini(),
        roofline_profile(
            "a6000-mixtral-8x7b",
            _A6000,
            experts=(32, 8, 2),
            hidden_size=4096,
            expert_parameters=176.2e6,
            backbone_parameters=41.9e6,
            kv_bytes=4096,
            attention_flops=16384,
        ),
        roofline_profile(
            "a6000-phi-3.5-moe",
            _A6000,
            experts=(32, 16, 2),
            hidden_size=4096,
            expert_parameters=78.6e6,
            backbone_parameters=41.9e6,
            kv_bytes=4096,
            attention_flops=16384,
        ),
        roofline_profile(
            "a6000-llama-4-scout",
            _A6000,
            experts=(48, 16, 1),
            hidden_size=5120,
            expert_parameters=125.8e6,
            backbone_parameters=188.7e6,
            kv_bytes=4096,
            attention_flops=20480,
        ),
        roofline_profile(
            "a6000-gpt-oss-20b",
            _A6000,
            experts=(24, 32, 4),
            hidden_size=2880,
            expert_parameters=24.9e6,
            backbone_parameters=26.5e6,
            kv_bytes=2048,
            attention_flops=8192,
        ),
        roofline_profile(
            "a6000-deepseek-v2-lite",
            _A6000,
            experts=(26, 64, 6),
            hidden_size=2048,
            expert_parameters=8.65e6,
            backbone_parameters=31.1e6,
            kv_bytes=1152,
            attention_flops=10240,
        ),
    )
    return {profile.name: profile for profile in profiles}
