"""A user's policy: bounds, targets, keep-alive, budgets and the names of algorithms, as one tree. docs/policy.md.

The same document is a YAML file, an HTTP body and the `spec` of a Kubernetes resource. It is written in camelCase;
Python has snake_case.
"""

from moeless.core.policy.document import load_policy, parse_policy, policy_schema
from moeless.core.policy.resolve import UNLIMITED, ResolvedPolicy, resolve
from moeless.core.policy.tree import (
    AffinityPlacer,
    BenefitScaler,
    CvScaler,
    LocalityFirstPlacer,
    LossyOptions,
    MinimalMovesPlacer,
    MinMaxScaler,
    Placer,
    Policy,
    Rule,
    Scaler,
    Settings,
)
from moeless.core.policy.unapplied import unapplied_settings

__all__ = [
    "UNLIMITED",
    "AffinityPlacer",
    "BenefitScaler",
    "CvScaler",
    "LocalityFirstPlacer",
    "LossyOptions",
    "MinMaxScaler",
    "MinimalMovesPlacer",
    "Placer",
    "Policy",
    "ResolvedPolicy",
    "Rule",
    "Scaler",
    "Settings",
    "load_policy",
    "parse_policy",
    "policy_schema",
    "resolve",
    "unapplied_settings",
]
