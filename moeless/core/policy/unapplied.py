"""Settings of a policy that are read and checked, and that no part of the system applies yet."""

from __future__ import annotations

from moeless.core.policy.tree import Policy


def unapplied_settings(policy: Policy) -> list[str]:
    """A sentence for each place in the policy that sets something without effect."""
    levels = {"defaults": policy.defaults} | {f"rules[{i}]": rule for i, rule in enumerate(policy.rules)}
    return [
        f"{where}.lossy (overflow: {level.lossy.overflow}) has no effect yet: every expert computes all of its tokens"
        for where, level in levels.items()
        if level.lossy is not None
    ]
