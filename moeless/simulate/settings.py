"""A scenario of plain values: what `moeless simulate` and benchmarks set. docs/simulator.md names them all."""

from __future__ import annotations

from dataclasses import dataclass, replace

from moeless.core.cluster import Cluster, ModelShape, even_cluster
from moeless.core.errors import ConfigError
from moeless.core.policy.values import memory_bytes
from moeless.planning.cost import CostProfile
from moeless.planning.profiles import DEVICES, builtin_profiles, roofline_profile
from moeless.simulate.batching import BatchingConfig
from moeless.simulate.routing import SequenceRouting
from moeless.simulate.scenario import Scenario, TransferConfig
from moeless_predictors.traces import ArrivalTrace


@dataclass(frozen=True, kw_only=True, slots=True)
class ScenarioSettings:
    """Everything of a scenario but routing and arrivals."""

    workers: int = 8
    workers_per_node: int | None = None
    """None: all on one node."""
    memory_per_worker: str = "200%"
    """For instances: bytes, with a unit (24Gi), or a share of a worker's even part of all experts."""
    local_gb_s: float = 56.0
    """Between workers of one node, each way; NVLink bridge of an A6000."""
    remote_gb_s: float = 25.0
    """Between nodes, for each worker."""
    fetch_gb_s: float = 24.8
    """From host memory to a worker; PCIe 4 x16."""
    transfer_share: float = 0.5
    """Most of a worker's link that loads take from hidden states."""
    worker_idle_s: float | None = None
    """A worker without instances for so long is stopped; None: never."""
    profile: str | None = None
    """Name of a cost profile; None: the built-in one of the routing's shape, or else a roofline."""
    device: str = "a6000"
    """Device of the roofline."""
    hidden_size: int | None = None
    expert_mb: float | None = None
    """Size of one expert in BF16, for the roofline; the hidden size too is for it, if the trace does not hold one."""
    engines: int = 1
    batch_tokens: int = 2048
    """Most tokens of an engine's step."""
    max_running: int = 256
    """Requests that an engine decodes together."""
    in_order: bool = False
    """Requests follow the recorded sequences in their order instead of at random."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("workers", "workers_per_node", "engines", "hidden_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        for name in ("local_gb_s", "remote_gb_s", "fetch_gb_s", "expert_mb"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} must be above 0, got {value}")
        if self.device not in DEVICES:
            raise ConfigError(f"device must be one of {', '.join(DEVICES)}, got {self.device!r}")
        if self.profile is not None and self.profile not in builtin_profiles():
            raise ConfigError(f"profile must be one of {', '.join(builtin_profiles())}, got {self.profile!r}")


def make_scenario(settings: ScenarioSettings, routing: SequenceRouting, arrivals: ArrivalTrace) -> Scenario:
    """Raises: ConfigError that names what does not fit."""
    profile = profile_for(settings, routing)
    return Scenario(
        profile=profile,
        cluster=cluster_for(settings, profile.model),
        routing=routing,
        arrivals=arrivals,
        batching=BatchingConfig(max_batch_tokens=settings.batch_tokens, max_running=settings.max_running),
        num_engines=settings.engines,
        transfers=TransferConfig(transfer_share=settings.transfer_share, worker_idle_s=settings.worker_idle_s),
        follow_in_order=settings.in_order,
        seed=settings.seed,
    )


def profile_for(settings: ScenarioSettings, routing: SequenceRouting) -> CostProfile:
    """The profile that is named, the built-in one of the routing's shape, or a roofline of the sizes given."""
    profiles = builtin_profiles()
    if settings.profile is not None:
        return profiles[settings.profile]
    shape = (routing.num_layers, routing.num_experts, routing.top_k)
    is_sized = settings.hidden_size is not None or settings.expert_mb is not None
    for profile in profiles.values():
        model = profile.model
        if not is_sized and (model.num_layers, model.num_experts, model.top_k) == shape:
            return profile
    hidden_size = settings.hidden_size or routing.trace.metadata.hidden_size
    if hidden_size is None or settings.expert_mb is None:
        missing = "hidden_size" if hidden_size is None else "expert_mb"
        raise ConfigError(
            f"{missing} must be given: no built-in profile is of {shape[0]} layers x {shape[1]} experts, top-{shape[2]}"
        )
    return roofline_profile(
        f"{settings.device}-{shape[0]}x{shape[1]}x{shape[2]}",
        DEVICES[settings.device],
        experts=shape,
        hidden_size=hidden_size,
        expert_parameters=settings.expert_mb * 1e6 / 2,
    )


def cluster_for(settings: ScenarioSettings, model: ModelShape) -> Cluster:
    """Equal workers."""
    even_part = -(-model.num_experts // settings.workers) * model.num_layers * model.expert_bytes
    try:
        amount = settings.memory_per_worker
        memory = int(amount) if amount.isdigit() else memory_bytes(amount, whole_bytes=even_part)
    except ValueError as error:
        raise ConfigError(f"memory_per_worker {error}") from error
    cluster = even_cluster(settings.workers, memory_bytes=memory, workers_per_node=settings.workers_per_node)
    return replace(
        cluster,
        local_bytes_per_s=settings.local_gb_s * 1e9,
        remote_bytes_per_s=settings.remote_gb_s * 1e9,
        fetch_bytes_per_s=settings.fetch_gb_s * 1e9,
    )


def described(scenario: Scenario) -> dict[str, str]:
    """The scenario and what is assumed of it, in words."""
    profile, cluster, routing = scenario.profile, scenario.cluster, scenario.routing
    model, arrivals, transfers = profile.model, scenario.arrivals, scenario.transfers
    metadata = routing.trace.metadata
    num_nodes = int(cluster.node_W.max()) + 1
    start = "from {:g} to {:g} s".format(*profile.worker_start_s)
    return {
        "model": f"{metadata.model}: {model.num_layers} MoE layers x {model.num_experts} experts, top-{model.top_k}; "
        f"{model.expert_bytes / 1e6:.1f} MB an expert, {model.hidden_bytes:,} bytes a token's hidden state",
        "routing": f"{routing.trace.num_tokens:,} tokens in {routing.num_sequences:,} sequences; each request follows "
        f"a sequence {'in their order' if scenario.follow_in_order else 'drawn at random'}, and round again"
        + (f"; source: {metadata.source}" if metadata.source else ""),
        "arrivals": f"{arrivals.num_requests:,} requests in {arrivals.duration_s:,.1f} s, "
        f"{int(arrivals.prompt_tokens.sum()):,} prompt and {int(arrivals.output_tokens.sum()):,} output tokens"
        + (f"; source: {arrivals.source}" if arrivals.source else ""),
        "workers": f"{cluster.num_workers} on {num_nodes} node{'s' if num_nodes > 1 else ''}, "
        f"{cluster.workers[0].memory_bytes / 1e9:.2f} GB for instances on each "
        f"({int(cluster.capacity_W(model)[0]):,} instances; all experts once are "
        f"{model.num_layers * model.num_experts:,})",
        "engines": f"{scenario.num_engines}, each at most {scenario.batching.max_batch_tokens:,} tokens a step and "
        f"{scenario.batching.max_running:,} requests at once; every system has as many devices for everything but the "
        "experts as for these",
        "costs": f"profile {profile.name}: {profile.source}",
        "links": f"{cluster.local_bytes_per_s / 1e9:g} GB/s between workers of a node, "
        f"{cluster.remote_bytes_per_s / 1e9:g} between nodes; an exchange takes "
        f"{profile.exchange.hub_s * 1e6:.3g} µs and {profile.exchange.message_s * 1e6:g} for each worker from the hub, "
        f"{profile.exchange.all_to_all_s * 1e6:.3g} µs all to all, each way, beside its bytes; splitting a "
        f"layer's tokens over replicas takes {profile.exchange.split_s * 1e6:g} µs and "
        f"{profile.exchange.split_token_s * 1e9:g} ns a token, where a system does so for each step",
        "loading": f"{cluster.fetch_bytes_per_s / 1e9:g} GB/s from host memory and {profile.start_s * 1e3:g} ms each, "
        + (
            f"taking at most {transfers.transfer_share:.0%} of the worker's link from hidden states"
            if transfers.transfer_share
            else "over a path of its own"
        ),
        "worker start-up": f"{start}; "
        + (
            "workers are never stopped"
            if transfers.worker_idle_s is None
            else f"workers that host nothing for {transfers.worker_idle_s:g} s are stopped"
        ),
        "forgotten": "KV cache memory, prefix sharing, preemption, failures, and the time of planning itself",
        "seed": str(scenario.seed),
    }
