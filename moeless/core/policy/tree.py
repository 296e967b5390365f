"""The policy's tree: frozen pydantic models, from which the JSON schema is made.

Every setting has three levels at which it may be set: for all (`defaults`), for some models, layers or experts
(`rules`, later ones override earlier ones), or not at all (`BUILTIN`, below).
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic.alias_generators import to_camel

from moeless.core.policy.values import MEMORY_PATTERN, RANGES_PATTERN, memory_bytes

MemoryAmount = Annotated[int, Field(ge=0)] | Annotated[str, Field(pattern=MEMORY_PATTERN)]
Ranges = Annotated[str, Field(pattern=RANGES_PATTERN)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class PolicyModel(BaseModel):
    """Frozen, strict about types, and closed: a field that is not known is an error."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        alias_generator=to_camel,
        validate_by_name=True,
        validate_by_alias=True,
        use_attribute_docstrings=True,
    )


class CvScaler(PolicyModel):
    """The MoEless paper's rule: replicas to the highest load per replica until their loads vary by at most cvTarget."""

    name: Literal["cv"]


class MinMaxScaler(PolicyModel):
    """Minimal load of the busiest replica in each layer, with as few instances as that takes."""

    name: Literal["minMax"]
    worker_share: Annotated[float, Field(gt=0, le=1)] = 0.15
    """A replica needs no more relief once its load is at most this share of the mean worker's."""
    max_extra_share: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.5
    """Maximal number of a layer's replicas beyond one for each function, as a share of the functions in use."""


class BenefitScaler(PolicyModel):
    """One budget for all layers, spent where it shortens the busiest replica's time the most."""

    name: Literal["benefit"]
    worker_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """A replica needs no more relief once its load is at most this share of the mean worker's."""
    max_extra_share: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.25
    """Maximal number of replicas beyond one for each function, as a share of the functions in use."""


Scaler = Annotated[CvScaler | MinMaxScaler | BenefitScaler, Field(discriminator="name")]


class LocalityFirstPlacer(PolicyModel):
    """The MoEless paper's rule: warm instances stay, new ones go heaviest first to the worker with the lowest load."""

    name: Literal["localityFirst"]


class MinimalMovesPlacer(PolicyModel):
    """As localityFirst; in addition, instances move where that gains more time than the transfer takes."""

    name: Literal["minimalMoves"]
    max_imbalance: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.05
    """No instance of a layer moves while its busiest worker has at most this multiple of the balanced load."""


class AffinityPlacer(PolicyModel):
    """As minimalMoves; in addition, statistics of recorded routing bring experts used together to the same workers."""

    name: Literal["affinity"]
    objective: Literal["workers", "hops"] = "workers"
    """Minimize the workers that a token touches in a layer (moeless's own topology), or the hops between the experts of
    consecutive layers (all-to-all expert parallelism)."""
    max_imbalance: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.05
    """A layer's busiest worker gets at most this multiple of the balanced load, or the multiple that it had before."""
    min_gain: Annotated[float, Field(ge=0, le=1)] = 0.002
    """A warm instance moves only if that lowers its layer's objective by at least this share."""


Placer = Annotated[LocalityFirstPlacer | MinimalMovesPlacer | AffinityPlacer, Field(discriminator="name")]


class LossyOptions(PolicyModel):
    """Changes what the model computes: no expert gets more than its capacity of tokens."""

    capacity_factor: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """γ in the capacity ⌈γ × k × T / E⌉ of T tokens, k experts each, among E experts."""
    overflow: Literal["drop", "reroute"] = "drop"
    """Drop the choices over capacity, lowest gate weights first, or offer them to experts with room."""

    def capacity(self, *, num_tokens: int, top_k: int, num_experts: int) -> int:
        """Maximal number of a batch's tokens that an expert computes."""
        return math.ceil(self.capacity_factor * top_k * num_tokens / num_experts)


class Settings(PolicyModel):
    """Settings for everything, or for what a rule selects. An absent one is taken from the level above."""

    # Of functions: a rule may choose experts.
    min_replicas: Annotated[int, Field(ge=1)] | None = None
    """Minimal number of instances of a function that has any. Built in: 1."""
    max_replicas: Annotated[int, Field(ge=1)] | None = None
    """Maximal number of instances of a function; it never has more than there are workers. Built in: no limit."""
    scale_to_zero: bool | None = None
    """Allow a function to have no instance once its keep-alive is over and no tokens are forecast for it.
    Built in: true."""
    keep_alive_seconds: Seconds | None = None
    """Time that a function keeps an instance after its last token. Built in: 30."""
    forecast_quantile: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Quantile of the load that scaling covers: 0.9 is exceeded in one window of ten. Built in: 0.9."""
    scale_up_stabilization_seconds: Seconds | None = None
    """Add replicas once that many were needed for this long. Built in: 0."""
    scale_down_stabilization_seconds: Seconds | None = None
    """Remove replicas once they were not needed for this long. Built in: 10."""

    # Of layers: a rule may choose layers, but not experts.
    cv_target: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Coefficient of variation of the loads of a layer's replicas at which none is added any more (scaler cv; the
    MoEless paper's V). Built in: 0.2."""
    layer_memory_budget: MemoryAmount | None = None
    """Memory for the instances of each layer: bytes, 12Gi, or a share such as 150% of the layer's experts held once.
    Built in: no limit."""

    # Of the model: a rule may choose neither.
    memory_budget: MemoryAmount | None = None
    """Memory for all instances: bytes, 12Gi, or a share such as 25% of all experts held once. Built in: no limit but
    the workers' memory."""
    scaler: Scaler | None = None
    """Algorithm that decides the number of replicas. Built in: minMax."""
    placer: Placer | None = None
    """Algorithm that decides the worker of each instance. Built in: minimalMoves."""
    max_moves_per_tick: Annotated[int, Field(ge=0)] | None = None
    """Maximal number of instances that one plan may start only to balance load; required ones are not counted.
    Built in: as many as the workers' links transfer in a quarter of the tick."""
    benefit_threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    """A layer's placement stays unless a new one shortens its slowest worker's time by this share. Built in: 0.02."""
    lossy: LossyOptions | None = None
    """Options that change the model's output. Built in: off."""

    @field_validator("max_replicas")
    @classmethod
    def _max_is_at_least_min(cls, value: int | None, info: ValidationInfo) -> int | None:
        minimum = info.data.get("min_replicas")
        if value is not None and minimum is not None and value < minimum:
            raise ValueError(f"must be >= minReplicas ({minimum}), got {value}")
        return value

    @field_validator("layer_memory_budget", "memory_budget", mode="before")
    @classmethod
    def _is_an_amount(cls, value: object) -> object:
        if isinstance(value, str):
            memory_bytes(value, whole_bytes=1)
        elif value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            raise ValueError(f"must be bytes, with a unit (12Gi, 500M) or a share (25%), got {value!r}")
        return value


LAYER_SETTINGS = ("cv_target", "layer_memory_budget")
MODEL_SETTINGS = ("memory_budget", "scaler", "placer", "max_moves_per_tick", "benefit_threshold", "lossy")

BUILTIN = Settings(
    min_replicas=1,
    scale_to_zero=True,
    keep_alive_seconds=30.0,
    forecast_quantile=0.9,
    scale_up_stabilization_seconds=0.0,
    scale_down_stabilization_seconds=10.0,
    cv_target=0.2,
    scaler=MinMaxScaler(name="minMax"),
    placer=MinimalMovesPlacer(name="minimalMoves"),
    benefit_threshold=0.02,
)


class Rule(Settings):
    """Settings for the models, layers and experts that it selects; an absent selector selects all."""

    models: tuple[str, ...] | None = Field(default=None, strict=False, min_length=1)
    """Names of models; * stands for any characters."""
    layers: Ranges | None = None
    """MoE layers, numbered from 0: '0-3,7,20-'."""
    experts: Ranges | None = None
    """Experts of those layers, written in the same way."""

    @model_validator(mode="after")
    def _settings_fit_the_selector(self) -> Self:
        of_models = () if self.layers is None and self.experts is None else MODEL_SETTINGS
        of_layers = () if self.experts is None else LAYER_SETTINGS
        for name in (*of_layers, *of_models):
            if getattr(self, name) is not None:
                scope = "whole models" if name in MODEL_SETTINGS else "whole layers"
                chosen = f"layers {self.layers!r}" if self.experts is None else f"experts {self.experts!r}"
                raise ValueError(f"{to_camel(name)} must be set for {scope}, got a rule for {chosen}")
        return self


class Policy(PolicyModel):
    """Rules for scaling and placing expert functions."""

    tick_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Time from one plan to the next."""
    defaults: Settings = Settings()
    """Settings for all models, layers and experts."""
    rules: tuple[Rule, ...] = Field(default=(), strict=False)
    """Exceptions to the defaults; of two that set the same field for a function, the later one counts."""
