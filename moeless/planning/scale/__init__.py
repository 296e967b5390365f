"""Number of instances of each function: pure functions of arrays, which remember nothing between calls."""

from moeless.planning.scale.benefit import replicas_by_benefit
from moeless.planning.scale.budget import fit_budgets, fit_workers, min_replicas
from moeless.planning.scale.replicas import Limits, replicas_by_cv, replicas_min_max
from moeless.planning.scale.stabilise import Stabiliser

__all__ = [
    "Limits",
    "Stabiliser",
    "fit_budgets",
    "fit_workers",
    "min_replicas",
    "replicas_by_benefit",
    "replicas_by_cv",
    "replicas_min_max",
]
