"""The predictors of a whole model: for each MoE layer and distance the chosen one, with its bound; in one file.

`fitting.py` makes a set, `live.py` serves from it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from moeless_predictors.arrays import AnyArray
from moeless_predictors.base import LoadPredictor
from moeless_predictors.features import FeatureConfig
from moeless_predictors.popularity import PopularityPredictor
from moeless_predictors.quantile import LoadQuantile
from moeless_predictors.selector import Candidate, Choice
from moeless_predictors.storage import PredictorFormatError, from_arrays, read_arrays, to_arrays, write_arrays

FORMAT = "moeless-predictor-set"
VERSION = 2
KINDS = ("popularity", "transition", "gate", "history")

_PARTS: dict[str, type] = {
    "predictor": LoadPredictor,
    "popularity": PopularityPredictor,
    "quantile": LoadQuantile,
    "popularity_quantile": LoadQuantile,
}
"""Fields of a pair that are estimators, and their classes."""


@dataclass(frozen=True, kw_only=True)
class PairPredictor:
    """Predicts layer `layer + distance` from layer `layer`."""

    layer: int
    distance: int
    choice: Choice
    """Chosen kind of predictor, and the reason."""
    candidates: tuple[Candidate, ...]
    """Every kind that was tried, as measured on held-out sequences."""
    predictor: LoadPredictor
    popularity: PopularityPredictor
    """The baseline, from which a server learns on: it stands in where the chosen predictor does worse."""
    quantile: LoadQuantile
    """Calibrated for the chosen predictor on the held-out sequences."""
    popularity_quantile: LoadQuantile
    """The same for popularity that learns online: its bound's width is what that of `quantile` is compared with."""

    @property
    def target(self) -> int:
        """The layer that is predicted."""
        return self.layer + self.distance

    @property
    def kind(self) -> str:
        """Kind of the chosen predictor; one of KINDS."""
        return self.choice.name


@dataclass(frozen=True, kw_only=True)
class PredictorSet:
    """Raises ValueError if the pairs do not fit the model's shape."""

    model: str
    num_layers: int
    num_experts: int
    top_k: int
    features: FeatureConfig
    """Features of the history predictors."""
    pairs: Mapping[tuple[int, int], PairPredictor] = field(repr=False)
    """By (source layer, distance)."""

    def __post_init__(self) -> None:
        if not self.pairs:
            raise ValueError("pairs must hold at least one predictor")
        for (layer, distance), pair in self.pairs.items():
            if (pair.layer, pair.distance) != (layer, distance) or layer < 0 or distance < 1:
                raise ValueError(f"pairs must be filed under their layer and distance, got {pair.layer, pair.distance}")
            if pair.target >= self.num_layers:
                raise ValueError(f"target layer must be below {self.num_layers}, got {pair.target}")
            found = (pair.predictor.n_experts_, pair.predictor.top_k_)
            if found != (self.num_experts, self.top_k):
                raise ValueError(
                    f"layer {layer}, distance {distance}: experts and top-k must be "
                    f"{(self.num_experts, self.top_k)}, got {found}"
                )

    @property
    def distances(self) -> tuple[int, ...]:
        return tuple(sorted({distance for _, distance in self.pairs}))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the set to a safetensors file, all or nothing."""
        arrays: dict[str, AnyArray] = {}
        pairs = []
        for pair in self.pairs.values():
            prefix = f"{pair.layer}.{pair.distance}."
            parts = {}
            for part in _PARTS:
                own, parts[part] = to_arrays(getattr(pair, part))
                arrays |= {f"{prefix}{part}.{name}": array for name, array in own.items()}
            pairs.append(
                {
                    "layer": pair.layer,
                    "distance": pair.distance,
                    "choice": asdict(pair.choice),
                    "candidates": [asdict(candidate) for candidate in pair.candidates],
                    **parts,
                }
            )
        document = {
            "version": VERSION,
            "model": self.model,
            "num_layers": self.num_layers,
            "num_experts": self.num_experts,
            "top_k": self.top_k,
            "features": asdict(self.features),
            "pairs": pairs,
        }
        write_arrays(path, arrays, document, kind=FORMAT)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PredictorSet:
        """Read what `save` wrote.

        Raises: PredictorFormatError that names the field; OSError if the file cannot be read.
        """
        arrays, document = read_arrays(path, kind=FORMAT)
        if document.get("version") != VERSION:
            raise PredictorFormatError(
                f"{path}: version must be {VERSION}, got {document.get('version')!r}: fit the predictors again"
            )
        try:
            pairs = [_pair(item, arrays, source=str(path)) for item in document["pairs"]]
            return cls(
                **{name: document[name] for name in ("model", "num_layers", "num_experts", "top_k")},
                features=FeatureConfig(**document["features"]),
                pairs={(pair.layer, pair.distance): pair for pair in pairs},
            )
        except PredictorFormatError:
            raise
        except KeyError as error:
            raise PredictorFormatError(f"{path}: {error} is missing") from error
        except (TypeError, ValueError, AttributeError) as error:
            raise PredictorFormatError(f"{path}: {error}") from error


def _pair(item: dict[str, Any], arrays: Mapping[str, AnyArray], *, source: str) -> PairPredictor:
    layer, distance = int(item["layer"]), int(item["distance"])
    parts = {}
    for part, cls in _PARTS.items():
        prefix = f"{layer}.{distance}.{part}."
        own = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
        where = f"{source}: layer {layer}, distance {distance}, {part}"
        parts[part] = from_arrays(own, item[part], source=where)
        if not isinstance(parts[part], cls):
            raise PredictorFormatError(f"{where}: must be a {cls.__name__}, got {type(parts[part]).__name__}")
    return PairPredictor(
        layer=layer,
        distance=distance,
        choice=Choice(**item["choice"]),
        candidates=tuple(Candidate(**candidate) for candidate in item["candidates"]),
        **parts,
    )
