"""The scenario that is simulated, and the systems that are compared on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from moeless.core.arrays import FloatArray
from moeless.core.cluster import Cluster
from moeless.core.errors import ConfigError
from moeless.planning.cost import CostProfile
from moeless.planning.observation import Planner
from moeless.simulate.batching import BatchingConfig
from moeless.simulate.forecasts import ForecastConfig, PredictedRouting
from moeless.simulate.routing import SequenceRouting
from moeless_predictors.traces import ArrivalTrace

Topology = Literal["hub", "all_to_all"]
Bound = Literal["fluid", "integral", "exact"]
Split = Literal["shares", "balanced", "lp"]
"""Method that splits a step's tokens over replicas: the plan's shares; the dispatcher's balancing from the step's real
counts; or a linear programme from these."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TransferConfig:
    """Ways of weights to workers, and their bandwidths."""

    transfer_share: float = 0.5
    """Largest share of a worker's link that a fetch takes from hidden states while it runs; 0: fetches have a path of
    their own."""
    worker_idle_s: float | None = None
    """Seconds after which a worker that hosts nothing is stopped; starting it again takes the profile's start-up time.
    None: never."""

    def __post_init__(self) -> None:
        if not 0 <= self.transfer_share < 1:
            raise ConfigError(f"transfers.transfer_share must be from 0 to below 1, got {self.transfer_share}")
        if self.worker_idle_s is not None and not self.worker_idle_s >= 0:
            raise ConfigError(f"transfers.worker_idle_s must be at least 0, got {self.worker_idle_s}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Scenario:
    """A model on a cluster, and requests for it. Raises ConfigError where they do not fit."""

    profile: CostProfile
    cluster: Cluster
    routing: SequenceRouting
    arrivals: ArrivalTrace
    batching: BatchingConfig = field(default_factory=BatchingConfig)
    num_engines: int = 1
    transfers: TransferConfig = field(default_factory=TransferConfig)
    follow_in_order: bool = False
    """Requests follow the recorded sequences in their order instead of at random: for traces that drift."""
    seed: int = 0

    def __post_init__(self) -> None:
        model, routing = self.profile.model, self.routing
        shape = (model.num_layers, model.num_experts, model.top_k)
        if shape != (routing.num_layers, routing.num_experts, routing.top_k):
            raise ConfigError(
                f"profile {self.profile.name} is of {shape[0]} layers x {shape[1]} experts, top-{shape[2]}; the "
                f"routing must be of the same, got {routing.num_layers} x {routing.num_experts}, top-{routing.top_k}"
            )
        if self.num_engines < 1:
            raise ConfigError(f"engine.engines must be at least 1, got {self.num_engines}")


@dataclass(frozen=True, kw_only=True, eq=False)
class System:
    """A planner, its input and interval, and how its system moves tokens and weights."""

    name: str
    planner: Planner
    topology: Topology = "hub"
    forecast: ForecastConfig = field(default_factory=ForecastConfig)
    predicted: PredictedRouting | None = None
    """Forecasts of fitted predictors for the routing; needed by the forecast kind predictor."""
    interval_s: float | None = None
    """Between plans; or give `interval_steps`. Neither: the first plan stays."""
    interval_steps: int | None = None
    window_s: float | None = None
    """Time that planners look back on; or give `window_steps`. Neither: ten seconds."""
    window_steps: int | None = None
    split: Split = "shares"
    """balanced: only from a hub, which sees all tokens before it sends any."""
    split_s: float = 0.0
    """Time that a layer with replicas waits for the split of a step's tokens."""
    split_token_s: float = 0.0
    """The same for each token of the step."""
    is_blocking: bool = False
    """Engines stop while weights move, which then come from other workers over the links between them."""
    prefetch_layers: int = 0
    """Number of layers ahead at which a function without an instance begins to start, at the first layer at the
    earliest; 0: when its tokens are there."""
    prefetch_recall: float = 1.0
    """Share of such functions that are predicted."""
    prior_LE: FloatArray | None = None
    """Mean tokens of each function for a token in an earlier recording, for the first plan. None: all are expected to
    get the same."""
    num_known_tokens: int = 0
    """Tokens of the routing whose statistics the planner was made with."""
    is_prefetch_in_time: bool = False
    """Every such function is there when its tokens are, however long it takes to load: with perfect foresight."""
    bound: Bound | None = None
    """Whatever the plan, the faster topology is used and work spread anew for each layer of each step. fluid: evenly,
    the physical limit. integral: as evenly as whole calls of experts allow, the limit of every placement. exact: whole
    experts, placed by the exact load with `bound_instances` of them, moved for free."""
    bound_instances: int = 0
    """Instances of a layer under the bound exact; one of every expert fits in any case."""

    def __post_init__(self) -> None:
        if self.interval_s is not None and self.interval_steps is not None:
            raise ConfigError(f"system {self.name}: interval must be in seconds or in steps, not both")
        for name in ("interval_s", "interval_steps"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"system {self.name}: {name} must be above 0, got {value}")
        if self.split == "balanced" and self.topology != "hub":
            raise ConfigError(f"system {self.name}: split balanced needs the topology hub, got {self.topology}")
        for name in ("split_s", "split_token_s"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"system {self.name}: {name} must be at least 0, got {getattr(self, name)}")
        if self.prefetch_layers < 0:
            raise ConfigError(f"system {self.name}: prefetch_layers must be at least 0, got {self.prefetch_layers}")
        if not 0 <= self.prefetch_recall <= 1:
            raise ConfigError(f"system {self.name}: prefetch_recall must be from 0 to 1, got {self.prefetch_recall}")
