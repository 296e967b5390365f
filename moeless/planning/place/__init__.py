"""Placement: which worker hosts the instances of each function, and the share of its tokens that each gets.

`place` is what a tick calls; `shares` splits tokens. planning.affinity is for plans that also keep tokens on few
workers.
"""

from moeless.planning.place.heaviest_first import InfeasiblePlacementError
from moeless.planning.place.place import PlacementConfig, place
from moeless.planning.place.shares import equal_shares, exact_shares, min_max_shares

__all__ = [
    "InfeasiblePlacementError",
    "PlacementConfig",
    "equal_shares",
    "exact_shares",
    "min_max_shares",
    "place",
]
