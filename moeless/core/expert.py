"""Name and layout of an expert function, wherever it runs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

_NAME = re.compile(r"^L(\d{2,})\.E(\d{3,})$")


class FunctionId(NamedTuple):
    """One routed expert. `layer` counts MoE layers from 0 (not transformer blocks), `expert` from 0."""

    layer: int
    expert: int

    def __str__(self) -> str:
        return f"L{self.layer:02d}.E{self.expert:03d}"

    @classmethod
    def parse(cls, name: str) -> FunctionId:
        """Inverse of str(). Raises ValueError if `name` is not like `L07.E003`."""
        match = _NAME.match(name)
        if match is None:
            raise ValueError(f"function name must look like L07.E003, got {name!r}")
        return cls(int(match[1]), int(match[2]))


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertLayout:
    """Computation of one layer's experts, in the terms of transformers' experts interface.

    Weights keep the orientation of the family's own stacked parameters: with I the intermediate and H the
    hidden size, `up` is (2I, H) (gated) or (I, H) (not gated) and `down` is (H, I); transposed families hold
    (H, 2I) and (I, H).
    """

    hidden_size: int
    intermediate_size: int
    has_gate: bool
    """`up` holds gate and up projection together (gate_up_proj)."""
    has_bias: bool
    is_transposed: bool
    is_concatenated: bool
    """[gate; up] when True, interleaved gate0, up0, gate1, ... when False."""
    activation: str
    """Key into transformers' ACT2FN, used when `gate` is "default"."""
    gate: str = "default"
    """ "default": act(gate) * up. Otherwise "module:Class" of the family's experts class in transformers, whose
    own `_apply_gate` is used, such as gpt-oss's clamped activation."""
    gate_attributes: tuple[tuple[str, float], ...] = ()
    """Numbers that the class's own `_apply_gate` reads from `self` besides `act_fn` (ACT2FN[activation], where
    `activation` is not empty), sorted by name: gpt-oss's ("alpha", 1.702), ("limit", 7.0)."""
